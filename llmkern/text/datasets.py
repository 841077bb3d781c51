# SPDX-License-Identifier: Apache-2.0
"""Corpora as language models read them: splits, contiguous lanes, windows of time.

A language model that carries its state must see each lane of the batch as one uninterrupted text:
every window continues, lane by lane, the one before it.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llmkern.text.files import read_text

_SPLIT_WORDS = {"train": ("train",), "valid": ("valid", "val", "dev"), "test": ("test",)}


class Splits(NamedTuple):
    """The texts of a corpus; ``valid`` and ``test`` are None where there is none."""

    train: str
    valid: str | None
    test: str | None


def language_modeling_splits(
    path: str | os.PathLike[str], *, valid_fraction: float = 0.1, test_fraction: float = 0.0
) -> Splits:
    """Read a corpus and its splits.

    Args:
        path: A folder with one file each whose name contains ``train``, ``valid`` (or ``val`` or
            ``dev``) and, if wanted, ``test``; or a single text file, which is cut at the character:
            training text first, then validation, then test. ``valid_fraction=0.1`` holds out what
            nanoGPT does.
        valid_fraction: Share of a single file's characters held out for validation; 0 holds out
            nothing.
        test_fraction: Share of a single file's characters held out, at the end, for testing.

    Returns:
        The texts.

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError: A file is not text (see ``read_text``), a folder's files cannot be told apart,
            the fractions are out of range, or the file is too short for them.

    Example:
        >>> splits = language_modeling_splits("examples/weather_zh.txt")
        >>> len(splits.train) > 8 * len(splits.valid)
        True
    """
    where = "llmkern.text.language_modeling_splits"
    if Path(path).is_dir():
        files = {split: _split_file(where, Path(path), split) for split in _SPLIT_WORDS}
        texts = {split: read_text(file) if file else None for split, file in files.items()}
        return Splits(**texts)  # type: ignore[arg-type]
    if not (valid_fraction >= 0 and test_fraction >= 0 and valid_fraction + test_fraction < 1):
        raise ValueError(
            f"{where}: expected valid_fraction and test_fraction >= 0 and a sum below 1, "
            f"got {valid_fraction} and {test_fraction}"
        )
    text = read_text(path)
    valid_start = int(len(text) * (1 - valid_fraction - test_fraction))
    test_start = int(len(text) * (1 - test_fraction))
    train, valid, test = text[:valid_start], text[valid_start:test_start], text[test_start:]
    if not train or (valid_fraction and not valid) or (test_fraction and not test):
        raise ValueError(
            f"{where}: expected a text long enough to split, got {len(text)} characters "
            f"in '{os.fspath(path)}'"
        )
    return Splits(train, valid or None, test or None)


def contiguous_lanes(ids: Tensor, batch_size: int) -> Tensor:
    """Lay a stream of tokens out as parallel lanes.

    Lane b is the b-th stretch of ``N // B`` consecutive tokens; what remains at the end, fewer than
    B tokens, is dropped.

    Args:
        ids: Tokens, int64 [N].
        batch_size: Number of lanes B.

    Returns:
        int64 [B, N // B], contiguous, sharing the memory of ``ids`` where that is contiguous.

    Raises:
        TypeError: ``ids`` is not an int64 tensor.
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
        lanes: int64 [B, L], from ``contiguous_lanes``.
        bptt: Longest window.
        start: Column to start at: an earlier ``start`` plus the width of its window resumes there.

    Returns:
        An iterator of (start, inputs [B, t], targets [B, t]), 1 <= t <= bptt; the tensors are views
        of ``lanes``, the targets one column to the right.

    Raises:
        TypeError: ``lanes`` is not an int64 tensor.
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
            yield begin, lanes[:, begin:end], lanes[:, begin + 1 : end + 1]

    return windows()


def _check_ids(where: str, name: str, ids: Tensor, letters: str) -> None:
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{where}: expected {name} to be an int64 tensor, got {got}")
    if ids.dim() != letters.count(",") + 1:
        raise ValueError(f"{where}: expected {name} of shape [{letters}], got {list(ids.shape)}")


def _split_file(where: str, folder: Path, split: str) -> Path | None:
    words = _SPLIT_WORDS[split]
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    found = [file for file in files if any(word in file.name.lower() for word in words)]
    if len(found) == 1:
        return found[0]
    if not found and split == "test":
        return None
    pattern = " or ".join(f"*{word}*" for word in words)
    names = [file.name for file in found or files]
    error = f"{where}: expected one file {pattern} in '{folder}', got {names}"
    raise ValueError(error) if found else FileNotFoundError(error)
