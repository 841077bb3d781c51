# SPDX-License-Identifier: Apache-2.0
"""Which tokens may not come next, and when a text is at its end."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmkern.generation.config import GenerationConfig
from llmkern.text import StreamDecoder, Tokenizer


class Constraints:
    """The rules of a GenerationConfig that look at tokens instead of probabilities."""

    def __init__(self, config: GenerationConfig, tokenizer: Tokenizer | None) -> None:
        if config.stop_texts and tokenizer is None:
            raise ValueError(
                "llmkern.generate: stop_strings need a model with a tokenizer, got none"
            )
        self._config = config
        self._tokenizer = tokenizer
        single = [word[0] for word in config.bad_words_ids if len(word) == 1]
        self._never = [*config.suppress_tokens, *single]
        self._words = [list(word) for word in config.bad_words_ids if len(word) > 1]
        self._looks_back = bool(self._words) or config.no_repeat_ngram_size > 0
        self._longest_stop = max(map(len, config.stop_texts), default=0)

    def mask_(self, logits: Tensor, rows: Sequence[tuple[list[int], list[int]]]) -> None:
        """Sets what is forbidden to -inf, in place.

        Args:
            logits: [B, V].
            rows: for each row the tokens of its prompt and those written so far.
        """
        logits[:, self._never] = -torch.inf
        for row, (prompt, output) in enumerate(rows):
            banned = self._completing(prompt + output) if self._looks_back else []
            if len(output) < self._config.min_new_tokens:
                banned += self._config.end_tokens
            if banned:
                logits[row, banned] = -torch.inf

    def finish_reason(self, prompt: list[int], output: list[int]) -> str | None:
        """ "eos", "stop" or "length" if the text is at its end, else None."""
        if output[-1] in self._config.end_tokens:
            return "eos"
        if self._config.stop_texts and self._completes_a_stop_text(prompt + output):
            return "stop"
        return "length" if len(output) >= self._config.max_new_tokens else None

    def _completes_a_stop_text(self, tokens: list[int]) -> bool:
        """Whether a stop text ends within the last token. As with transformers' criteria it may begin in the prompt."""
        count = 4 * self._longest_stop  # byte-level tokens a character, at most
        while True:
            decoder = StreamDecoder(self._tokenizer)  # type: ignore[arg-type]
            before = decoder.put(tokens[-count - 1 : -1])
            if len(before) >= self._longest_stop or count >= len(tokens):
                break
            count *= 2  # there are tokens without text
        text = before + decoder.put(tokens[-1:])
        return any(
            stop in text[max(0, len(before) - len(stop) + 1) :] for stop in self._config.stop_texts
        )

    def _completing(self, tokens: list[int]) -> list[int]:
        """The tokens that would complete a forbidden sequence."""
        banned = [word[-1] for word in self._words if tokens[-len(word) + 1 :] == word[:-1]]
        size = self._config.no_repeat_ngram_size
        if size and len(tokens) >= size:
            tail = tokens[len(tokens) - size + 1 :]
            starts = range(len(tokens) - size + 1)
            banned += [tokens[i + size - 1] for i in starts if tokens[i : i + size - 1] == tail]
        return banned
