# SPDX-License-Identifier: Apache-2.0
"""Whatever goes in, sampling has the reference's bits: shapes, strides, dtypes and values that nobody would choose."""

import math

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkern.ops import filter_logits, sample
from tests.ops.sampling_cases import OFF, Batch, assert_same_bits, by_kernel, by_reference, packed

FLT_MAX = float(np.finfo(np.float32).max)
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 1.0, -1.0, 3.0, 88.0, -104.0, 1e4, 1e30, -1e30]
SPECIAL += [FLT_MAX, -FLT_MAX, math.inf, -math.inf, math.nan]
# A little of everything, and everything in a float32.
VALUES = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32), st.floats(-20, 20, width=32))
FRACTIONS = st.one_of(
    st.sampled_from([5e-324, 1e-30, 0.5, 0.9, 1 - 2**-53, 1.0]), st.floats(0, 1, exclude_min=True)
)
PENALTIES = st.one_of(st.sampled_from([0.0, FLT_MAX, -FLT_MAX]), st.floats(-3, 3))
SETTINGS = {
    "temperature": st.one_of(
        st.sampled_from([0.0, 5e-324, 1e-30, 1e-3, 1e30, 1.7e308]),
        st.floats(0, allow_infinity=False),
        st.floats(0.1, 3),
    ),
    "top_k": st.one_of(st.integers(0, 70), st.sampled_from([0, 2**40, 1.7e308])),
    "top_p": FRACTIONS,
    "min_p": st.one_of(st.just(0.0), FRACTIONS),
    "typical_p": FRACTIONS,
    "repetition_penalty": st.one_of(st.floats(1e-45, FLT_MAX), st.floats(0.5, 2)),
    "presence_penalty": PENALTIES,
    "frequency_penalty": PENALTIES,
}
ROW = st.fixed_dictionaries({}, optional=SETTINGS)
INT64 = st.integers(-(2**63), 2**63 - 1)
fuzz = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@st.composite
def vocabularies(draw: st.DrawFn) -> int:
    """Small ones mostly: there the ends of vectors and blocks are."""
    return draw(
        st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 1024, 1025, 2049, 5000]))
    )


@st.composite
def rows(draw: st.DrawFn, B: int, V: int) -> np.ndarray:
    """Drawn number by number, or from a few numbers, or a few numbers among random ones."""
    if V <= 12 and draw(st.booleans()):
        return np.array(draw(st.lists(VALUES, min_size=B * V, max_size=B * V)), np.float32).reshape(
            B, V
        )
    palette = np.array(draw(st.lists(VALUES, min_size=1, max_size=5)), np.float32)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        return rng.choice(palette, (B, V))
    x = rng.normal(0, draw(st.sampled_from([0.01, 3, 1e20])), (B, V)).astype(np.float32)
    where = rng.random((B, V)) < draw(st.sampled_from([0.001, 0.2]))
    return np.where(where, rng.choice(palette, (B, V)), x)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    B, V = draw(st.integers(0, 5)), draw(vocabularies())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def ids(length: int) -> np.ndarray:
        edges = [-(2**63), -1, 0, V - 1, V, 2**31, 2**63 - 1]
        return np.where(
            rng.random((B, length)) < 0.5,
            rng.choice(edges, (B, length)),
            rng.integers(V, size=(B, length)),
        )

    per_row = [draw(ROW) for _ in range(B)]
    batch = Batch(
        draw(rows(B, V)),
        np.array([list((OFF | row).values()) for row in per_row], np.float64).reshape(B, len(OFF)),
        np.array(draw(st.lists(INT64, min_size=B, max_size=B)), np.int64),
        np.array(draw(st.lists(INT64, min_size=B, max_size=B)), np.int64),
        num_logprobs=draw(st.integers(0, min(V, 70))),
    )
    if draw(st.booleans()):
        batch.bias = draw(rows(B, V))
    if draw(st.booleans()):
        n = draw(st.integers(0, 4))
        batch.bias_ids = draw(st.sampled_from([-2, 0, V - 1, 2**62])) + np.tile(
            np.arange(n), (B, 1)
        )
        batch.bias_values = draw(rows(B, max(n, 1)))[:, :n].copy()
    if draw(st.booleans()):
        batch.allowed = rng.random((B, V)) < draw(st.sampled_from([0.0, 0.1, 0.9, 1.0]))
    if draw(st.booleans()):
        batch.prompt_ids = ids(draw(st.integers(0, 6)))
    if draw(st.booleans()):
        batch.output_ids = ids(draw(st.integers(0, 6)))
    return batch


@fuzz
@given(batches(), st.booleans())
def test_any_call_has_the_bits_of_the_reference(on_isas, batch, pack):
    expected = by_reference(batch)
    allowed = packed(batch.allowed) if pack and batch.allowed is not None else batch.allowed
    for _ in on_isas():
        assert_same_bits(by_kernel(batch, allowed=allowed), expected)


@fuzz
@given(
    batches(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["wider", "expanded", "transposed", "every other"]),
)
def test_any_layout_and_dtype(on_isas, batch, dtype, layout):
    logits = torch.from_numpy(batch.logits).to(dtype)
    B, V = logits.shape
    if layout == "wider":
        memory = torch.full((B, V + 7), math.nan, dtype=dtype)
        view = memory[:, 3 : V + 3]
        view.copy_(logits)
    elif layout == "expanded":
        view = logits[:1].expand(B, V)
    elif layout == "transposed":
        view = logits.t().contiguous().t()
    else:
        view = logits.repeat_interleave(2, dim=1)[:, ::2]
    batch.logits = view.float().numpy().copy()
    expected = by_reference(batch)
    for _ in on_isas():
        assert_same_bits(by_kernel(batch, view), expected)


@fuzz
@given(batches())
def test_results_are_defined_and_agree_with_each_other(batch):
    """Of the public function, one thread or three: tokens in range and allowed, every number where it belongs."""
    B, V = batch.logits.shape
    batch.bias_ids = None
    t = {n: torch.from_numpy(a) for n, a in vars(batch).items() if isinstance(a, np.ndarray)}
    given_ = dict(zip(OFF, t["settings"].unbind(1), strict=True))
    given_ |= {n: t.get(n) for n in ("allowed", "prompt_ids", "output_ids")}
    given_["logit_bias"] = t.get("bias")
    where = {"seed": t["seeds"], "position": t["positions"]}
    out = sample(t["logits"], **given_, **where, return_entropy=True, return_rank=True)
    processed = filter_logits(t["logits"], **given_)
    kept = processed > -math.inf
    warm = t["settings"][:, 0] >= 1  # else the quotient of a kept token may be -inf
    assert torch.equal(kept.sum(1)[warm], out.num_kept[warm])
    for b in range(B):
        token = int(out.token[b])
        if not out.valid[b]:
            assert (token, out.num_kept[b], out.rank[b]) == (-1, 0, 0)
            assert out.logprob[b].isnan() and out.entropy[b].isnan()
            continue
        assert 0 <= token < V
        assert batch.allowed is None or batch.allowed[b, token]
        assert 1 <= out.num_kept[b] <= V
        assert 0 <= out.rank[b] < V
        assert out.logprob[b] <= out.filtered_logprob[b] <= 1e-6  # masses err by 1.5e-7
        assert 0 <= out.entropy[b] <= math.log(V) + 1e-4
