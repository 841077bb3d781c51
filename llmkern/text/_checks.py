# SPDX-License-Identifier: Apache-2.0
"""Checks of what a tokenizer is given: the library behind it must never see what it cannot take."""

import re
from collections.abc import Iterable

from llmkern.text.backends import BYTES, DEFAULT_SPECIAL_TOKENS, KINDS, SPECIAL_TOKENS, UNK, Kind
from llmkern.text.normalization import check_form

_SURROGATE = re.compile("[\ud800-\udfff]")


def check_text(where: str, text: str) -> str:
    """The text, if it is one that the tokenizer library can take."""
    if not isinstance(text, str):
        raise TypeError(
            f"llmkern.text.Tokenizer.{where}: expected text as a str, got {type(text).__name__}"
        )
    surrogate = _SURROGATE.search(text)
    if surrogate:
        raise ValueError(
            f"llmkern.text.Tokenizer.{where}: expected Unicode text, got the lone surrogate "
            f"U+{ord(surrogate[0]):04X} at position {surrogate.start()}"
        )
    return text


def check_options(
    kind: Kind,
    vocab_size: int | None,
    min_frequency: int,
    special_tokens: Iterable[str] | None,
    normalization: str | None,
) -> tuple[str, ...]:
    """The special tokens to use, after a look at all options of ``Tokenizer.train``."""
    where = "llmkern.text.Tokenizer.train"
    check_form("Tokenizer.train", normalization)
    if kind not in KINDS:
        raise ValueError(f"{where}: expected kind to be one of {KINDS}, got {kind!r}")
    default = DEFAULT_SPECIAL_TOKENS[kind]
    specials = default if special_tokens is None else tuple(special_tokens)
    if len(set(specials) & set(SPECIAL_TOKENS)) != len(specials):
        raise ValueError(
            f"{where}: expected special_tokens to be different ones of {SPECIAL_TOKENS}, "
            f"got {specials}"
        )
    if kind == "bpe" and UNK in specials:
        raise ValueError(f"{where}: expected no '{UNK}' for bpe, which knows every text, got one")
    smallest = len(specials) + (BYTES if kind == "bpe" else 1)
    if vocab_size is not None and vocab_size < smallest:
        raise ValueError(f"{where}: expected vocab_size >= {smallest}, got {vocab_size}")
    if min_frequency < 1:
        raise ValueError(f"{where}: expected min_frequency >= 1, got {min_frequency}")
    if min_frequency > 1 and kind != "bpe" and UNK not in specials:
        raise ValueError(
            f"{where}: expected '{UNK}' among special_tokens for min_frequency {min_frequency}, "
            f"which leaves out tokens, got {specials}"
        )
    return specials
