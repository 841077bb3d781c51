# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of linear cross entropy, executed on the host; the formulas in float64 are the judge."""

import numpy as np
import pytest

from .harness import Output, checkers_only, from_bfloat16, to_bfloat16

C_TYPES = {
    "float32": "float",
    "float64": "double",
    "bfloat16": "bfloat16",
    "float16": "float16",
}
DTYPES = list(C_TYPES)
# Logits are float32 in 16-bit modes; only what is stored in 16 bit is worse.
LSE_TOLERANCE = {"float32": 2e-7, "float64": 1e-14, "bfloat16": 2e-7, "float16": 2e-7}
GRADIENT_TOLERANCE = {"float32": 1e-6, "float64": 1e-13, "bfloat16": 8e-3, "float16": 1e-3}
NONE, MEAN, SUM = 0, 1, 2
IGNORE = -100
K_TARGET = 2


def wide(dtype):
    return np.dtype("float64" if dtype == "float64" else "float32")


def narrow(values, dtype):
    return to_bfloat16(values) if dtype == "bfloat16" else np.asarray(values, dtype)


def widen(stored, dtype):
    return (from_bfloat16(stored) if dtype == "bfloat16" else stored).astype(np.float64)


def no_error():
    return np.zeros(4, np.int64)


class Problem:
    """Random rows, and what float64 makes of them; None for what is not there."""

    def __init__(
        self,
        N,
        V,
        dtype="float32",
        *,
        bias=False,
        weights=False,
        smoothing=0.0,
        scale=3.0,
        offset=0.0,
    ):
        rng = np.random.default_rng(V + 7 * N)
        self.N, self.V, self.dtype, self.smoothing = N, V, dtype, smoothing
        self.logits = (offset + scale * rng.standard_normal((N, V))).astype(wide(dtype))
        self.target = rng.integers(V, size=N)
        self.bias = narrow(rng.standard_normal(V), dtype) if bias else None
        self.weights = narrow(rng.uniform(0, 2, V), dtype) if weights else None

    @property
    def counts(self):
        return (self.target != IGNORE) & (self.target >= 0) & (self.target < self.V)

    def w(self):
        return np.ones(self.V) if self.weights is None else widen(self.weights, self.dtype)

    def biased(self):
        """Logits with bias, rounded to the type they are computed in."""
        if self.bias is None:
            return self.logits.astype(np.float64)
        return (self.logits + widen(self.bias, self.dtype).astype(wide(self.dtype))).astype(float)

    def lse(self):
        x = self.biased()
        best = x.max(1, keepdims=True)
        return (best + np.log(np.exp(x - best).sum(1, keepdims=True)))[:, 0]

    def row_losses(self):
        x, w, e, lse = self.biased(), self.w(), self.smoothing, self.lse()
        y = np.where(self.counts, self.target, 0)
        loss = (1 - e) * w[y] * (lse - x[np.arange(self.N), y])
        if e > 0:
            loss += e / self.V * (w * (lse[:, None] - x)).sum(1)
        return np.where(self.counts, loss, 0.0)

    def gradient(self, grad_loss):
        w, e = self.w(), self.smoothing
        y = np.where(self.counts, self.target, 0)
        hard = (1 - e) * w[y]
        p = np.exp(self.biased() - self.lse()[:, None])
        g = (hard + e / self.V * w.sum())[:, None] * p - e / self.V * w
        g[np.arange(self.N), y] -= hard
        return np.where(self.counts, grad_loss, 0.0)[:, None] * g

    def sum_class_weight(self):
        needed = self.weights is not None and self.smoothing > 0
        return np.array([self.w().sum()]) if needed else None

    def rows(self, simt, **changed):
        fields = {
            "logits": self.logits,
            "bias": self.bias,
            "class_weight": self.weights,
            "target": self.target,
            "loss": Output(self.N, np.float64),
            "lse": Output(self.N, np.float64),
            "sum_class_weight": self.sum_class_weight(),
            "N": self.N,
            "V": self.V,
            "first_row": 0,
            "ignore_index": IGNORE,
            "label_smoothing": self.smoothing,
            "error": no_error(),
        }
        struct = f"CrossEntropyRows<{C_TYPES[self.dtype]}>"
        return simt("cross_entropy").run(struct, **{**fields, **changed})

    def backward(self, simt, grad_loss, reduction, total_weight=None, **changed):
        W = wide(self.dtype)
        fields = {
            "grad_loss": np.asarray(grad_loss, W).reshape(-1),
            "total_weight": None if total_weight is None else np.array([total_weight], W),
            "logits": self.logits,
            "bias": self.bias,
            "class_weight": self.weights,
            "target": self.target,
            "lse": self.lse(),
            "sum_class_weight": self.sum_class_weight(),
            "gradient": Output((self.N, self.V), narrow(np.zeros(1), self.dtype).dtype),
            "N": self.N,
            "V": self.V,
            "ignore_index": IGNORE,
            "label_smoothing": self.smoothing,
            "reduction": reduction,
        }
        struct = f"CrossEntropyLogitsBackward<{C_TYPES[self.dtype]}>"
        out = simt("cross_entropy").run(struct, **{**fields, **changed})["gradient"]
        return widen(out, self.dtype)


def check_rows(simt, problem):
    out = problem.rows(simt)
    tolerance = LSE_TOLERANCE[problem.dtype]
    assert not out["error"].any()
    np.testing.assert_allclose(out["lse"], problem.lse(), rtol=tolerance, atol=tolerance)
    # A loss is a difference of lse and logits: its error is theirs, at their size.
    size = np.abs(problem.biased()).max() * max(1.0, problem.w().max())
    np.testing.assert_allclose(out["loss"], problem.row_losses(), rtol=0, atol=4 * tolerance * size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 2, 31, 1000, 4099])
def test_rows_plain(simt, V, dtype):
    check_rows(simt, Problem(3, V, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 31, 1000, 4100])
def test_rows_with_everything(simt, V, dtype):
    problem = Problem(3, V, dtype, bias=True, weights=True, smoothing=0.1)
    problem.target[1] = IGNORE
    check_rows(simt, problem)


@pytest.mark.parametrize("options", [{"bias": True}, {"weights": True}, {"smoothing": 0.3}])
def test_rows_with_one_option(simt, options):
    check_rows(simt, Problem(5, 67, **options))


def test_large_logits_keep_their_digits(simt):
    """Sums of l_v at 1e4 would lose the smoothing term; those of l_v - anchor do not."""
    problem = Problem(4, 300, smoothing=0.5, offset=1e4, scale=1.0)
    out = problem.rows(simt)
    np.testing.assert_allclose(out["lse"], problem.lse(), rtol=1e-9)
    np.testing.assert_allclose(out["loss"], problem.row_losses(), rtol=1e-6)


def test_many_equal_logits_are_added_without_drift(simt):
    problem = Problem(1, 9001, scale=0.0)
    np.testing.assert_allclose(problem.rows(simt)["lse"], np.log(9001.0), rtol=1e-8)


@pytest.mark.parametrize("V", [37, 600])
def test_infinities(simt, V):
    problem = Problem(6, V)
    minus = problem.logits
    minus[0, : V // 2] = -np.inf  # some of a row, among them all that some threads see
    problem.target[0] = V - 1
    minus[1, V - 2] = -np.inf
    problem.target[1] = V - 2
    expected = Problem.lse(problem)
    minus[2, :] = -np.inf
    minus[3, 5] = np.inf
    minus[4, V - 1] = np.nan
    out = problem.rows(simt)
    np.testing.assert_allclose(out["lse"][[0, 1, 5]], expected[[0, 1, 5]], rtol=2e-7)
    assert np.isfinite(out["loss"][[0, 5]]).all()
    assert out["loss"][1] == np.inf
    assert np.isnan(out["lse"][[2, 3, 4]]).all()
    assert np.isnan(out["loss"][[2, 3, 4]]).all()


def test_smoothing_with_a_forbidden_token(simt):
    problem = Problem(2, 40, smoothing=0.1)
    problem.logits[0, 7] = -np.inf
    problem.logits[1, 3] = -1e30
    problem.target[1] = 3
    out = problem.rows(simt)
    assert out["loss"][0] == np.inf
    np.testing.assert_allclose(out["loss"][1], problem.row_losses()[1], rtol=1e-6)


@pytest.mark.parametrize("value", [-1, 11, 2**40])
def test_targets_out_of_range_are_reported(simt, value):
    problem = Problem(4, 11, smoothing=0.1)
    expected = problem.row_losses()
    problem.target[2] = value
    out = problem.rows(simt, first_row=1000)
    assert out["error"].tolist() == [K_TARGET | 1 << 32, 1002, value, 11]
    assert np.isnan(out["loss"][2])
    np.testing.assert_allclose(out["loss"][[0, 1, 3]], expected[[0, 1, 3]], rtol=1e-6)
    np.testing.assert_allclose(out["lse"], problem.lse(), rtol=1e-6)


def test_the_first_report_stays(simt):
    problem = Problem(2, 3)
    problem.target[:] = 99
    earlier = np.array([K_TARGET | 1 << 32, 5, 6, 7])
    assert problem.rows(simt, error=earlier)["error"].tolist() == earlier.tolist()


def test_ignore_index_may_be_a_token(simt):
    problem = Problem(3, 9)
    problem.target[:] = [2, 4, 2]
    out = problem.rows(simt, ignore_index=2)
    assert out["loss"][[0, 2]].tolist() == [0, 0]
    assert out["loss"][1] > 0
    np.testing.assert_allclose(out["lse"], problem.lse(), rtol=1e-6)
    gradient = problem.backward(simt, 1.0, SUM, ignore_index=2)
    assert not gradient[[0, 2]].any()
    assert gradient[1].any()


@checkers_only
def test_more_rows_than_blocks(simt):
    problem = Problem(4096 + 3, 2)
    np.testing.assert_allclose(problem.rows(simt)["loss"], problem.row_losses(), atol=1e-5)
    gradient = problem.backward(simt, 1.0, SUM)
    np.testing.assert_allclose(gradient, problem.gradient(1.0), atol=1e-6)


@pytest.mark.parametrize("V", [50, 1001, 4099])
def test_rows_repeat(simt, V):
    problem = Problem(2, V, smoothing=0.1)
    first, again = problem.rows(simt), problem.rows(simt)
    np.testing.assert_array_equal(first["loss"], again["loss"])
    np.testing.assert_array_equal(first["lse"], again["lse"])


def reduce(simt, losses, target, reduction, *, V=5, weights=None, dtype="float32"):
    W = wide(dtype)
    shape = len(target) if reduction == NONE else 1
    return simt("cross_entropy").run(
        f"CrossEntropyReduce<{C_TYPES[dtype]}>",
        row_loss=losses,
        class_weight=weights,
        target=target,
        loss=Output(shape, W),
        total_weight=Output(1, W),
        N=len(target),
        V=V,
        ignore_index=IGNORE,
        reduction=reduction,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("N", [1, 33, 2050])
def test_reductions(simt, N, weighted, dtype):
    rng = np.random.default_rng(N)
    target = rng.integers(5, size=N)
    target[1::3] = IGNORE
    losses = np.where(target == IGNORE, 0, rng.exponential(size=N))
    weights = narrow(rng.uniform(0, 2, 5), dtype) if weighted else None
    w = widen(weights, dtype) if weighted else np.ones(5)
    total = w[target[target != IGNORE]].sum()
    expected = {NONE: losses, SUM: losses.sum(), MEAN: losses.sum() / total}
    for reduction, value in expected.items():
        out = reduce(simt, losses, target, reduction, weights=weights, dtype=dtype)
        rtol = 1e-14 if dtype == "float64" else 1e-7
        np.testing.assert_allclose(out["loss"], np.broadcast_to(value, out["loss"].shape), rtol)
        np.testing.assert_allclose(out["total_weight"], total, rtol)


def test_reduction_of_nothing(simt):
    ignored = np.full(3, IGNORE)
    for target in (ignored, ignored[:0]):
        losses = np.zeros(len(target))
        assert reduce(simt, losses, target, SUM)["loss"] == 0
        mean = reduce(simt, losses, target, MEAN)
        assert np.isnan(mean["loss"])
        assert mean["total_weight"] == 0
    assert Problem(0, 3).rows(simt)["loss"].shape == (0,)
    assert Problem(0, 3).backward(simt, 1.0, SUM).shape == (0, 3)


def test_reduction_with_a_bad_target_reads_no_weight_for_it(simt):
    weights = np.array([2.0, 3.0], np.float32)
    out = reduce(simt, np.array([1.0, np.nan]), np.array([1, 2]), SUM, V=2, weights=weights)
    assert np.isnan(out["loss"])
    assert out["total_weight"] == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 2, 31, 1000, 4099, 4100])
def test_gradient(simt, V, dtype):
    everything = V in (31, 4100)
    problem = Problem(4, V, dtype, bias=everything, weights=everything, smoothing=0.1 * everything)
    problem.target[1] = IGNORE
    problem.target[2] = V
    atol = GRADIENT_TOLERANCE[dtype]
    # Scales near one: the tolerance is of the largest element, a probability.
    rows = np.array([1.5, 1, 1, -0.5])
    np.testing.assert_allclose(
        problem.backward(simt, rows, NONE), problem.gradient(rows), rtol=atol, atol=atol
    )
    mean = problem.gradient(2.0 / 3.0)
    got = problem.backward(simt, 2.0, MEAN, total_weight=3.0)
    np.testing.assert_allclose(got, mean, rtol=atol, atol=atol)
    assert not got[1:3].any()


def test_gradient_of_large_logits(simt):
    """In float32 an lse of 1e4 alone would be off by up to 5e-4, and every probability with it."""
    problem = Problem(4, 60, offset=1e4, scale=1.0)
    got = problem.backward(simt, 1.0, SUM)
    np.testing.assert_allclose(got, problem.gradient(1.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("V", [31, 1131])
def test_gradient_in_place_has_the_same_bits(simt, V):
    problem = Problem(3, V)
    problem.target[1] = IGNORE
    fields = {
        "logits": problem.logits,
        "grad_loss": np.ones(1, np.float32),
        "target": problem.target,
        "lse": problem.lse(),
        "N": 3,
        "V": V,
    }
    in_place = simt("cross_entropy").run("CrossEntropyInPlace", **fields)["logits"]
    np.testing.assert_array_equal(in_place, problem.backward(simt, 1.0, SUM))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [0, 1, 7, 4096])
def test_accumulate(simt, count, dtype):
    rng = np.random.default_rng(count)
    total, x = rng.standard_normal((2, count)).astype(dtype)
    out = simt("cross_entropy").run(f"Accumulate<{C_TYPES[dtype]}>", sum=total, x=x, count=count)
    np.testing.assert_array_equal(out["sum"], total + x)
