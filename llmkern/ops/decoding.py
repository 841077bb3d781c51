# SPDX-License-Identifier: Apache-2.0
"""Decoding beyond one token a row: a step of beam search, the verification of drafted tokens, many draws from a row.

Like :func:`llmkern.ops.sample`, all three are exact: probabilities are integers, and a row's result is the same on
every instruction set, on any number of threads and whatever rows are beside it. They run on the CPU.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from llmkern.ops import _checks, _seed

_MAX_VOCABULARY = 2**23
_MAX_CATEGORIES = 2**31
_MAX_DRAWS = 2**32


class BeamCandidates(NamedTuple):
    """What :func:`beam_search_step` returns: the best continuations, best first; every field is [B, n]."""

    score: Tensor
    """float32: the cumulative log-probability; -inf beyond the last continuation, NaN in an invalid batch entry."""
    beam: Tensor
    """int64: the beam it continues; -1 where there is none."""
    token: Tensor
    """int64: the token it appends; -1 where there is none."""


class Verified(NamedTuple):
    """What :func:`speculative_verify` returns."""

    tokens: Tensor
    """int64 [B, n + 1]: the accepted draft tokens, one more that was drawn, then -1."""
    num_accepted: Tensor
    """int64 [B]: how many draft tokens were accepted; ``tokens[b, num_accepted[b]]`` is the one that was drawn."""
    logprobs: Tensor
    """float32 [B, n + 1]: the tokens' log-probabilities under the target; 0 where there is no token, so that a row's
    sum is that of its text."""
    valid: Tensor
    """bool [B]: false where a row that was needed has a NaN or nothing above -inf, so that nothing was drawn from it.
    The tokens before it are good."""


def _check_on_cpu(op: str, name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(
            f"llmkern.{op}: expected {name} on the CPU, where this operator runs, got {tensor.device}"
        )


def _check_logits(op: str, name: str, logits: Tensor, letters: str) -> None:
    _checks.check_tensor(op, name, logits)
    _checks.check_dtype(op, name, logits, _checks.ANY_FLOAT_DTYPES)
    _checks.check_dim(op, name, logits, letters)
    _check_on_cpu(op, name, logits)
    if not 1 <= logits.shape[-1] < _MAX_VOCABULARY:
        raise ValueError(
            f"llmkern.{op}: expected {name} of 1 to {_MAX_VOCABULARY - 1} tokens, got shape {list(logits.shape)}"
        )


def _draws(
    op: str,
    first: str,
    seed: int | Tensor | None,
    position: int | Tensor | None,
    generator: Generator | None,
    B: int,
    numbers: int = 1,
) -> tuple[Tensor, Tensor]:
    """Seeds [1] or [B] and positions [B] of rows that use so many successive positions each.

    By default no two rows share a pair of seed and position.
    """
    cpu = torch.device("cpu")
    seeds = _seed.seeds(op, first, seed, generator, B, cpu)
    per_row = isinstance(seed, Tensor) and seed.dim() == 1
    positions = _seed.positions(op, first, position, per_row, B, cpu)
    if positions is None:
        positions = seeds.new_zeros(1) if per_row else torch.arange(0, B * numbers, numbers)
    return seeds, positions.expand(B)


def beam_search_step(
    logits: Tensor, scores: Tensor, *, num_candidates: int | None = None
) -> BeamCandidates:
    """The best continuations of a set of beams: one step of beam search (Lowerre 1976).

        score(k, v) = scores[k] + log_softmax(logits[k])[v]

    in float64, rounded to float32 once. The order is by score descending, then beam ascending, then token ascending, so
    equal scores give a defined result; nothing is sorted, and K * V may be as large as memory allows.

    Twice as many candidates as beams, the default, are enough to find K that do not end: at most K of them end with the
    one end token.

    Args:
        logits: [B, K, V] for K beams of B texts, float32, float64, bfloat16 or float16 (computed in float32), 1 <= V <
            2^23. Tokens at -inf are never taken; +inf counts as the largest float32.
        scores: [B, K], the beams' cumulative log-probabilities. A beam at -inf has no continuation, and its logits are
            not read: what finished beams have, and at the first step all beams but one.
        num_candidates: how many to return, n; 2 * K by default.

    Returns:
        A BeamCandidates. Where fewer than n continuations are above -inf, the rest is beam -1, token -1, score -inf. A
        NaN in a beam's logits or score, or a score of +inf, makes the batch entry invalid: all -1, scores NaN. No
        gradient flows through.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape or device does not fit (there is no CUDA kernel), or num_candidates is below 1.

    Example:
        >>> logits = torch.log(torch.tensor([[[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]]]))
        >>> scores = torch.log(torch.tensor([[0.5, 0.5]]))
        >>> best = llmkern.ops.beam_search_step(logits, scores, num_candidates=3)
        >>> best.beam.tolist(), best.token.tolist()
        ([[0, 1, 1]], [[0, 0, 1]])
    """
    op = "beam_search_step"
    _check_logits(op, "logits", logits, "B, K, V")
    _checks.check_tensor(op, "scores", scores)
    _checks.check_dtype(op, "scores", scores, _checks.ANY_FLOAT_DTYPES)
    B, K, _ = logits.shape
    _checks.check_shape(op, "scores", scores, "B, K", [B, K])
    _checks.check_same_device(op, {"logits": logits, "scores": scores})
    n = 2 * K if num_candidates is None else num_candidates
    if n < 1:
        raise ValueError(f"llmkern.{op}: expected num_candidates of at least 1, got {n}")
    return BeamCandidates(
        *torch.ops.llmkern.beam_search_step.default(
            _checks.constant(op, "logits", logits),
            _checks.constant(op, "scores", scores).float(),
            n,
        )
    )


@torch.library.register_fake("llmkern::beam_search_step")
def _beam_search_step_fake(
    logits: Tensor, scores: Tensor, num_candidates: int
) -> tuple[Tensor, ...]:
    shape = (logits.shape[0], num_candidates)
    ids = [scores.new_empty(shape, dtype=torch.int64) for _ in range(2)]
    return scores.new_empty(shape), *ids


def speculative_verify(
    draft_ids: Tensor,
    draft_logits: Tensor | None,
    target_logits: Tensor,
    *,
    seed: int | Tensor | None = None,
    position: int | Tensor | None = None,
    generator: Generator | None = None,
) -> Verified:
    """Accepts a prefix of drafted tokens and draws one more, so that what comes out is distributed as the target's own
    draws (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192; Chen et al. 2023, https://arxiv.org/abs/2302.01318).

    Draft token x with probability q(x) under the draft and p(x) under the target is accepted with probability
    min(1, p(x) / q(x)). The first that is not ends the chain with one draw from max(0, p - q), normalised; where all
    are accepted, one more token is drawn from the target's last row.

    The logits are final: temperature, filters and masks come before, with -inf for what is never drawn. For a greedy
    target, pass logits that are -inf except for its choice.

    Args:
        draft_ids: int64 or int32 [B, n], the tokens that the draft drew from draft_logits; -1 after the last one of a
            shorter draft. n may be 0.
        draft_logits: [B, n, V], or None for a draft that was certain of its tokens: a greedy one, or one that copied
            them from a text.
        target_logits: [B, n + 1, V]; row i is the target's prediction after i draft tokens. float32, float64,
            bfloat16 or float16 (computed in float32), 1 <= V < 2^23.
        seed: an int for all rows or int64 [B]; None draws one from torch's generator.
        position: the index, under its seed, of the first token that comes out: int64 [B], or an int. Token i uses the
            random numbers of position + i, which are others than those of :func:`llmkern.ops.sample` at the same
            position: drafts may be drawn with the same seed and positions. In a generation, pass the number of tokens
            there are. By default b * (n + 1) when one seed serves all rows, and 0 when every row has its own.
        generator: what seed=None draws from; torch's default one otherwise.

    Returns:
        A Verified. No gradient flows through.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a shape or device does not fit (there is no CUDA kernel); or the draft cannot have drawn a token,
            because its logit is -inf.
        IndexError: a draft id is not in [0, V); the message names its position and value.

    Example:
        >>> target = torch.tensor([[[0.0, 1.0, 2.0], [0.0, 2.0, 1.0]]])
        >>> out = llmkern.ops.speculative_verify(torch.tensor([[2]]), target[:, :1], target, seed=0)
        >>> out.num_accepted.tolist()  # a draft that is the target
        [1]
    """
    op = "speculative_verify"
    _check_logits(op, "target_logits", target_logits, "B, n + 1, V")
    _checks.check_tensor(op, "draft_ids", draft_ids)
    _checks.check_dtype(op, "draft_ids", draft_ids, _checks.INDEX_DTYPES)
    _checks.check_dim(op, "draft_ids", draft_ids, "B, n")
    B, n = draft_ids.shape
    V = target_logits.shape[-1]
    _checks.check_shape(op, "target_logits", target_logits, "B, n + 1, V", [B, n + 1, V])
    if draft_logits is not None:
        _check_logits(op, "draft_logits", draft_logits, "B, n, V")
        _checks.check_shape(op, "draft_logits", draft_logits, "B, n, V", [B, n, V])
        draft_logits = _checks.constant(op, "draft_logits", draft_logits)
    target_logits = _checks.constant(op, "target_logits", target_logits)
    if draft_logits is not None and draft_logits.dtype != target_logits.dtype:
        draft_logits, target_logits = draft_logits.float(), target_logits.float()
    _checks.check_same_device(op, {"target_logits": target_logits, "draft_ids": draft_ids})
    seeds, positions = _draws(op, "target_logits", seed, position, generator, B, n + 1)
    tokens, num_accepted, logprobs = torch.ops.llmkern.speculative_verify.default(
        draft_ids.to(torch.int64), draft_logits, target_logits, seeds, positions
    )
    valid = tokens.gather(1, num_accepted.unsqueeze(1)).squeeze(1) >= 0
    return Verified(tokens, num_accepted, logprobs, valid)


@torch.library.register_fake("llmkern::speculative_verify")
def _speculative_verify_fake(
    draft_ids: Tensor,
    draft_logits: Tensor | None,
    target_logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    B, n = draft_ids.shape
    shape = (B, n + 1)
    logprobs = draft_ids.new_empty(shape, dtype=torch.float32)
    return draft_ids.new_empty(shape), draft_ids.new_empty(B), logprobs


def multinomial(
    input: Tensor,
    num_samples: int,
    replacement: bool = False,
    *,
    from_logits: bool = False,
    seed: int | Tensor | None = None,
    position: int | Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Draws from each row, as ``torch.multinomial`` does: category v with probability input[v] / sum(input); without
    replacement, one after the other among those that are left.

    A weight counts with as many bits as 63-bit sums allow, 51 for V < 2^12 and 63 - log2(V) above, from the largest
    weight down: float32 weights are exact to 2^-23 of it at V = 65,000. Without replacement it is measured by the
    largest that is left, so that small weights count in full when large ones are gone. torch's float32 sums and
    exponentials are neither, and end at 2^24 categories.

    Args:
        input: [V] or [B, V], weights of at least 0 that need not add up to 1; float32, float64, bfloat16 or float16,
            V < 2^31.
        num_samples: n, at least 1; without replacement at most as many as there are weights above 0.
        replacement: whether a category may be drawn again.
        from_logits: input holds log-weights instead: the draws of ``softmax(input).multinomial(...)`` in one call.
            float64 is computed in float32; -inf is never drawn, +inf counts as the largest float32; V < 2^23.
        seed: an int for all rows or int64 [B]; None draws one from torch's generator.
        position: which draws of its seed a row gets: int64 [B], or an int. By default the row's index when one seed
            serves all rows, and 0 when every row has its own. Draw i is a function of (seed, position, i) and the row:
            fewer samples are a prefix of more.
        generator: what seed=None draws from; torch's default one otherwise.

    Returns:
        int64 [n] or [B, n], in the order of drawing. No gradient flows through.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError (RuntimeError too, as from torch): a shape or device does not fit (there is no CUDA kernel); a
            weight is negative, infinite or NaN; a row has no weight above 0, or too few to draw without replacement.

    Example:
        >>> weights = torch.tensor([0.0, 10.0, 3.0, 0.0])
        >>> sorted(llmkern.ops.multinomial(weights, 2).tolist())
        [1, 2]
        >>> llmkern.ops.multinomial(weights.log(), 3, replacement=True, from_logits=True).shape
        torch.Size([3])
    """
    op = "multinomial"
    _checks.check_tensor(op, "input", input)
    _checks.check_dtype(op, "input", input, _checks.ANY_FLOAT_DTYPES)
    _check_on_cpu(op, "input", input)
    if input.dim() not in (1, 2):
        raise _checks.ShapeError(
            f"llmkern.{op}: expected input of shape [B, V] or [V], got {list(input.shape)}"
        )
    num_samples = _checks.plain_number(num_samples)
    _check_num_samples(num_samples, input.shape[-1], replacement, from_logits)
    rows = input.detach() if input.dim() == 2 else input.detach().unsqueeze(0)
    seeds, positions = _draws(op, "input", seed, position, generator, rows.shape[0])
    try:
        tokens = torch.ops.llmkern.multinomial.default(
            rows, num_samples, replacement, from_logits, seeds, positions
        )
    except ValueError as error:  # what is wrong with the values is known to the operator alone
        raise _checks.ShapeError(*error.args) from None
    return tokens if input.dim() == 2 else tokens.squeeze(0)


def _check_num_samples(n: int, V: int, replacement: bool, from_logits: bool) -> None:
    limit = _MAX_VOCABULARY if from_logits else _MAX_CATEGORIES
    if not 1 <= V < limit:
        raise _checks.ShapeError(
            f"llmkern.multinomial: expected input of 1 to {limit - 1} categories, got {V}"
        )
    if isinstance(n, (float, bool)):
        raise TypeError(
            f"llmkern.multinomial: expected num_samples to be an int, got {type(n).__name__}"
        )
    if not 1 <= n < _MAX_DRAWS:
        raise _checks.ShapeError(f"llmkern.multinomial: expected num_samples in [1, 2^32), got {n}")
    if not replacement and n > V:
        raise _checks.ShapeError(
            f"llmkern.multinomial: expected num_samples of at most V = {V} without replacement, got {n}"
        )


@torch.library.register_fake("llmkern::multinomial")
def _multinomial_fake(
    input: Tensor,
    num_samples: int,
    replacement: bool,
    from_logits: bool,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    return input.new_empty((input.shape[0], num_samples), dtype=torch.int64)
