# SPDX-License-Identifier: Apache-2.0
"""From a path to token ids, for the commands."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkern._info import info
from llmkern.cli.reading import reading
from llmkern.text import Splits, Tokenizer, language_modeling_splits, read_text


@dataclass(frozen=True)
class Encoded:
    """A text as ids, and how many of its characters a token stands for."""

    ids: Tensor
    characters_per_token: float


def checked_device(name: str) -> torch.device:
    """The device, if this machine has it; "auto" is CUDA where there is a device and kernels for it, else the CPU.

    Raises:
        ValueError: no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and info()["cuda_architectures"] else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device: expected a device of this machine such as cpu or auto, got {name!r}: {reason}"
        ) from error
    return device


def train_tokenizer(
    splits: Splits, *, kind: str, unk: bool = False, show: bool = False, **options: Any
) -> Tokenizer:
    """A tokenizer for a corpus.

    Characters come from all splits: a validation text with a character of its own could not be read; unless there is a
    token for unknown ones. Words and merges are learned from the training text alone; unknown words have a token.

    Args:
        splits: the corpus.
        kind: "char", "word", "jieba" or "bpe".
        unk: have a token for what the training text does not hold.
        show: show the progress on standard error.
        **options: of Tokenizer.train.
    """
    texts = [splits.train]
    if kind == "char" and not unk:
        texts = [text for text in splits if text]
        unk = options.get("vocab_size") is not None or options.get("min_frequency", 1) > 1
    if unk and kind in ("char", "bpe"):
        options["special_tokens"] = ("<unk>",)
    with reading("learning the tokenizer", sum(map(len, texts)), show=show) as tell:
        return Tokenizer.train(texts, kind=kind, on_progress=tell, **options)  # type: ignore[arg-type]


def encode(tokenizer: Tokenizer, text: str, name: str, *, show: bool = False) -> Encoded:
    """The text in the tokenizer's ids, int32: half the memory of torch's usual ones.

    Args:
        tokenizer: the tokenizer.
        text: the text.
        name: what the progress calls it.
        show: show the progress on standard error.
    """
    with reading(f"reading {name}", len(text), show=show) as tell:
        ids = torch.from_numpy(tokenizer.encode_array(text, tell))
    return Encoded(ids, len(text) / max(1, len(ids)))


def text_to_evaluate(
    paths: list[Path], split: str | None, valid_fraction: float
) -> tuple[str, str]:
    """The text that ``llmkern evaluate`` reads, and its name.

    Args:
        paths: a file, a folder, or several of them.
        split: "train", "valid" or "test"; None is a whole file, or else the test text if there is one, else the
            validation text.
        valid_fraction: the share of a text that the split "valid" is, where no file is.

    Raises:
        ValueError: there is no such split.
    """
    if split is None and len(paths) == 1 and not paths[0].is_dir():
        return read_text(paths[0]), paths[0].name
    if split not in (None, *Splits._fields):
        raise ValueError(f"--split: expected one of {', '.join(Splits._fields)}, got {split}")
    splits = language_modeling_splits(*paths, valid_fraction=valid_fraction)
    if split is None:
        split = "valid" if splits.test is None else "test"
    text = getattr(splits, split)
    names = ", ".join(path.name for path in paths)
    if text is None:
        there = " or ".join(name for name, part in splits._asdict().items() if part)
        raise ValueError(f"--split: expected one of the splits of {names}, {there}, got {split}")
    return text, f"{names} ({split})"
