# SPDX-License-Identifier: Apache-2.0
"""Cutting text: into pieces of bounded size for the tokenizer library, and into Chinese words.

The library keeps half a kilobyte for every token of a text it encodes in one go, gigabytes for a
corpus. Pieces of some 16,000 characters, cut where no tokenizer can join the two sides, give the
same ids in a few megabytes and on all cores.
"""

import functools
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

from llmkern._optional import require

PIECE_LENGTH = 16_384

# White space after something else: no word, byte-level pre-token or Unicode composition spans it.
_WORD_BOUNDARY = re.compile(r"(?<=\S)(?=\s)")
# Characters stand alone, but for combining marks: cut before what never composes with its left.
_CHARACTER_BOUNDARY = re.compile(r"(?=[\s!-~\u4e00-\u9fff])")


def pieces(text: str, *, characters: bool) -> Iterator[str]:
    """Cut a text into consecutive pieces of about ``PIECE_LENGTH`` characters.

    Args:
        text: The text.
        characters: Whether every token is one character, so that a word may be cut.

    Yields:
        The pieces, whose concatenation is ``text``. A stretch without white space stays whole.
    """
    boundary = _CHARACTER_BOUNDARY if characters else _WORD_BOUNDARY
    start = 0
    while start < len(text):
        match = boundary.search(text, start + PIECE_LENGTH)
        end = match.start() if match else len(text)
        yield text[start:end]
        start = end


def chinese_words(text: str) -> list[str]:
    """Segment Chinese text into words with jieba (its dictionary and hidden Markov model).

    Args:
        text: Any text; white space, punctuation and other scripts become words of their own.

    Returns:
        The words, whose concatenation is ``text``.

    Raises:
        ImportError: jieba is not installed.
    """
    return list(_segmenter().cut(text))


@functools.cache
def _segmenter() -> Any:
    jieba = require("jieba", "segments Chinese text")
    logging.getLogger("jieba").setLevel(logging.WARNING)
    # An own instance: words that a program adds to jieba's global dictionary must not change what
    # a saved tokenizer does.
    segmenter = jieba.Tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        segmenter.initialize()
    return segmenter
