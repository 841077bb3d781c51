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
from collections.abc import Callable, Iterator
from typing import Any

from llmkern._optional import require

PIECE_LENGTH = 16_384

_WHITE_SPACE = " \t\n\r\u3000"  # in every library; Python alone also counts U+001C to U+001F
# White space after something else: no word, byte-level pre-token or Unicode composition spans it.
WORD_BOUNDARY = re.compile(rf"(?<=\S)(?=[{_WHITE_SPACE}])")
ANYWHERE = re.compile("")
# Before what never composes with its left: white space, ASCII, Latin, Greek, Cyrillic, kana, CJK and Hangul letters.
STARTS_ANEW = re.compile(
    r"(?=[\s!-~\xc0-\u02af\u0370-\u0482\u048a-\u052f\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3])"
)
# jieba ends a word at these, in every normalisation form.
CHINESE_BOUNDARY = re.compile(r"(?<=\S)(?=[ \t\n\u3000])|(?=[。，！？；：、])")


def pieces(
    text: str, boundary: re.Pattern[str], cut: Callable[[str], int | None] | None = None
) -> Iterator[str]:
    """Cut a text into consecutive pieces of about ``PIECE_LENGTH`` characters.

    Args:
        text: The text.
        boundary: Matches, without width, where the text may be cut.
        cut: Where to cut a stretch that has no such place: takes its beginning and returns the
            length of the piece, or None to be given a longer one. Default: the stretch stays whole.

    Yields:
        The pieces, whose concatenation is ``text``.
    """
    start = 0
    while start < len(text):
        end = _piece_end(text, start, boundary, cut)
        yield text[start:end]
        start = end


def _piece_end(
    text: str, start: int, boundary: re.Pattern[str], cut: Callable[[str], int | None] | None
) -> int:
    searched, size = start + PIECE_LENGTH, 2 * PIECE_LENGTH
    while searched < len(text):
        stop = min(start + size, len(text))
        match = boundary.search(text, searched, stop)
        if match:
            return match.start()
        length = cut(text[start:stop]) if cut else None
        if length:
            return start + length
        searched, size = stop, 2 * size
    return len(text)


def last_token_boundary(normalizer: Any, pre_tokenizer: Any, text: str) -> int | None:
    """Where the last pre-token of the beginning of a text starts: those before it are certain.

    The last one may go on in the text that follows; whether a pre-token ends is known once the
    character after it is seen.

    Returns:
        The length of the text before it, None if it is the only one.
    """
    parts = require("tokenizers", "builds and runs tokenizers").PreTokenizedString(text)
    if normalizer:
        parts.normalize(normalizer.normalize)
    pre_tokenizer.pre_tokenize(parts)
    splits = [span for _, span, _ in parts.get_splits("original", "char")]
    for (_, before), (start, _) in zip(splits[-2::-1], splits[:0:-1], strict=True):
        if start > 0 and before <= start and _is_certain(text, start, bool(normalizer)):
            return start
    return None


def _is_certain(text: str, start: int, is_normalized: bool) -> bool:
    """Whether the two sides of a boundary of pre-tokens read the same apart.

    White space leaves its last character to the word after it, which it must see; and the two sides must not compose.
    """
    if text[start - 1].isspace() and text[start] not in _WHITE_SPACE:
        return False
    return not is_normalized or STARTS_ANEW.match(text, start) is not None


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
