# SPDX-License-Identifier: Apache-2.0
"""Tokens to text, as they come: the one decoder, for whole sequences and for streaming."""

import codecs
from collections.abc import Iterable
from typing import Any, Protocol


class TokenForms(Protocol):
    """What the decoder asks of a tokenizer."""

    @property
    def kind(self) -> str:
        """``"char"``, ``"word"``, ``"jieba"`` or ``"bpe"``."""

    def visible_forms(self, ids: Iterable[int]) -> list[Any]:
        """What the ids add to a text, str or (``bpe``) bytes, without those that add nothing."""


class StreamDecoder:
    """Turns token ids into text while they are being generated.

    Every ``put`` returns the text that has become complete. A byte-level token may end in the
    middle of a character; its bytes are held back until the rest arrives. What the calls return,
    joined, is what ``Tokenizer.decode`` returns for all ids at once, however they are divided.

    Words are separated as in ``Tokenizer.decode``, so to continue a prompt put the prompt's ids
    first and drop the text: the first new word then brings its space.

    Args:
        tokenizer: What the ids belong to: a ``Tokenizer``.

    Example:
        >>> tokenizer = Tokenizer.train("fair weather", kind="word")
        >>> decoder = StreamDecoder(tokenizer)
        >>> [decoder.put([id]) for id in tokenizer.encode("fair fair weather")]
        ['fair', ' fair', ' weather']
        >>> decoder.end()
        ''
    """

    def __init__(self, tokenizer: TokenForms) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._after_word = False

    def put(self, ids: Iterable[int]) -> str:
        """Take the next ids.

        Args:
            ids: Token ids: ints, or an integer tensor of shape [T].

        Returns:
            The text they complete, possibly empty.

        Raises:
            IndexError: An id is not in the vocabulary; names its position in ``ids`` and its value.
            TypeError: ``ids`` holds something else than integers.
        """
        visible = self._tokenizer.visible_forms(ids)
        if self._tokenizer.kind == "bpe":
            return self._utf8.decode(b"".join(visible))
        if self._tokenizer.kind == "word":
            visible = [self._spaced(word) for word in visible]
        return "".join(visible)

    def end(self) -> str:
        """Finish the sequence; the decoder is then ready for the next one.

        Returns:
            U+FFFD if the last bytes are part of a character that never came, else nothing.
        """
        self._after_word = False
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text

    def _spaced(self, word: str) -> str:
        space = " " if self._after_word and word != "\n" else ""
        self._after_word = word != "\n"
        return space + word
