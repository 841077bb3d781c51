# SPDX-License-Identifier: Apache-2.0
"""From logits to a token in one call: penalties, temperature, filters, the draw, logprobs, rank and entropy.

Probabilities are integers (round(2^40 * exp(z - max z))), so their sums are exact: a row's token is the same on every
instruction set, on any number of threads, on CPU and GPU, and whatever rows are beside it.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from llmkern.ops import _checks
from llmkern.ops import _sampling_arguments as arguments
from llmkern.ops._sampling_arguments import Ids, Setting


class SampleOutput(NamedTuple):
    """What :func:`sample` returns; every field is [B], or 0-dimensional for logits [V]."""

    token: Tensor
    """int64; -1 in an invalid row."""
    logprob: Tensor
    """float32: the token's log-probability before the filters."""
    filtered_logprob: Tensor
    """float32: the same among the kept tokens."""
    rank: Tensor
    """int64: how many tokens are more likely, or as likely with a lower id."""
    num_kept: Tensor
    """int64: how many tokens passed the filters."""
    entropy: Tensor
    """float32, in nats, before the filters."""
    valid: Tensor
    """bool: false where the row has a NaN, or no token above -inf."""
    top_ids: Tensor
    """int64 [B, num_logprobs]: the most likely tokens, the first n of the order; -1 beyond the last allowed one."""
    top_logprobs: Tensor
    """float32 [B, num_logprobs]: their log-probabilities before the filters."""


def sample(
    logits: Tensor,
    *,
    temperature: Setting = 1.0,
    top_k: int | Tensor = 0,
    top_p: Setting = 1.0,
    min_p: Setting = 0.0,
    typical_p: Setting = 1.0,
    repetition_penalty: Setting = 1.0,
    presence_penalty: Setting = 0.0,
    frequency_penalty: Setting = 0.0,
    prompt_ids: Ids | None = None,
    output_ids: Ids | None = None,
    logit_bias: Tensor | Mapping[int, float] | None = None,
    allowed: Tensor | None = None,
    seed: int | Tensor | None = None,
    position: int | Tensor | None = None,
    generator: Generator | None = None,
    num_logprobs: int = 0,
) -> SampleOutput:
    """Draws one token a row.

    In this order: bias, mask, repetition penalty, frequency and presence penalty, temperature, top_k, top_p, min_p,
    typical_p, draw. Equal logits are ordered by id, lowest first, so every filter keeps a defined set. The rules are
    spelled out in :class:`llmkern.nn.Sampler`. No gradient flows through a draw.

    Args:
        logits: [B, V] or [V], float32, float64, bfloat16 or float16 (computed in float32), 1 <= V < 2^23.
        temperature: divides the logits; 0 takes the most likely token. Every setting is a number or a tensor [B].
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens whose probability is at least p (Holtzman et al., 2020); 1 keeps all.
        min_p: keep tokens at least min_p times as likely as the most likely one (Nguyen et al., 2024); 0 keeps all.
        typical_p: keep the tokens whose information is closest to the entropy, up to probability typical_p (Meister et
            al., 2022); 1 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt_ids or output_ids
            (Keskar et al., 2019).
        presence_penalty: is subtracted from the logits of tokens in output_ids.
        frequency_penalty: is subtracted from them as many times as they occur there.
        prompt_ids, output_ids: int64 or int32 [B, L], padded with any id outside [0, V) such as -1; or lists of ids.
        logit_bias: is added to the logits: [V], [B, V], or {id: bias}.
        allowed: bool [V] or [B, V]; tokens that are False are never drawn.
        seed: an int for all rows or int64 [B]; None draws one from torch's generator.
        position: the index of the draw under its seed: int64 [B], or an int. A (seed, position) pair always gives the
            same random number. By default the row's index when one seed serves all rows, and 0 when every row has its
            own. For generation, give every row a seed, and as position the number of tokens it has.
        generator: what seed=None draws from; torch's default one otherwise.
        num_logprobs: how many of the most likely tokens to report.

    Returns:
        A SampleOutput. Invalid rows (NaN, nothing above -inf) have token -1, valid False and NaN logprobs.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape or device does not fit, or a setting is out of range; the message names it, the row and
            the value.
        IndexError: an id in logit_bias is not in [0, V).

    Example:
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
        >>> llmkern.ops.sample(logits, temperature=0).token.tolist()
        [2, 0]
        >>> drawn = llmkern.ops.sample(logits, top_p=0.9, seed=torch.tensor([7, 8]), position=5)
    """
    rows = _rows(logits)
    B, V = rows.shape
    device = rows.device
    settings = (
        temperature,
        top_k,
        top_p,
        min_p,
        typical_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
    )
    if not 0 <= num_logprobs <= V:
        raise ValueError(
            f"llmkern.sample: expected num_logprobs in [0, V = {V}], got {num_logprobs}"
        )
    batched = logits.dim() == 2
    seed_per_row = isinstance(seed, Tensor) and seed.dim() == 1
    out = torch.ops.llmkern.sample.default(
        rows,
        arguments.bias(logit_bias, B, V, device),
        arguments.mask(allowed, B, V, device),
        arguments.ids("prompt_ids", prompt_ids, B, batched, device),
        arguments.ids("output_ids", output_ids, B, batched, device),
        arguments.settings(settings, rows),
        arguments.seeds(seed, generator, B, device),
        arguments.positions(position, seed_per_row, B, device),
        num_logprobs,
    )
    if not batched:
        out = [tensor.squeeze(0) for tensor in out]
    token, logprob, filtered_logprob, rank, num_kept, entropy, top_ids, top_logprobs = out
    valid = token >= 0
    return SampleOutput(
        token, logprob, filtered_logprob, rank, num_kept, entropy, valid, top_ids, top_logprobs
    )


def _rows(logits: Tensor) -> Tensor:
    """[B, V] float32, without a gradient."""
    _checks.check_tensor("sample", "logits", logits)
    _checks.check_dtype("sample", "logits", logits, arguments.LOGITS_DTYPES)
    if logits.dim() not in (1, 2):
        raise ValueError(
            f"llmkern.sample: expected logits of shape [B, V] or [V], got {list(logits.shape)}"
        )
    if not 1 <= logits.shape[-1] < 2**23:
        raise ValueError(
            f"llmkern.sample: expected logits of 1 to {2**23 - 1} tokens, got shape {list(logits.shape)}"
        )
    rows = logits.detach()
    if rows.dtype != torch.float32:
        rows = rows.float()
    return rows if rows.dim() == 2 else rows.unsqueeze(0)


@torch.library.register_fake("llmkern::sample")
def _sample_fake(
    logits: Tensor,
    bias: Tensor | None,
    allowed: Tensor | None,
    prompt_ids: Tensor | None,
    output_ids: Tensor | None,
    settings: Tensor,
    seeds: Tensor,
    positions: Tensor,
    num_logprobs: int,
) -> tuple[Tensor, ...]:
    B = logits.shape[0]

    def ids(*shape: int) -> Tensor:
        return logits.new_empty(shape, dtype=torch.int64)

    def values(*shape: int) -> Tensor:
        return logits.new_empty(shape, dtype=torch.float32)

    n = num_logprobs
    return ids(B), values(B), values(B), ids(B), ids(B), values(B), ids(B, n), values(B, n)
