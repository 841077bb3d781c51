# SPDX-License-Identifier: Apache-2.0
"""Rows, settings and whole calls of sampling: made, run by the kernel and by the reference, judged by the oracle."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmkern import _reference
from llmkern.ops import SampleOutput
from tests.ops import sampling_oracle as oracle

OFF = vars(oracle.Settings())
CHOICES = {
    "temperature": [0.0, 0.7, 1.0, 1.3, 5.0, 1e-3, 1e-29, 1e-31, 1e-300, 1e30, 1e300],
    "top_k": [1, 2, 3, 5, 50, 257, 10**6],
    "top_p": [1e-30, 0.01, 0.5, 0.9, 0.95, 0.999, 1 - 2**-53, 1.0],
    "min_p": [1e-30, 1e-9, 0.01, 0.1, 0.5, 1.0],
    "typical_p": [1e-30, 0.05, 0.5, 0.9, 0.99],
    "repetition_penalty": [0.5, 1.2, 2.0, 1e-40, 3e38],
    "presence_penalty": [0.7, -0.7, 1e30],
    "frequency_penalty": [0.3, -0.3, 3e38, -3e38],
}
ALWAYS = ("token", "num_kept", "filtered_logprob")
ON_REQUEST = ("logprob", "entropy", "rank", "top_ids", "top_logprobs", "processed")


def make_rows(kind: str, B: int, V: int, rng: np.random.Generator) -> np.ndarray:
    x = rng.normal(0, 3, (B, V))
    if kind == "quantised":  # hundreds of ties
        x = np.round(x)
    elif kind == "bfloat16":
        return torch.from_numpy(x).bfloat16().float().numpy()
    elif kind == "constant":
        x = np.where(rng.random((B, V)) < 0.5, 0.0, -0.0)  # the same number
    elif kind == "two-valued":
        x = np.where(rng.random((B, V)) < rng.random((B, 1)), 0.0, rng.normal(0, 4, (B, 1)))
    elif kind == "peaked":
        x = x * 5 - 30
        x[np.arange(B), rng.integers(V, size=B)] = 10
    elif kind == "denormal":
        x = x * 1e-41
    elif kind == "huge":
        x = x * 1e38
    elif kind == "merged":  # many y that differ, with one y - m
        x = rng.integers(0, 20, (B, V)) * 1e-9
        x[np.arange(B), rng.integers(V, size=B)] = 3
    elif kind == "infinities":
        x[rng.random((B, V)) < 0.3] = -np.inf
        x[rng.random((B, V)) < 0.05] = np.inf
    elif kind == "nan":
        x[np.arange(B), rng.integers(V, size=B)] = np.copysign(np.nan, rng.normal(size=B))
    elif kind == "nothing":
        x[:] = -np.inf
    with np.errstate(over="ignore"):
        return x.astype(np.float32)


KINDS = ["normal", "normal", "quantised", "bfloat16", "constant", "two-valued", "peaked"]
KINDS += ["denormal", "huge", "merged", "infinities", "nan", "nothing"]


def make_settings(B: int, rng: np.random.Generator, share: float = 0.35) -> np.ndarray:
    """[B, 8]: every column is off, or with probability `share` one of its choices."""
    columns = [
        np.where(rng.random(B) < share, rng.choice(CHOICES[name], B), float(off))
        for name, off in OFF.items()
    ]
    return np.stack(columns, axis=1)


def settings_of(*rows: dict[str, float]) -> np.ndarray:
    return np.array([list((OFF | row).values()) for row in rows], dtype=np.float64)


def packed(allowed: np.ndarray) -> np.ndarray:
    """bool [..., V] as int32 [..., ceil(V / 32)]; the bits beyond the vocabulary are set, to no effect."""
    spare = -allowed.shape[-1] % 32
    whole = np.concatenate([allowed, np.ones((*allowed.shape[:-1], spare), bool)], axis=-1)
    return np.packbits(whole, axis=-1, bitorder="little").view(np.int32)


@dataclass
class Batch:
    """One call of the operator, in the names of csrc/kernels/sampling.h."""

    logits: np.ndarray
    settings: np.ndarray  # [B, 8]
    seeds: np.ndarray
    positions: np.ndarray
    bias: np.ndarray | None = None
    bias_ids: np.ndarray | None = None
    bias_values: np.ndarray | None = None
    allowed: np.ndarray | None = None
    prompt_ids: np.ndarray | None = None
    output_ids: np.ndarray | None = None
    num_logprobs: int = 0

    def __len__(self) -> int:
        return len(self.logits)


def make_batch(
    logits: np.ndarray,
    rng: np.random.Generator,
    extras: bool = False,
    num_logprobs: int = 0,
    settings: np.ndarray | None = None,
) -> Batch:
    """Any seeds, positions and settings; with `extras`, biases, masks and ids too."""
    B, V = logits.shape
    batch = Batch(
        logits,
        make_settings(B, rng) if settings is None else settings,
        rng.integers(-(2**63), 2**63, B),
        rng.integers(-(2**63), 2**63, B),
        num_logprobs=num_logprobs,
    )
    if extras:
        batch.bias = rng.normal(0, 2, (B, V)).astype(np.float32)
        batch.bias[rng.random((B, V)) < 0.01] = -np.inf
        first = rng.integers(-2, V, (B, 1))  # distinct ids, some of them padding
        batch.bias_ids = first + np.arange(3)
        batch.bias_values = rng.normal(0, 2, (B, 3)).astype(np.float32)
        batch.allowed = rng.random((B, V)) < rng.choice([0.1, 0.5, 0.95, 1.0], (B, 1))
        batch.prompt_ids = rng.integers(-2, V + 2, (B, 6))
        batch.output_ids = rng.integers(-2, min(V, 5) + 1, (B, 9))
    return batch


def by_kernel(batch: Batch, logits: torch.Tensor | None = None, **changed: Any) -> dict:
    """Everything that can be asked for, and `valid`. `logits` and `changed` go in the place of the batch's arrays."""
    arrays = vars(batch) | changed
    names = ("bias", "bias_ids", "bias_values", "allowed", "prompt_ids", "output_ids")
    tensors = [
        None if arrays[name] is None else torch.from_numpy(arrays[name])
        for name in (*names, "settings", "seeds", "positions")
    ]
    logits = torch.from_numpy(batch.logits) if logits is None else logits
    wanted = (batch.num_logprobs, True, True, True, True)
    out = torch.ops.llmkern.sample.default(logits, *tensors, *wanted)
    if batch.num_logprobs == 0:
        B = len(batch)
        out[7:7] = [torch.empty(B, 0, dtype=torch.int64), torch.empty(B, 0)]
    token, valid, *rest = [tensor.numpy() for tensor in out]
    names = (*ALWAYS[1:], *ON_REQUEST)
    return {"token": token, "valid": valid} | dict(zip(names, rest, strict=True))


def by_reference(batch: Batch) -> dict:
    """As `by_kernel`, and `kept`, bool [B, V]."""
    return dict(_reference.sample(**vars(batch)))


def assert_same_bits(got: dict, expected: dict) -> None:
    """Of the kernel and the reference, or of two runs of the kernel."""
    for name, array in got.items():
        other = expected["token"] >= 0 if name == "valid" else expected[name]
        if array.tobytes() != other.tobytes():
            same = array.reshape(len(array), -1) == other.reshape(len(array), -1)
            nan = (array != array) & (other != other)
            wrong = np.flatnonzero(~(same | nan.reshape(same.shape)).all(1))
            rows = wrong[:3].tolist()
            raise AssertionError(f"{name}: rows {rows}: {array[rows]}, expected {other[rows]}")


def assert_same(got: SampleOutput, expected: SampleOutput, rows: Any = slice(None)) -> None:
    """Of two calls of the public function, `rows` of the second: all bits, NaN equal to NaN."""
    for name, a, b in zip(SampleOutput._fields, got, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            b = b[rows]
            assert a.dtype == b.dtype
            assert a.shape == b.shape, name
            assert torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0)), name


WANTED = ("return_logprob", "return_entropy", "return_rank", "return_processed")


def operator_arguments() -> dict[str, Any]:
    """Of torch.ops.llmkern.sample, in its order, nothing left out that is not optional."""
    optional = ("bias", "bias_ids", "bias_values", "allowed", "prompt_ids", "output_ids")
    settings = torch.tensor([[1.0, 0, 1, 0, 1, 1, 0, 0]], dtype=torch.float64)
    rows = {"settings": settings, "seeds": torch.tensor([1]), "positions": torch.tensor([0, 1])}
    arguments = {"logits": torch.randn(2, 5)} | dict.fromkeys(optional) | rows
    return arguments | {"num_logprobs": 2} | dict.fromkeys(WANTED, True)


def judge(batch: Batch) -> list[oracle.Result]:
    """Row by row, by the oracle."""

    def ids(array: np.ndarray | None, b: int) -> list[int]:
        return [] if array is None else array[b].tolist()

    return [
        oracle.sample(
            batch.logits[b],
            oracle.Settings(*batch.settings[b].tolist()),
            int(batch.seeds[b]),
            int(batch.positions[b]),
            None if batch.bias is None else batch.bias[b],
            None if batch.allowed is None else batch.allowed[b],
            ids(batch.prompt_ids, b),
            ids(batch.output_ids, b),
            dict(zip(ids(batch.bias_ids, b), ids(batch.bias_values, b), strict=True)),
        )
        for b in range(len(batch))
    ]


def assert_equal_to_oracle(got: dict, batch: Batch, expected: list[oracle.Result]) -> None:
    for name in ("token", "rank", "num_kept"):
        assert got[name].tolist() == [getattr(r, name) for r in expected], name
    if "valid" in got:
        assert got["valid"].tolist() == [r.token >= 0 for r in expected]

    def close(values: np.ndarray, others: Any, name: str) -> None:
        # Within one rounding to float32, and some 1e-12 where both terms cancel.
        with np.errstate(over="ignore"):
            others = np.asarray(others).astype(np.float32)
        np.testing.assert_allclose(values, others, rtol=2**-23, atol=1e-12, err_msg=name)

    for name in ("logprob", "filtered_logprob", "entropy"):
        close(got[name], [getattr(r, name) for r in expected], name)
    n = batch.num_logprobs
    for b, r in enumerate(expected):
        top = r.order[:n]
        assert got["top_ids"][b].tolist() == top + [-1] * (n - len(top))
        beyond = math.nan if r.token < 0 else -math.inf
        close(got["top_logprobs"][b], [*r.logprobs[top], *[beyond] * (n - len(top))], "top")
        if "processed" in got:
            assert got["processed"][b].tobytes() == r.processed.tobytes()
