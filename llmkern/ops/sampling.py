# SPDX-License-Identifier: Apache-2.0
"""From logits to a token in one call: penalties, temperature, filters, the draw, logprobs, rank and entropy.

Probabilities are integers (round(2^40 * exp((y - max y) / temperature))), so their sums are exact: a row's token is the
same on every instruction set, on any number of threads, on CPU and GPU, and whatever rows are beside it.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from llmkern.ops import _checks, _seed
from llmkern.ops import _sampling_arguments as arguments
from llmkern.ops._sampling_arguments import Bias, Ids, Setting


class SampleOutput(NamedTuple):
    """What :func:`sample` returns; every field is [B], or 0-dimensional for logits [V]."""

    token: Tensor
    """int64; -1 in an invalid row."""
    valid: Tensor
    """bool: false where the row has a NaN, or no token above -inf."""
    num_kept: Tensor
    """int64: how many tokens passed the filters."""
    filtered_logprob: Tensor
    """float32: the token's log-probability among the kept tokens."""
    logprob: Tensor | None
    """float32: the same before the filters; None unless ``return_logprob``."""
    entropy: Tensor | None
    """float32, in nats, before the filters; None unless ``return_entropy``."""
    rank: Tensor | None
    """int64: how many tokens are more likely, or as likely with a lower id; None unless ``return_rank``."""
    top_ids: Tensor | None
    """int64 [B, num_logprobs]: the most likely tokens, the first n of the order; -1 beyond the last allowed one. None
    where num_logprobs is 0."""
    top_logprobs: Tensor | None
    """float32 [B, num_logprobs]: their log-probabilities before the filters, or None."""


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
    """Draws one token a row.

    In this order: bias, mask, repetition penalty, frequency and presence penalty, temperature, top_k, top_p, min_p,
    typical_p, draw. Equal logits are ordered by id, lowest first, so every filter keeps a defined set. The rules are
    spelled out in :class:`llmkern.nn.Sampler`. No gradient flows through a draw.

    Args:
        logits: [B, V] or [V], float32, bfloat16 or float16, read as they are stored whatever the distance between rows;
            or float64, which is rounded to float32. Computed in float32, 1 <= V < 2^23.
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
        logit_bias: is added to the logits: [V], [B, V], {id: bias} for all rows, or a list of B such mappings.
        allowed: bool [V] or [B, V]; tokens that are False are never drawn. Or packed, int32 [ceil(V / 32)] or
            [B, ceil(V / 32)]: token v is bit v % 32 of word v // 32, as grammar engines give it.
        seed: an int for all rows or int64 [B]; None draws one from torch's generator.
        position: the index of the draw under its seed: int64 [B], or an int. A (seed, position) pair always gives the
            same random number. By default the row's index when one seed serves all rows, and 0 when every row has its
            own. For generation, give every row a seed, and as position the number of tokens it has.
        generator: what seed=None draws from; torch's default one otherwise.
        num_logprobs: how many of the most likely tokens to report.
        return_logprob: whether to report the log-probability before the filters. Without it, and without the next and
            num_logprobs, top_k, min_p and greedy choices need no exponential but those of the kept tokens.
        return_entropy, return_rank: whether to report these; each is another pass over the row or half of one.

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
    num_logprobs = _checks.plain_number(num_logprobs)
    if not 0 <= num_logprobs <= V:
        raise ValueError(
            f"llmkern.sample: expected num_logprobs in [0, V = {V}], got {num_logprobs}"
        )
    batched = logits.dim() == 2
    device = rows.device
    seed_per_row = isinstance(seed, Tensor) and seed.dim() == 1
    out = torch.ops.llmkern.sample.default(
        rows,
        *arguments.bias(logit_bias, B, V, device),
        arguments.mask(allowed, B, V, device),
        arguments.ids("prompt_ids", prompt_ids, B, batched, device),
        arguments.ids("output_ids", output_ids, B, batched, device),
        arguments.settings(settings, rows),
        _seed.seeds("sample", "logits", seed, generator, B, device),
        _seed.positions("sample", "logits", position, seed_per_row, B, device),
        num_logprobs,
        return_logprob,
        return_entropy,
        return_rank,
        False,
    )
    if not batched:
        out = [tensor.squeeze(0) for tensor in out]
    token, valid, num_kept, filtered_logprob, *rest = out
    asked = iter(rest)
    return SampleOutput(
        token,
        valid,
        num_kept,
        filtered_logprob,
        next(asked) if return_logprob else None,
        next(asked) if return_entropy else None,
        next(asked) if return_rank else None,
        next(asked) if num_logprobs else None,
        next(asked) if num_logprobs else None,
    )


def filter_logits(
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
    logit_bias: Bias | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """What :func:`sample` draws from: the logits after all of its steps but the draw.

    Args:
        logits and the others: as in :func:`sample`.

    Returns:
        float32 [B, V] or [V]: (adjusted logit) / temperature of the tokens that passed the filters, -inf elsewhere. A
        row that :func:`sample` would call invalid is -inf throughout.

    Raises:
        TypeError, ValueError, IndexError: as :func:`sample`.

    Example:
        >>> llmkern.ops.filter_logits(torch.tensor([1.0, 3.0, 2.0]), top_k=2, temperature=0.5)
        tensor([-inf, 6., 4.])
    """
    rows = _rows(logits)
    B, V = rows.shape
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
    batched = logits.dim() == 2
    device = rows.device
    processed = torch.ops.llmkern.sample.default(
        rows,
        *arguments.bias(logit_bias, B, V, device),
        arguments.mask(allowed, B, V, device),
        arguments.ids("prompt_ids", prompt_ids, B, batched, device),
        arguments.ids("output_ids", output_ids, B, batched, device),
        arguments.settings(settings, rows),
        torch.zeros(1, dtype=torch.int64, device=device),  # for a draw that nobody looks at
        None,
        0,
        False,
        False,
        False,
        True,
    )[-1]
    return processed if batched else processed.squeeze(0)


def _rows(logits: Tensor) -> Tensor:
    """[B, V] in a dtype that the kernel reads, without a gradient."""
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
    rows = _checks.constant("sample", "logits", logits)
    if rows.dtype == torch.float64:
        rows = rows.float()
    return rows if rows.dim() == 2 else rows.unsqueeze(0)


@torch.library.register_fake("llmkern::sample")
def _sample_fake(
    logits: Tensor,
    bias: Tensor | None,
    bias_ids: Tensor | None,
    bias_values: Tensor | None,
    allowed: Tensor | None,
    prompt_ids: Tensor | None,
    output_ids: Tensor | None,
    settings: Tensor,
    seeds: Tensor,
    positions: Tensor | None,
    num_logprobs: int,
    return_logprob: bool,
    return_entropy: bool,
    return_rank: bool,
    return_processed: bool,
) -> list[Tensor]:
    B, V = logits.shape
    n = num_logprobs

    def ids(*shape: int) -> Tensor:
        return logits.new_empty(shape, dtype=torch.int64)

    def values(*shape: int) -> Tensor:
        return logits.new_empty(shape, dtype=torch.float32)

    out = [ids(B), logits.new_empty((B,), dtype=torch.bool), ids(B), values(B)]
    if return_logprob:
        out.append(values(B))
    if return_entropy:
        out.append(values(B))
    if return_rank:
        out.append(ids(B))
    if num_logprobs:
        out += [ids(B, n), values(B, n)]
    if return_processed:
        out.append(values(B, V))
    return out
