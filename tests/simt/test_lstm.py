# SPDX-License-Identifier: Apache-2.0
"""The LSTM recurrence's CUDA kernels, executed on the host, against the same recurrence in float64."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from .harness import (
    KernelError,
    Output,
    SameAs,
    Scratch,
    checkers_only,
    from_bfloat16,
    to_bfloat16,
)

C_TYPES = {
    "float32": "float",
    "float64": "double",
    "bfloat16": "bfloat16",
    "float16": "float16",
}
# The error allowed, as a share of the largest number of an array (1 at least): of 16 bits mostly the rounding of what
# is stored, and of h and da, which the recurrence reads back.
TOLERANCE = {"float32": 2e-6, "float64": 4e-15, "bfloat16": 1.2e-2, "float16": 1.5e-3}

# steps, B, H: one cell, primes, one more than a tile of units and than one of rows, two tiles, several chunks of K.
SHAPES = [(1, 1, 1), (3, 5, 7), (4, 17, 33), (2, 33, 64), (3, 2, 70)]
# dtype, steps, B, H and a number of multiprocessors with which the tile has 4, 16, 32 or 64 rows.
TILES = [
    ("float32", 2, 3, 20, 4),
    ("float32", 2, 9, 20, 2),
    ("float32", 2, 19, 20, 2),
    ("float32", 2, 37, 20, 1),
    ("float64", 2, 5, 20, 9),
    ("float64", 2, 9, 20, 2),
    ("float64", 2, 37, 20, 1),
    ("bfloat16", 2, 3, 20, 4),
    ("bfloat16", 2, 19, 20, 2),
    ("bfloat16", 2, 37, 20, 1),
    ("float16", 2, 19, 20, 2),
    ("float16", 2, 37, 20, 1),
]


def stored(dtype: str) -> np.dtype:
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


def widened(dtype: str) -> np.dtype:
    return np.dtype(np.float64 if dtype == "float64" else np.float32)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """As the kernel reads them."""
    return to_bfloat16(values) if dtype == "bfloat16" else values.astype(dtype)


def value(array: np.ndarray) -> np.ndarray:
    """float64 of what the kernel reads or writes."""
    return (from_bfloat16(array) if array.dtype == np.uint16 else array).astype(np.float64)


@dataclass(frozen=True)
class Layer:
    """Inputs of a recurrence, as the kernel reads them."""

    dtype: str
    input_gates: np.ndarray
    h_0: np.ndarray
    c_0: np.ndarray
    weight_hh: np.ndarray
    bias_ih: np.ndarray | None
    bias_hh: np.ndarray | None
    lengths: np.ndarray | None
    reverse: bool

    @property
    def sizes(self) -> dict[str, int]:
        steps, B, _ = self.input_gates.shape
        return {"steps": steps, "B": B, "H": self.h_0.shape[1]}

    def times(self, b: int) -> list[int]:
        """The steps of row b, in their order."""
        length = len(self.input_gates) if self.lengths is None else int(self.lengths[b])
        return list(range(length))[:: -1 if self.reverse else 1]


def make(dtype, steps, B, H, *, bias=True, lengths=None, reverse=False, seed=0) -> Layer:
    rng = np.random.default_rng(seed)

    def draw(*shape, scale=1.0):
        return rounded(scale * rng.standard_normal(shape), dtype)

    return Layer(
        dtype,
        rng.standard_normal((steps, B, 4 * H)).astype(widened(dtype)),
        draw(B, H),
        draw(B, H),
        draw(4 * H, H, scale=H**-0.5),
        draw(4 * H) if bias else None,
        draw(4 * H) if bias else None,
        None if lengths is None else np.array(lengths, np.int64),
        reverse,
    )


def some_lengths(steps: int, B: int) -> list[int]:
    """0 and the full length among them, in no order."""
    return [(2 + 3 * b) % (steps + 1) for b in range(B)]


# ---- in float64 ------------------------------------------------------------------------------------------------------


def forward(layer: Layer) -> dict[str, np.ndarray]:
    steps, B, H = layer.sizes.values()
    weight = value(layer.weight_hh)
    bias = 0 if layer.bias_ih is None else value(layer.bias_ih) + value(layer.bias_hh)
    out = {name: np.zeros((steps, B, H)) for name in ("output", "cells")}
    out |= {"gates": np.zeros((steps, B, 4 * H)), "h_n": value(layer.h_0), "c_n": value(layer.c_0)}
    for b in range(B):
        h, c = value(layer.h_0[b]), value(layer.c_0[b])
        for t in layer.times(b):
            i, f, g, o = np.split(value(layer.input_gates[t, b]) + weight @ h + bias, 4)
            i, f, o = (1 / (1 + np.exp(-x)) for x in (i, f, o))
            g = np.tanh(g)
            c = f * c + i * g
            h = o * np.tanh(c)
            out["gates"][t, b] = np.concatenate([i, f, g, o])
            out["output"][t, b], out["cells"][t, b] = h, c
        out["h_n"][b], out["c_n"][b] = h, c
    return out


def backward(layer: Layer, saved: dict, grads: dict) -> dict[str, np.ndarray]:
    """`saved` and `grads` (or None) hold what the kernel reads."""
    steps, B, H = layer.sizes.values()
    weight = value(layer.weight_hh)
    grad = {name: 0.0 if array is None else value(array) for name, array in grads.items()}
    out = {"grad_gates": np.zeros((steps, B, 4 * H))}
    out["grad_h_0"] = np.zeros((B, H)) + grad["grad_h_n"]
    out["grad_c_0"] = np.zeros((B, H)) + grad["grad_c_n"]
    grad_output = np.zeros((steps, B, H)) + grad["grad_output"]
    for b in range(B):
        dh, dc, times = out["grad_h_0"][b], out["grad_c_0"][b], layer.times(b)
        for t, before in reversed(list(zip(times, [None, *times], strict=False))):
            i, f, g, o = np.split(value(saved["gates"][t, b]), 4)
            c_before = value(layer.c_0[b] if before is None else saved["cells"][before, b])
            tanh_c = np.tanh(value(saved["cells"][t, b]))
            dh = dh + grad_output[t, b]
            dc = dc + dh * o * (1 - tanh_c**2)
            da = np.concatenate(
                [
                    dc * g * i * (1 - i),
                    dc * c_before * f * (1 - f),
                    dc * i * (1 - g**2),
                    dh * tanh_c * o * (1 - o),
                ]
            )
            out["grad_gates"][t, b] = da
            dh, dc = da @ weight, dc * f
        out["grad_h_0"][b], out["grad_c_0"][b] = dh, dc
    return out


# ---- by the kernels --------------------------------------------------------------------------------------------------


def run_forward(simt, layer: Layer, arch: int = 900, multiprocessors: int = 4, **changed):
    kernels = simt("lstm", arch)
    kernels.configure(multiprocessors=multiprocessors, capability=arch // 10)
    steps, B, H = layer.sizes.values()
    fields = {name: getattr(layer, name) for name in layer.__dataclass_fields__ if name != "dtype"}
    T = stored(layer.dtype)
    fields |= {
        "output": Output((steps, B, H), T),
        "cells": Output((steps, B, H), widened(layer.dtype)),
        "gates": Output((steps, B, 4 * H), T),
        "h_n": Output((B, H), T),
        "c_n": Output((B, H), T),
    }
    struct = f"LstmRecurrence<{C_TYPES[layer.dtype]}>"
    return kernels.run(struct, **{**changed, **fields, **layer.sizes, **changed})


def run_backward(simt, layer: Layer, saved, grads, arch: int = 900, multiprocessors: int = 4):
    kernels = simt("lstm", arch)
    kernels.configure(multiprocessors=multiprocessors, capability=arch // 10)
    steps, B, H = layer.sizes.values()
    T = stored(layer.dtype)
    fields = {name: getattr(layer, name) for name in ("c_0", "weight_hh", "lengths", "reverse")}
    fields |= {
        "grad_cell": Scratch((B, H), widened(layer.dtype)),
        "grad_gates": Output((steps, B, 4 * H), T),
        "grad_h_0": Output((B, H), T),
        "grad_c_0": Output((B, H), T),
    }
    struct = f"LstmRecurrenceBackward<{C_TYPES[layer.dtype]}>"
    return kernels.run(struct, **{**fields, **layer.sizes, **saved, **grads})


def saved_of(layer: Layer) -> dict[str, np.ndarray]:
    """Gates and cells of the float64 forward, rounded to what the kernel stores."""
    exact = forward(layer)
    gates = rounded(exact["gates"], layer.dtype)
    return {"gates": gates, "cells": exact["cells"].astype(widened(layer.dtype))}


def grads_of(layer: Layer, *, absent: tuple[str, ...] = ()) -> dict[str, np.ndarray | None]:
    steps, B, H = layer.sizes.values()
    rng = np.random.default_rng(1)
    shapes = {"grad_output": (steps, B, H), "grad_h_n": (B, H), "grad_c_n": (B, H)}
    drawn = {
        name: rounded(rng.standard_normal(shape), layer.dtype) for name, shape in shapes.items()
    }
    return {name: None if name in absent else array for name, array in drawn.items()}


def assert_close(got: dict, expected: dict, dtype: str) -> None:
    assert got.keys() == expected.keys()
    for name, exact in expected.items():
        scale = max(1.0, np.abs(exact).max(initial=0))
        error = np.abs(value(got[name]) - exact).max(initial=0) / scale
        assert error <= TOLERANCE[dtype], f"{name}: {error}"


def check(simt, layer: Layer, *, absent: tuple[str, ...] = (), **device) -> None:
    """Forward and backward against float64; what lies beyond a row's length is exactly zero."""
    got = run_forward(simt, layer, **device)
    assert_close(got, forward(layer), layer.dtype)
    saved, grads = saved_of(layer), grads_of(layer, absent=absent)
    got |= run_backward(simt, layer, saved, grads, **device)
    expected = backward(layer, saved, grads)
    assert_close({name: got[name] for name in expected}, expected, layer.dtype)
    for b in range(layer.sizes["B"]):
        beyond = len(layer.times(b))
        for name in ("output", "cells", "gates", "grad_gates"):
            assert not got[name][beyond:, b].any(), name


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_the_float64_backward_is_the_derivative(reverse):
    layer = make("float64", 3, 4, 2, lengths=[3, 0, 1, 2], reverse=reverse)
    grads = grads_of(layer)

    def loss(changed: Layer) -> float:
        out = forward(changed)
        return sum((grads[f"grad_{name}"] * out[name]).sum() for name in ("output", "h_n", "c_n"))

    analytic = backward(layer, saved_of(layer), grads)
    pairs = {"input_gates": "grad_gates", "h_0": "grad_h_0", "c_0": "grad_c_0"}
    for name, gradient in pairs.items():
        at = getattr(layer, name)
        for index in np.ndindex(at.shape):
            step = np.zeros(at.shape)
            step[index] = 1e-5
            difference = loss(replace(layer, **{name: at + step})) - loss(
                replace(layer, **{name: at - step})
            )
            assert difference / 2e-5 == pytest.approx(analytic[gradient][index], abs=1e-8)


@pytest.mark.parametrize("dtype", C_TYPES)
@pytest.mark.parametrize(("steps", "B", "H"), SHAPES)
def test_agrees_with_float64(simt, steps, B, H, dtype):
    """Half of the shapes run backwards, half without biases, half on the older architecture."""
    odd = SHAPES.index((steps, B, H)) % 2 == 1
    layer = make(dtype, steps, B, H, reverse=odd, bias=not odd)
    check(simt, layer, arch=800 if odd else 900)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", C_TYPES)
def test_lengths(simt, dtype, reverse):
    lengths = some_lengths(4, 18)
    assert {0, 4} < set(lengths)
    check(simt, make(dtype, 4, 18, 9, lengths=lengths, reverse=reverse))


@pytest.mark.parametrize("reverse", [False, True])
def test_tiles_of_rows_that_are_over(simt, reverse):
    """Whole tiles have nothing to multiply; a row of length 0 keeps its states."""
    layer = make("float32", 3, 9, 5, lengths=[0] * 4 + [1] * 4 + [3], reverse=reverse)
    check(simt, layer)
    np.testing.assert_array_equal(run_forward(simt, layer)["h_n"][:4], layer.h_0[:4])


@pytest.mark.parametrize(("dtype", "steps", "B", "H", "multiprocessors"), TILES)
def test_every_size_of_tile(simt, dtype, steps, B, H, multiprocessors):
    check(simt, make(dtype, steps, B, H, reverse=True), multiprocessors=multiprocessors)


@pytest.mark.parametrize("H", [32, 36, 34, 33])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_every_width_of_copies(simt, dtype, H):
    check(simt, make(dtype, 2, 2, H))


@pytest.mark.parametrize("dtype", C_TYPES)
def test_many_chunks(simt, dtype):
    """More chunks of K than stages."""
    check(simt, make(dtype, 2, 1, 270, bias=False))


@pytest.mark.parametrize("absent", ["grad_output", "grad_h_n", "grad_c_n"])
@pytest.mark.parametrize("lengths", [None, [2, 0, 1]])
def test_absent_gradients_are_zero(simt, absent, lengths):
    check(simt, make("float32", 2, 3, 4, lengths=lengths), absent=(absent,))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gates_in_place_of_the_input_gates(simt, dtype):
    layer = make(dtype, 3, 5, 18, lengths=[3, 1, 0, 2, 3])
    apart = run_forward(simt, layer)
    for name, array in run_forward(
        simt, layer, gates=layer.input_gates, input_gates=SameAs("gates")
    ).items():
        np.testing.assert_array_equal(array, apart[name], err_msg=name)


@pytest.mark.parametrize("dtype", C_TYPES)
def test_a_row_does_not_depend_on_its_batch(simt, dtype):
    """37 rows in tiles of 32 or 64, and one of them alone in the smallest tile: the same bits."""
    B, b, H = 37, 35, 70 if dtype.endswith("16") else 21
    layer = make(dtype, 2, B, H, lengths=[2] * B)
    alone = replace(
        layer,
        **{name: getattr(layer, name)[b : b + 1] for name in ("h_0", "c_0", "lengths")},
        input_gates=layer.input_gates[:, b : b + 1],
    )

    def results(of: Layer, rows: slice, multiprocessors: int) -> dict[str, np.ndarray]:
        device = {"multiprocessors": multiprocessors}
        out = run_forward(simt, of, **device)
        saved = {name: array[:, rows] for name, array in saved_of(layer).items()}
        grads = grads_of(layer)
        grads = {name: x[:, rows] if x.ndim == 3 else x[rows] for name, x in grads.items()}
        return out | run_backward(simt, of, saved, grads, **device)

    everyone = results(layer, slice(None), 1)
    for name, array in results(alone, slice(b, b + 1), 4).items():
        expected = everyone[name]
        expected = expected[:, b : b + 1] if expected.ndim == 3 else expected[b : b + 1]
        np.testing.assert_array_equal(array, expected, err_msg=name)


def test_saturated_gates(simt):
    """exp overflows to infinity on the way to 0; nothing becomes NaN."""
    layer = make("float32", 1, 1, 4, bias=False)
    gates = np.repeat(np.array([-1e4, 1e4, np.inf, -np.inf], np.float32), 4)[None, None]
    out = run_forward(simt, replace(layer, input_gates=gates))
    np.testing.assert_array_equal(out["gates"].reshape(4, 4), np.repeat([[0], [1], [1], [0]], 4, 1))
    np.testing.assert_array_equal(out["cells"][0], layer.c_0)


def test_nothing_to_do(simt):
    layer = make("float32", 2, 0, 3)
    assert run_forward(simt, layer)["output"].shape == (2, 0, 3)
    assert run_backward(simt, layer, saved_of(layer), grads_of(layer))["grad_h_0"].shape == (0, 3)


@checkers_only
def test_weights_smaller_than_promised_are_noticed(simt):
    layer = make("float32", 1, 1, 5)
    with pytest.raises(KernelError, match=r"out of bounds: lstm_forward_step.*`weight_hh`"):
        run_forward(simt, replace(layer, weight_hh=layer.weight_hh[:-1]))


@pytest.mark.parametrize("dtype", C_TYPES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, [3, 0, 1, 2]])
def test_previous_outputs(simt, dtype, reverse, lengths):
    steps, B, H = 3, 4, 70
    layer = make(dtype, steps, B, H, lengths=lengths, reverse=reverse)
    outputs = make(dtype, 1, steps * B, H).h_0.reshape(steps, B, H)
    got = simt("lstm").run(
        f"LstmPrevious<{C_TYPES[dtype]}>",
        h_0=layer.h_0,
        output=outputs,
        lengths=layer.lengths,
        previous=Output((steps, B, H), stored(dtype)),
        **layer.sizes,
        reverse=reverse,
    )["previous"]
    expected = np.zeros_like(got)
    for b, length in enumerate(lengths or [steps] * B):
        for t in range(length):
            first = t == (length - 1 if reverse else 0)
            expected[t, b] = layer.h_0[b] if first else outputs[t + 1 if reverse else t - 1, b]
    np.testing.assert_array_equal(got, expected)
