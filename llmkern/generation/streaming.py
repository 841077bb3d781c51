# SPDX-License-Identifier: Apache-2.0
"""Showing text while it is being generated."""

import sys
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from llmkern.text import StreamDecoder, Tokenizer


class Streamer(Protocol):
    """What generate() feeds: the interface of transformers' BaseStreamer, so its streamers work here too."""

    def put(self, value: Tensor) -> None:
        """Takes token ids: first the prompt [1, T], then each new token [1]."""

    def end(self) -> None:
        """Called once after the last token."""


class TextStreamer:
    """Writes the text as its tokens arrive, a complete character at a time.

    Args:
        tokenizer: turns ids into text.
        skip_prompt: write the continuation alone.
        write: called with every new piece of text; default: write to standard output at once.

    Example:
        >>> model.generate("The ", streamer=TextStreamer(model.tokenizer), max_new_tokens=50)
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_prompt: bool = False,
        write: Callable[[str], object] | None = None,
    ) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._skip_prompt = skip_prompt
        self._write = write or _write_to_stdout
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        piece = self._decoder.put(value.reshape(-1))
        if piece and not (self._is_prompt and self._skip_prompt):
            self._write(piece)
        self._is_prompt = False

    def end(self) -> None:
        piece = self._decoder.end()
        if piece:
            self._write(piece)
        self._is_prompt = True


def _write_to_stdout(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
