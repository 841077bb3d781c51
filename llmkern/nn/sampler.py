# SPDX-License-Identifier: Apache-2.0
"""A module that holds the settings of llmkern.ops.sample."""

from torch import Generator, Tensor, nn

from llmkern import ops
from llmkern.ops._sampling_arguments import SETTINGS, Bias, Ids, checked_setting
from llmkern.ops.sampling import SampleOutput


class Sampler(nn.Module):
    """Draws one token a row from logits, with the settings it was made with. It has no parameters.

    The steps, in order, on logits [B, V] taken to float32. "The order" of the tokens is by logit after bias, mask and
    penalties, descending; equal ones by id, ascending; the temperature has no part in it. Probabilities are exact
    integers, so "at least p" is exact too.

    ==================  =============================================================================================
    step                rule; what happens with ties and at the edges
    ==================  =============================================================================================
    logit_bias          added to the logits
    allowed             tokens that are False become -inf: no later step brings them back, none is ever drawn
    repetition_penalty  logits of tokens seen in prompt_ids or output_ids: positive ones divided by it, others
                        multiplied, once however often they occur; 1 is off
    frequency_penalty   subtracted, times the number of occurrences in output_ids; 0 is off
    presence_penalty    subtracted once from tokens in output_ids; 0 is off. What is +inf now counts as the largest
                        float32
    temperature         divides the logits; 0 (and below 2^-100, 7.9e-31) takes the first token of the order: argmax,
                        lowest id of equals, whatever the seed
    top_k               keeps the first k of the order: never more, also when the k-th has equals; 0 or >= V is off
    top_p               keeps, of those, the shortest start of the order with probability >= p, the token that reaches
                        p included; at least one; 1 is off
    min_p               keeps, of those, tokens with probability >= min_p * that of the most likely; 0 is off,
                        1 keeps the most likely and its equals
    typical_p           orders what is left by |information - entropy| ascending, then id, and keeps the shortest
                        start with probability >= typical_p; at least one; 1 is off
    draw                by inversion along ascending ids, with the 64-bit random number of (seed, position)
    ==================  =============================================================================================

    A token 28 nats below the most likely one has probability 0 (less than 2^-41 of it). A row with a NaN, or with no
    token above -inf, is invalid: token -1, valid False, logprobs and entropy NaN, rank and num_kept 0, top_ids -1. A
    NaN at a token that is not allowed does no harm. Fields that were not asked for are None. A row's result depends on
    its logits, settings, seed and position alone: not on what is asked for, the other rows, the number of threads, the
    instruction set or the device.

    Args:
        temperature, top_k, top_p, min_p, typical_p, repetition_penalty, presence_penalty, frequency_penalty: numbers,
            as in :func:`llmkern.ops.sample`.

    Raises:
        TypeError, ValueError: a setting is no number, or out of its range.

    Example:
        >>> sampler = llmkern.nn.Sampler(temperature=0.8, top_p=0.95)
        >>> sampler(torch.randn(4, 1000), seed=1).token.shape
        torch.Size([4])
    """

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
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.min_p = min_p
        self.typical_p = typical_p
        self.repetition_penalty = repetition_penalty
        self.presence_penalty = presence_penalty
        self.frequency_penalty = frequency_penalty
        for name in SETTINGS:
            setattr(self, name, checked_setting("sample", name, getattr(self, name)))

    def forward(
        self,
        logits: Tensor,
        *,
        prompt_ids: Ids | None = None,
        output_ids: Ids | None = None,
        logit_bias: Bias | None = None,
        allowed: Tensor | None = None,
        seed: int | Tensor | None = None,
        position: int | Tensor | None = None,
        generator: Generator | None = None,
        num_logprobs: int = 0,
        return_logprob: bool = True,
        return_entropy: bool = False,
        return_rank: bool = False,
    ) -> SampleOutput:
        """``llmkern.ops.sample`` with the module's settings."""
        return ops.sample(
            logits,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            prompt_ids=prompt_ids,
            output_ids=output_ids,
            logit_bias=logit_bias,
            allowed=allowed,
            seed=seed,
            position=position,
            generator=generator,
            num_logprobs=num_logprobs,
            return_logprob=return_logprob,
            return_entropy=return_entropy,
            return_rank=return_rank,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in SETTINGS)
