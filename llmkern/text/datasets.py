# SPDX-License-Identifier: Apache-2.0
"""Corpora as language models read them: splits, contiguous lanes, windows of time.

A language model that carries its state must see each lane of the batch as one uninterrupted text:
every window continues, lane by lane, the one before it.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llmkern.text.files import read_text

_SPLIT_WORDS = {
    "train": ("train", "training"),
    "valid": ("valid", "val", "validation", "dev"),
    "test": ("test",),
}
# A whole word of the name: "latest.txt" is no test text. Digits end a word: "train2.txt".
_SPLIT_PATTERNS = {
    split: re.compile(rf"(?<![a-z])(?:{'|'.join(words)})(?![a-z])", re.IGNORECASE)
    for split, words in _SPLIT_WORDS.items()
}
_SHOWN_NAMES = 5


class CorpusFiles(NamedTuple):
    """The files of a corpus, by split, in the order they are read."""

    train: list[Path]
    valid: list[Path]
    test: list[Path]


class Splits(NamedTuple):
    """The texts of a corpus; ``valid`` and ``test`` are None where there is none."""

    train: str
    valid: str | None
    test: str | None


def corpus_files(*paths: str | os.PathLike[str]) -> CorpusFiles:
    """Which files make up a corpus, and which of them are held out.

    The files of a folder are told apart by a word in their names: ``train``, ``valid`` (or ``val``,
    ``validation``, ``dev``) and ``test``. Of several such sets, one has the shortest names: beside
    ``ptb.char.train.txt``, it is ``ptb.train.txt``. In a folder where no file is called ``train``,
    all others are the training text, in the order of their names: the ``.txt`` files, or every file
    if there is none. Hidden files and folders within are left alone.

    Args:
        *paths: One file, of whatever name: all of it is training text. Or a folder; or several
            files and folders, read in the order given, of which none is left out.

    Returns:
        The files.

    Raises:
        FileNotFoundError: There is no file, or none to train on.
        ValueError: Several files of a folder may be the same split.
    """
    where = "llmkern.text.language_modeling_splits"
    if len(paths) == 1 and not Path(paths[0]).is_dir():
        return CorpusFiles([Path(paths[0])], [], [])
    found = CorpusFiles([], [], [])
    for path in map(Path, paths):
        if path.is_dir():
            parts = _folder_files(where, path)
        else:
            split = _split_of(path.name) or "train"
            parts = CorpusFiles([], [], [])._replace(**{split: [path]})
        for files, more in zip(found, parts, strict=True):
            files += more
    if not found.train:
        raise FileNotFoundError(
            f"{where}: expected a file to train on in {_named(paths)}, got {_named([*found.valid, *found.test])}"
        )
    return found


def language_modeling_splits(
    *paths: str | os.PathLike[str], valid_fraction: float = 0.1, test_fraction: float = 0.0
) -> Splits:
    """Read a corpus and its splits.

    Args:
        *paths: A text file, a folder, or several of them; ``corpus_files`` says which file is which
            split. Files of one split are joined, with a newline between them where none is. A split
            that has no file is cut from the training text, at the character: training text first,
            then validation, then test. ``valid_fraction=0.1`` holds out what nanoGPT does.
        valid_fraction: Share of the training text's characters held out for validation where no
            file is the validation text; 0 holds out nothing.
        test_fraction: Share of them held out, at the end, for testing, likewise.

    Returns:
        The texts.

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError: A file is not text (see ``read_text``), a folder's files cannot be told apart,
            the fractions are out of range, or the text is too short for them.

    Example:
        >>> splits = language_modeling_splits("examples/weather_zh.txt")
        >>> len(splits.train) > 8 * len(splits.valid)
        True
    """
    where = "llmkern.text.language_modeling_splits"
    if not (valid_fraction >= 0 and test_fraction >= 0 and valid_fraction + test_fraction < 1):
        raise ValueError(
            f"{where}: expected valid_fraction and test_fraction >= 0 and a sum below 1, "
            f"got {valid_fraction} and {test_fraction}"
        )
    files = corpus_files(*paths)
    if files.valid:
        valid_fraction = 0.0
    if files.test:
        test_fraction = 0.0
    text, valid, test = (_joined(map(read_text, part)) for part in files)
    valid_start = int(len(text) * (1 - valid_fraction - test_fraction))
    test_start = int(len(text) * (1 - test_fraction))
    train = text[:valid_start]
    valid = valid or text[valid_start:test_start]
    test = test or text[test_start:]
    if not train or (valid_fraction and not valid) or (test_fraction and not test):
        raise ValueError(
            f"{where}: expected a text long enough to split, got {len(text)} characters in {_named(files.train)}"
        )
    return Splits(train, valid or None, test or None)


def contiguous_lanes(ids: Tensor, batch_size: int) -> Tensor:
    """Lay a stream of tokens out as parallel lanes.

    Lane b is the b-th stretch of ``N // B`` consecutive tokens; what remains at the end, fewer than
    B tokens, is dropped.

    Args:
        ids: Tokens, int64 or (half the memory) int32 [N].
        batch_size: Number of lanes B.

    Returns:
        [B, N // B] of the same dtype, contiguous, sharing the memory of ``ids`` where that is
        contiguous.

    Raises:
        TypeError: ``ids`` is not an int64 or int32 tensor.
        ValueError: ``ids`` is not one-dimensional, ``batch_size`` < 1, or N < 2 * B: a lane needs
            an input and a target.

    Example:
        >>> contiguous_lanes(torch.arange(7), batch_size=3)
        tensor([[0, 1],
                [2, 3],
                [4, 5]])
    """
    where = "llmkern.text.contiguous_lanes"
    _check_ids(where, "ids", ids, "N")
    if batch_size < 1:
        raise ValueError(f"{where}: expected batch_size >= 1, got {batch_size}")
    if len(ids) < 2 * batch_size:
        raise ValueError(
            f"{where}: expected at least 2 * batch_size = {2 * batch_size} tokens, got {len(ids)}; "
            "use a smaller batch_size or a longer text"
        )
    length = len(ids) // batch_size
    return ids[: batch_size * length].reshape(batch_size, length)


def bptt_windows(
    lanes: Tensor, bptt: int, *, start: int = 0
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Walk along the lanes in windows of truncated backpropagation through time (Werbos 1990).

    Every token of a lane but the first is a target exactly once. There are
    ``ceil((L - 1) / bptt)`` windows; the last may be shorter.

    Args:
        lanes: int64 or int32 [B, L], from ``contiguous_lanes``.
        bptt: Longest window.
        start: Column to start at: an earlier ``start`` plus the width of its window resumes there.

    Returns:
        An iterator of (start, inputs [B, t], targets [B, t]), 1 <= t <= bptt, int64; the targets
        are one column to the right. The tensors are views of ``lanes`` where those are int64.

    Raises:
        TypeError: ``lanes`` is not an int64 or int32 tensor.
        ValueError: ``lanes`` is not two-dimensional or has fewer than 2 columns, ``bptt`` < 1, or
            ``start`` is outside [0, L - 1].

    Example:
        >>> for start, inputs, targets in bptt_windows(torch.arange(4).view(1, 4), bptt=2):
        ...     print(start, inputs.tolist(), targets.tolist())
        0 [[0, 1]] [[1, 2]]
        2 [[2]] [[3]]
    """
    where = "llmkern.text.bptt_windows"
    _check_ids(where, "lanes", lanes, "B, L")
    last = lanes.shape[1] - 1
    if last < 1:
        raise ValueError(f"{where}: expected lanes of at least 2 tokens, got {last + 1}")
    if bptt < 1:
        raise ValueError(f"{where}: expected bptt >= 1, got {bptt}")
    if not 0 <= start <= last:
        raise ValueError(f"{where}: expected start in [0, {last}], got {start}")

    def windows() -> Iterator[tuple[int, Tensor, Tensor]]:
        for begin in range(start, last, bptt):
            end = min(begin + bptt, last)
            yield begin, lanes[:, begin:end].long(), lanes[:, begin + 1 : end + 1].long()

    return windows()


def _check_ids(where: str, name: str, ids: Tensor, letters: str) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{where}: expected {name} to be an int64 or int32 tensor, got {got}")
    if ids.dim() != letters.count(",") + 1:
        raise ValueError(f"{where}: expected {name} of shape [{letters}], got {list(ids.shape)}")


def _split_of(name: str) -> str | None:
    return next((split for split, word in _SPLIT_PATTERNS.items() if word.search(name)), None)


def _folder_files(where: str, folder: Path) -> CorpusFiles:
    files = sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))
    if not files:
        raise FileNotFoundError(f"{where}: expected text files in '{folder}', got none")
    by_split = {split: [f for f in files if _split_of(f.name) == split] for split in _SPLIT_WORDS}
    chosen = {split: _one_of(where, folder, split, by_split) for split in _SPLIT_WORDS}
    if not chosen["train"]:
        others = [file for file in files if _split_of(file.name) is None]
        chosen["train"] = [file for file in others if file.suffix.lower() == ".txt"] or others
    return CorpusFiles(**chosen)


def _one_of(where: str, folder: Path, split: str, by_split: dict[str, list[Path]]) -> list[Path]:
    """The one file of a split, if there is any.

    Of several files, those belong together whose names differ in the word of the split alone; the set that has most of
    the splits, and then the shortest name, is meant.
    """
    found = by_split[split]
    if len(found) <= 1:
        return found
    sets = Counter(_without_split(f.name) for part in by_split.values() for f in part)

    def rank(file: Path) -> tuple[int, int]:
        name = _without_split(file.name)
        return -sets[name], len(name)

    first, second = sorted(found, key=rank)[:2]
    if rank(first) == rank(second):
        words = " or ".join(f"*{word}*" for word in _SPLIT_WORDS[split])
        raise ValueError(f"{where}: expected one file {words} in '{folder}', got {_named(found)}")
    return [first]


def _without_split(name: str) -> str:
    return _SPLIT_PATTERNS[str(_split_of(name))].sub("", name)


def _joined(texts: Iterable[str]) -> str:
    """The texts, one after the other, each beginning on a line of its own."""
    parts: list[str] = []
    for text in texts:
        if parts and not parts[-1].endswith("\n"):
            parts.append("\n")
        parts.append(text)
    return "".join(parts)


def _named(files: Iterable[str | os.PathLike[str]]) -> str:
    """The names of files, a few of them and the number of the others."""
    names = [f"'{os.fspath(file)}'" for file in files]
    shown = ", ".join(names[:_SHOWN_NAMES])
    hidden = len(names) - _SHOWN_NAMES
    return f"{shown} and {hidden} more" if hidden > 0 else shown or "none"
