# SPDX-License-Identifier: Apache-2.0
"""Cases of sampling: from logits to one token a row, against what is written with torch's operators."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmkern import ops
from llmkern.benchmark.case import OURS, Case, Contender, Phase, Workload, named

# Logits of a trained model are about this wide.
LOGIT_DEVIATION = 2.5
TOLERANCE = 1e-5
# Up to so many logits a GPU does the work faster than Python asks for it.
_FEW = 4_000_000
# The check computes so many rows again, in float64.
_CHECKED_ROWS = 8

# From probabilities [B, K], which need not add up to 1, to one index a row.
Draw = Callable[[Tensor], Tensor]


def plain(V: int, B: int, dtype: torch.dtype = torch.float32) -> Case:
    """A draw from the softmax."""

    def peer(logits: Tensor, draw: Draw) -> Tensor:
        return draw(logits.softmax(dim=1))

    return _case("plain", V, B, dtype, {}, "softmax", peer, lambda mass: V)


def top_k(
    V: int, B: int, k: int = 50, dtype: torch.dtype = torch.float32, return_logprob: bool = True
) -> Case:
    """A draw from the k likeliest tokens; without the logprob before the filters, which no peer has, "top-k-token"."""

    def peer(logits: Tensor, draw: Draw) -> Tensor:
        values, ids = logits.topk(k, dim=1)
        return ids.gather(1, draw(values.softmax(dim=1))[:, None])[:, 0]

    settings = {"top_k": k, "return_logprob": return_logprob}
    name = "top-k" if return_logprob else "top-k-token"
    return _case(name, V, B, dtype, settings, "topk", peer, lambda mass: k)


def top_p(V: int, B: int, p: float = 0.9, dtype: torch.dtype = torch.float32) -> Case:
    """A draw from the fewest tokens that make up p of the probability (Holtzman et al. 2020)."""

    def peer(logits: Tensor, draw: Draw) -> Tensor:
        values, ids = logits.sort(dim=1, descending=True)
        probabilities = values.softmax(dim=1)
        before = probabilities.cumsum(dim=1) - probabilities
        probabilities[before >= p] = 0
        return ids.gather(1, draw(probabilities)[:, None])[:, 0]

    def kept(mass: Tensor) -> int:
        return int((mass < p).sum()) + 1

    return _case("top-p", V, B, dtype, {"top_p": p}, "sort", peer, kept)


def processors(V: int, B: int, T: int = 256, dtype: torch.dtype = torch.float32) -> Case:
    """All that a chat's settings ask for, after T ids of text; transformers makes a list of processors of them."""
    temperature, k, p, min_p, penalty = 0.8, 50, 0.95, 0.02, 1.1

    def build() -> Workload:
        logits, ids = _logits(B, V, dtype), torch.randint(V, (B, T))
        settings = {
            "temperature": temperature,
            "top_k": k,
            "top_p": p,
            "min_p": min_p,
            "repetition_penalty": penalty,
            "prompt_ids": ids,
        }
        contenders, absent = {OURS: _ours(logits, settings)}, {}
        try:
            from transformers.generation import logits_process as theirs
        except ImportError as error:
            absent["transformers + multinomial"] = str(error)
        else:
            chain = theirs.LogitsProcessorList(
                [
                    theirs.RepetitionPenaltyLogitsProcessor(penalty),
                    theirs.TemperatureLogitsWarper(temperature),
                    theirs.TopKLogitsWarper(k),
                    theirs.TopPLogitsWarper(p),
                    theirs.MinPLogitsWarper(min_p),
                ]
            )
            contenders["transformers + multinomial"] = Contender(
                lambda: _multinomial(chain(ids, logits.float()).softmax(dim=1)), capturable=False
            )

        def adjusted(rows: Tensor) -> Tensor:
            y = logits[rows].double()
            seen = torch.zeros_like(y).scatter_(1, ids[rows], 1.0).bool()
            y = torch.where(seen, torch.where(y > 0, y / penalty, y * penalty), y)
            return y / temperature

        return Workload(contenders, lambda tensors: _check(tensors, B, adjusted, kept), 1, absent)

    def kept(mass: Tensor) -> int:
        likeliest = mass[:k].diff(prepend=mass.new_zeros(1))
        nucleus = int((mass[:k] < p * mass[:k][-1]).sum()) + 1
        return min(nucleus, int((likeliest >= min_p * likeliest[0]).sum()))

    return _sampling_case("processors", V, B, dtype, build)


def _case(
    what: str,
    V: int,
    B: int,
    dtype: torch.dtype,
    settings: dict[str, Any],
    filter_name: str,
    peer: Callable[[Tensor, Draw], Tensor],
    kept: Callable[[Tensor], int],
) -> Case:
    def build() -> Workload:
        logits = _logits(B, V, dtype)
        # torch.multinomial waits for the GPU to see whether the probabilities are any; those who mind race instead. In
        # 16 bits sums of probabilities would be off by more than a token has: peers compute in float32, as models do.
        multinomial = Contender(lambda: peer(logits.float(), _multinomial), capturable=False)
        contenders = {
            OURS: _ours(logits, settings),
            f"{filter_name} + multinomial": multinomial,
        }
        if logits.is_cuda:
            contenders[f"{filter_name} + race"] = Contender(lambda: peer(logits.float(), _race))
        return Workload(
            contenders,
            lambda tensors: _check(tensors, B, lambda rows: logits[rows].double(), kept),
        )

    return _sampling_case(what, V, B, dtype, build)


def _sampling_case(
    what: str, V: int, B: int, dtype: torch.dtype, build: Callable[[], Workload]
) -> Case:
    logits_bytes = B * V * dtype.itemsize
    return Case(
        "sampling",
        named(f"{what}-V{V}-B{B}", dtype),
        build,
        [Phase("logits", bytes=logits_bytes, working_set=logits_bytes)],
        dtype=dtype,
        cold=True,
        graph=B * V <= _FEW,
        goal=_goal,
    )


def _goal(floor: float) -> float:
    """As long as it takes to read the logits three times, and ten microseconds for the call."""
    return 3 * floor + 10e-6


def _logits(B: int, V: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(B, V) * LOGIT_DEVIATION).to(dtype)


def _ours(logits: Tensor, settings: dict[str, Any]) -> Contender:
    seeds = torch.arange(len(logits))

    def tensors(drawn: ops.SampleOutput) -> list[Tensor]:
        logprob = [] if drawn.logprob is None else [drawn.logprob]
        return [drawn.token, drawn.num_kept, drawn.filtered_logprob, *logprob]

    return Contender(lambda: ops.sample(logits, seed=seeds, position=0, **settings), tensors)


def _multinomial(probabilities: Tensor) -> Tensor:
    return torch.multinomial(probabilities, 1)[:, 0]


def _race(probabilities: Tensor) -> Tensor:
    """Exponential variables race: the first to arrive is i with probability p_i."""
    return (probabilities / torch.empty_like(probabilities).exponential_(1.0)).argmax(dim=1)


def _check(
    tensors: Mapping[str, Any],
    B: int,
    adjusted: Callable[[Tensor], Tensor],
    kept: Callable[[Tensor], int],
) -> float:
    """Draws are random and differ; what they are drawn from does not.

    Some rows are compared with themselves sorted in float64, after ``adjusted`` did what comes before the filters:
    llmkern keeps as many tokens as it should, one more or less where the limit falls on a rounding error; every
    contender's token is one of those; and llmkern's logprobs are those of the softmax over all tokens and over these.
    """
    token, num_kept, filtered_logprob, *logprob = tensors[OURS]
    rows = torch.linspace(0, B - 1, min(B, _CHECKED_ROWS)).round().long()
    worst = 0.0
    for b, row in zip(rows.tolist(), adjusted(rows).log_softmax(dim=1), strict=True):
        mass = row.sort(descending=True).values.exp().cumsum(dim=0)
        count = int(num_kept[b])
        if abs(count - kept(mass)) > 1:
            raise RuntimeError(f"expected {kept(mass)} tokens kept in row {b}, got {count}")
        for name, (tokens, *_) in tensors.items():
            if int((row > row[tokens[b]]).sum()) > count:
                raise RuntimeError(
                    f"expected a kept token in row {b}, got {int(tokens[b])} from {name}"
                )
        expected = row[token[b]]
        errors = [filtered_logprob[b] - (expected - mass[count - 1].log())]
        errors += [value[b] - expected for value in logprob]
        error = max(abs(error).item() for error in errors)
        worst = max(worst, error / max(1.0, abs(expected.item())))
    if not worst <= TOLERANCE:
        raise RuntimeError(f"expected logprobs within {TOLERANCE:.1e}, got an error of {worst:.1e}")
    return worst


QUICK = (plain(10_000, 1), top_p(32_000, 8))
