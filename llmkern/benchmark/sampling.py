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

# From probabilities [B, K], which need not add up to 1, to one index a row.
Draw = Callable[[Tensor], Tensor]


def plain(V: int, B: int, dtype: torch.dtype = torch.float32) -> Case:
    """A draw from the softmax."""

    def peer(logits: Tensor, draw: Draw) -> Tensor:
        return draw(logits.softmax(dim=1))

    return _case("plain", V, B, dtype, {}, "softmax", peer, lambda mass: V)


def top_k(V: int, B: int, k: int = 50, dtype: torch.dtype = torch.float32) -> Case:
    """A draw from the k likeliest tokens."""

    def peer(logits: Tensor, draw: Draw) -> Tensor:
        values, ids = logits.topk(k, dim=1)
        return ids.gather(1, draw(values.softmax(dim=1))[:, None])[:, 0]

    return _case("top-k", V, B, dtype, {"top_k": k}, "topk", peer, lambda mass: k)


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
        logits = (torch.randn(B, V) * LOGIT_DEVIATION).to(dtype)
        seeds = torch.arange(B)
        ours = Contender(
            lambda: ops.sample(logits, seed=seeds, position=0, **settings),
            lambda drawn: [drawn.token, drawn.logprob, drawn.filtered_logprob, drawn.num_kept],
        )
        # torch.multinomial waits for the GPU to see whether the probabilities are any; those who mind race instead.
        multinomial = Contender(lambda: peer(logits, _multinomial), capturable=False)
        contenders = {OURS: ours, f"{filter_name} + multinomial": multinomial}
        if logits.is_cuda:
            contenders[f"{filter_name} + race"] = Contender(lambda: peer(logits, _race))
        return Workload(contenders, lambda tensors: _check(tensors, logits, kept))

    logits_bytes = B * V * dtype.itemsize
    phase = Phase("logits", bytes=logits_bytes, working_set=logits_bytes)
    name = named(f"{what}-V{V}-B{B}", dtype)
    return Case("sampling", name, build, [phase], dtype=dtype, cold=True, graph=B * V <= _FEW)


def _multinomial(probabilities: Tensor) -> Tensor:
    return torch.multinomial(probabilities, 1)[:, 0]


def _race(probabilities: Tensor) -> Tensor:
    """Exponential variables race: the first to arrive is i with probability p_i."""
    return (probabilities / torch.empty_like(probabilities).exponential_(1.0)).argmax(dim=1)


def _check(tensors: Mapping[str, Any], logits: Tensor, kept: Callable[[Tensor], int]) -> float:
    """Draws are random and differ; what they are drawn from does not.

    Compared with sorted rows in float64: llmkern keeps as many tokens as it should, one more or less where the limit
    falls on a rounding error; every contender's token is one of those; and llmkern's logprobs are those of the softmax
    over all tokens and over the kept ones.
    """
    token, logprob, filtered_logprob, num_kept = tensors[OURS]
    worst = 0.0
    for b, row in enumerate(logits.double().log_softmax(dim=1)):
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
        error = max(
            abs(logprob[b] - expected).item(),
            abs(filtered_logprob[b] - (expected - mass[count - 1].log())).item(),
        )
        worst = max(worst, error / max(1.0, abs(expected.item())))
    if not worst <= TOLERANCE:
        raise RuntimeError(f"expected logprobs within {TOLERANCE:.1e}, got an error of {worst:.1e}")
    return worst


QUICK = (plain(10_000, 1), top_p(32_000, 8))
