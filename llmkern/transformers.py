# SPDX-License-Identifier: Apache-2.0
"""llmkern's sampling within ``generate()`` of Hugging Face's transformers.

    sampler = llmkern.transformers.LlmkernSampler(seed=1, temperature=0.8, top_p=0.95)
    model.generate(
        **inputs, do_sample=True, logits_processor=[sampler], **llmkern.transformers.SWITCHED_OFF
    )

Needs ``pip install 'llmkern[transformers]'``.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmkern import ops
from llmkern.nn import Sampler

try:
    from transformers import GenerationConfig, LogitsProcessor
except ImportError as error:
    raise ImportError(
        f"llmkern.transformers: expected the package 'transformers', got '{error}'; "
        "run: pip install 'llmkern[transformers]'"
    ) from error

SWITCHED_OFF: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
}
"""Arguments of generate() that keep it from applying what the processors here apply already: it also does what the
model's own generation_config asks for, and by default top_k=50."""

# What generate() takes where neither the caller nor the model says anything, unlike llmkern.
_DEFAULTS = {"top_k": 50}
# Values that ask for nothing.
_NOTHING = (None, False, 0, 0.0)
_Processor = TypeVar("_Processor", bound="LlmkernLogitsProcessor")


class LlmkernLogitsProcessor(LogitsProcessor):
    """The processors and warpers of the same names in one call of :func:`llmkern.ops.filter_logits`.

    In the order of transformers: repetition penalty, frequency and presence penalty, temperature, top_k, top_p, min_p,
    typical_p. The kept tokens are those of transformers computed without rounding errors, with one difference:
    where the k-th token has equals, top_k keeps the ones with the lowest ids, never more than k.

    Args:
        temperature, top_k, top_p, min_p, typical_p, repetition_penalty, presence_penalty, frequency_penalty: as in
            :func:`llmkern.ops.sample`; temperature 0 leaves the most likely token alone.
        attention_mask: [B, L], the one that generate() is given beside input_ids [B, L] of a decoder-only model. It
            tells the prompt from what is written, and ids from padding, which then neither is penalised nor counts as a
            position. Without it, all ids are a prompt's. One row serves several rows for num_return_sequences.

    Raises:
        TypeError, ValueError: a setting is no number or out of its range; a presence or frequency penalty comes
            without attention_mask; in a call, attention_mask does not fit input_ids.

    Example:
        >>> processor = llmkern.transformers.LlmkernLogitsProcessor(top_k=2, temperature=0.5)
        >>> processor(torch.tensor([[0]]), torch.tensor([[1.0, 3.0, 2.0]]))
        tensor([[-inf, 6., 4.]])
    """

    supports_continuous_batching = False
    # Of a generation_config: what would have to come between the steps that are one call here.
    _refused: tuple[str, ...] = ("top_h",)

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        typical_p: float = 1.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        attention_mask: Tensor | None = None,
    ) -> None:
        self.settings: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "typical_p": typical_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
        }
        Sampler(**self.settings)  # checks them
        counts = bool(presence_penalty or frequency_penalty)
        if counts and attention_mask is None:
            raise ValueError(
                "llmkern.transformers: expected attention_mask beside presence_penalty and frequency_penalty, "
                "which are for ids after the prompt, got None"
            )
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"llmkern.transformers: expected attention_mask of shape [B, L], got {list(attention_mask.shape)}"
            )
        self.attention_mask = attention_mask
        self.penalises = counts or repetition_penalty != 1

    @classmethod
    def from_generation_config(
        cls: type[_Processor], generation_config: GenerationConfig, **options: Any
    ) -> _Processor:
        """With the settings that generate() would take from a config.

        What else the config asks for stays transformers' business: generate() does it before (no_repeat_ngram_size,
        bad_words_ids, min_length, ...). do_sample is not looked at.

        Args:
            generation_config: a GenerationConfig, such as ``model.generation_config``.
            **options: other arguments of the class; they win over generation_config.

        Raises:
            ValueError: it asks for beam search, or for steps that would come in between or too late: top_h, and for
                LlmkernSampler epsilon_cutoff, eta_cutoff and watermarking_config.

        Example:
            >>> config = transformers.GenerationConfig(temperature=0.7, top_p=0.9)
            >>> sampler = llmkern.transformers.LlmkernSampler.from_generation_config(config, seed=1)
            >>> model.generate(
            ...     **inputs, do_sample=True, logits_processor=[sampler], **llmkern.transformers.SWITCHED_OFF
            ... )
        """
        beams = getattr(generation_config, "num_beams", None) or 1
        if beams > 1:
            raise ValueError(f"llmkern.transformers: expected num_beams 1, got {beams}")
        for name in cls._refused:
            value = getattr(generation_config, name, None)
            if value not in _NOTHING:
                raise ValueError(
                    f"llmkern.transformers: expected a generation_config without {name}, "
                    f"which {cls.__name__} does not have, got {value}"
                )
        settings = {}
        for name in SWITCHED_OFF:
            value = getattr(generation_config, name, None)
            if value is None:
                value = _DEFAULTS.get(name)
            if value is not None:
                settings[name] = value
        return cls(**{**settings, **options})

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids int64 [B, T] and scores [B, V], to scores with -inf at every token that is not kept."""
        mask = self._mask(input_ids)
        filtered = ops.filter_logits(scores, **self.settings, **self._history(input_ids, mask))
        return filtered.to(scores.dtype)

    def _mask(self, input_ids: Tensor) -> Tensor | None:
        """attention_mask as bool, a row for each of input_ids."""
        mask = self.attention_mask
        if mask is None:
            return None
        (B, T), (rows, L) = input_ids.shape, mask.shape
        if rows == 0 or B % rows or L > T:
            raise ValueError(
                f"llmkern.transformers: expected the attention_mask of the prompt of input_ids {[B, T]}, "
                f"got shape {[rows, L]}"
            )
        return mask.to(input_ids.device).bool().repeat_interleave(B // rows, dim=0)

    def _history(self, input_ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
        if not self.penalises:
            return {}
        if mask is None:
            return {"prompt_ids": input_ids}
        L = mask.shape[1]
        prompt = input_ids[:, :L].masked_fill(~mask, -1)
        return {"prompt_ids": prompt, "output_ids": input_ids[:, L:]}


class LlmkernSampler(LlmkernLogitsProcessor):
    """:func:`llmkern.ops.sample` as the last of generate()'s processors: it leaves one token a row, the one it drew.

    Whatever comes afterwards can but take that token: with do_sample=True, in whatever state torch's generator is, and
    with do_sample=False, which saves generate() a softmax and a draw. A row's random numbers depend on its seed and on
    its number of ids alone: its text does not depend on the rows beside it, as far as the model's logits do not.

    Args:
        seed: an int, or one for each prompt as a sequence or int64 [B]. Rows of one prompt (num_return_sequences) have
            seed, seed + 1, ... as in :meth:`llmkern.models.LanguageModel.generate`; so have all rows of a batch under
            an int. None draws a seed for every step from torch's generator.
        attention_mask: as in LlmkernLogitsProcessor. Give it wherever prompts are padded: without it, padding counts as
            ids, and a row's text depends on the longest prompt.
        **settings: those of :class:`LlmkernLogitsProcessor`.

    Raises:
        TypeError, ValueError: as LlmkernLogitsProcessor, or a seed is no integer; in a call, the number of seeds does
            not fit the rows, or a row has nothing to draw from (NaN, or nothing above -inf).

    Example:
        >>> sampler = llmkern.transformers.LlmkernSampler(seed=1, temperature=0.8, top_p=0.95)
        >>> model.generate(
        ...     **inputs, do_sample=True, logits_processor=[sampler], **llmkern.transformers.SWITCHED_OFF
        ... )
    """

    # What would come after the draw, too late.
    _refused = ("top_h", "epsilon_cutoff", "eta_cutoff", "watermarking_config")

    def __init__(
        self,
        *,
        seed: int | Sequence[int] | Tensor | None,
        attention_mask: Tensor | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(attention_mask=attention_mask, **settings)
        self.seeds = None if seed is None else torch.as_tensor(seed).reshape(-1)
        if self.seeds is not None and (self.seeds.dtype != torch.int64 or not len(self.seeds)):
            raise TypeError(
                f"llmkern.transformers: expected seed to be an int or one for each prompt, got {seed}"
            )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids int64 [B, T] and scores [B, V], to 0 at the token drawn and -inf elsewhere."""
        mask = self._mask(input_ids)
        drawn = ops.sample(
            scores,
            **self.settings,
            **self._history(input_ids, mask),
            **self._draw(input_ids, mask),
            return_logprob=False,
        )
        if not drawn.valid.all():  # or generate() would go on with token 0
            row = int((~drawn.valid).nonzero()[0])
            raise ValueError(
                f"llmkern.transformers: expected a token with a probability in row {row}, "
                "got NaN logits or all of them -inf"
            )
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn.token[:, None], 0.0)

    def _draw(self, input_ids: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """Seeds [B], and as positions the numbers of ids [B], padding not counted."""
        if self.seeds is None:
            return {}
        (B, T), device = input_ids.shape, input_ids.device
        prompts = len(self.seeds)
        if B % prompts:
            raise ValueError(
                f"llmkern.transformers: expected one seed, or one for each prompt of B = {B} rows, got {prompts}"
            )
        copies = torch.arange(B // prompts, device=device)
        seeds = (self.seeds.to(device)[:, None] + copies).flatten()
        if mask is None:
            return {"seed": seeds, "position": torch.full_like(seeds, T)}
        return {"seed": seeds, "position": mask.sum(1) + (T - mask.shape[1])}
