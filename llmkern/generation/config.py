# SPDX-License-Identifier: Apache-2.0
"""How to choose the next token, under the names of Hugging Face's GenerationConfig."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmkern.ops._checks import plain_number
from llmkern.ops._sampling_arguments import SETTINGS, checked_setting
from llmkern.text.tokenizer import UNKNOWN, Unknown


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """The settings of ``generate``. Names and meanings are those of Hugging Face; the defaults switch every filter off.

    Args:
        max_new_tokens: how many tokens to write at most, >= 1.
        min_new_tokens: the end token is forbidden before so many.
        do_sample: draw from the distribution; False takes the most probable token.
        temperature: divides the logits, >= 0; 0 takes the most probable token.
        top_k: draw from the k most probable tokens; 0 is off.
        top_p: draw from the smallest set with at least this probability, in (0, 1]; 1 is off.
        min_p: drop tokens less probable than this fraction of the most probable one, in [0, 1]; 0 is off.
        typical_p: locally typical sampling (Meister et al., 2022), in (0, 1]; 1 is off.
        repetition_penalty: > 0; above 1 makes tokens of the prompt and the text so far less likely
            (Keskar et al., 2019).
        presence_penalty: taken from the logit of every token already written.
        frequency_penalty: taken from the logit once for each time the token was written.
        no_repeat_ngram_size: no sequence of so many tokens occurs twice; 0 is off.
        num_return_sequences: texts for each prompt, >= 1.
        bos_token_id: what an empty prompt starts with; default: the tokenizer's start_id.
        eos_token_id: the token, or tokens, that end a text; None never ends early.
        pad_token_id: fills up shorter rows of a returned tensor; default: the tokenizer's, else -1.
        bad_words_ids: token sequences that must not occur.
        suppress_tokens: tokens that must not occur.
        stop_strings: texts that end the generation once a token completes one; they stay in the text. They may begin
            in the prompt.
        unknown: what becomes of characters or words of a text prompt that the model does not know: "error" refuses
            them, "drop" leaves them out, "replace" makes them <unk>. None replaces words and refuses characters.
        seed: one for all prompts, or one for each. Equal seeds give equal texts, whatever else is in the batch;
            sequence j of a prompt uses seed + j. None draws seeds from torch's generator.

    Raises:
        TypeError: a setting of the sampler is no number; names it.
        ValueError: a value is out of range; names it.
    """

    max_new_tokens: int = 100
    min_new_tokens: int = 0
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    num_return_sequences: int = 1
    bos_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    bad_words_ids: Sequence[Sequence[int]] = ()
    suppress_tokens: Sequence[int] = ()
    stop_strings: str | Sequence[str] = ()
    unknown: Unknown | None = None
    seed: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in (*_INTEGERS, "bos_token_id", "eos_token_id", "pad_token_id", "seed"):
            object.__setattr__(self, name, plain_number(getattr(self, name)))
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise _error(name, f"an int >= {least}", value)
        for name in SETTINGS:
            value = checked_setting("generate", name, getattr(self, name))
            object.__setattr__(self, name, value)
        if self.min_new_tokens > self.max_new_tokens:
            raise _error(
                "min_new_tokens",
                f"at most max_new_tokens = {self.max_new_tokens}",
                self.min_new_tokens,
            )
        if any(len(word) == 0 for word in self.bad_words_ids):
            raise _error("bad_words_ids", "sequences of at least one token", self.bad_words_ids)
        if self.unknown not in (None, *UNKNOWN):
            raise _error("unknown", f"one of {UNKNOWN} or None", self.unknown)
        if "" in self.stop_texts:
            raise _error("stop_strings", "texts that are not empty", self.stop_strings)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """eos_token_id as a tuple."""
        if self.eos_token_id is None:
            return ()
        return (
            (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)
        )

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """stop_strings as a tuple."""
        return (
            (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings)
        )

    @property
    def needs_history(self) -> bool:
        """Whether the choice depends on which tokens came before, beyond the model's state."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises a ValueError for a token id outside [0, vocab_size)."""
        named = {
            "bos_token_id": () if self.bos_token_id is None else (self.bos_token_id,),
            "eos_token_id": self.end_tokens,
            "suppress_tokens": self.suppress_tokens,
            "bad_words_ids": [token for word in self.bad_words_ids for token in word],
        }
        for name, tokens in named.items():
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise _error(name, f"tokens in [0, V) = [0, {vocab_size})", token)


_INTEGERS = {
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
}


def _error(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"llmkern.generate: expected {name} to be {expected}, got {got!r}")
