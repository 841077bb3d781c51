# SPDX-License-Identifier: Apache-2.0
"""The emulated GPU does what CUDA's documentation says: every primitive, against numpy."""

import numpy as np
import pytest

from .harness import KernelError, Kernels, Output, Scratch, from_bfloat16, to_bfloat16

THREAD = np.arange(64)
LANE = THREAD % 32


def run(kernels: Kernels, kernel: str, values, out, counters=(0,)) -> dict[str, np.ndarray]:
    values = np.asarray(values, np.float32)
    return kernels.run(
        kernel,
        **{"in": values},
        out=Output(out, np.float32),
        scratch=np.zeros(512, np.float32),
        counters=np.array(counters, np.int32),
        N=values.size,
    )


def test_shuffles(simt):
    t, first = THREAD, THREAD - LANE
    expected = [
        first + 3,
        t // 8 * 8 + 1,
        np.where(LANE >= 2, t - 2, t),
        np.where(t % 4 >= 1, t - 1, t),
        np.where(LANE < 30, t + 2, t),
        np.where(t % 4 < 3, t + 1, t),
        t ^ 16,
        first + 31.5,
        t ^ 1,
        first + np.where(LANE < 16, 15, 16),
    ]
    out = run(simt("kernels/warps"), "shuffles", THREAD, (len(expected), 64))["out"]
    np.testing.assert_array_equal(out, expected)


def test_votes_and_warp_reductions(simt):
    x, warps = (THREAD - 10).reshape(2, 32), THREAD.reshape(2, 32)
    per_warp = [
        ((x % 3) == 0).sum(1),
        (x == 40).any(1),
        (x < 22).all(1),
        x.sum(1),
        x.min(1),
        x.max(1),
        [True, True],
        warps.max(1),
        warps.sum(1),
        np.bitwise_and.reduce(warps | 32, axis=1),
        np.bitwise_or.reduce(warps, axis=1),
        np.bitwise_xor.reduce(warps * warps, axis=1),
        [32, 32],
        [53, 53],
        [1, 1],
        [0, 0],
    ]
    out = run(simt("kernels/warps"), "votes", THREAD, (len(per_warp), 64))["out"]
    np.testing.assert_array_equal(out, np.repeat(np.array(per_warp, np.float32), 32, axis=1))


def test_reductions_of_common_cuh(simt):
    x, warps = THREAD, THREAD.reshape(2, 32)
    expected = [
        np.repeat(warps.sum(1), 32),
        warps.cumsum(1).ravel(),
        np.full(64, x.sum()),
        np.full(64, x.sum()),
        np.full(64, 63),
        x.cumsum(),
        np.zeros(64),
    ]
    kernels = simt("kernels/warps")
    out = run(kernels, "reductions", x, (len(expected), 64))["out"]
    np.testing.assert_array_equal(out, expected)
    out = run(kernels, "one_warp", x[:32], (2, 32))["out"]
    np.testing.assert_array_equal(out, [np.full(32, x[:32].sum()), x[:32].cumsum()])


def test_blocks_and_grids_in_three_dimensions(simt):
    out = run(simt("kernels/warps"), "three_dimensions", THREAD, (8, 64))["out"]
    np.testing.assert_array_equal(out, THREAD // 32 * 32 + 100 * np.arange(8)[:, None])


def test_atomics(simt):
    t = np.arange(128)
    before = [0, 200, 0, 0, 0, 0, 2**31 - 1, 0, 0, 0, 0]
    result = run(simt("kernels/atomics"), "atomics", t, 128, before)
    xor = int(np.bitwise_xor.reduce(t))
    expected = [t.sum(), 200 - 128, -127, 127, 2**31 - 1, xor, 0, 28, 72, 7, 128]
    np.testing.assert_array_equal(result["counters"], expected)
    assert result["scratch"][0] == 64
    np.testing.assert_array_equal(result["out"], 64)


def test_bits_and_rounded_arithmetic(simt):
    out = run(simt("kernels/atomics"), "bits", [1, 2, 3], 16)["out"]
    np.testing.assert_array_equal(
        out, [72, 94, 45, 1, 6, 1.5, 0.25, 2.0**-24, 4, 4, 3, 8, 6, 4, 5, 11]
    )


def test_cooperative_grid(simt):
    values = np.arange(320, dtype=np.float32)
    kernels = simt("kernels/groups")
    np.testing.assert_array_equal(run(kernels, "ring", values, 320)["out"], values + 5)
    out = run(kernels, "own_barrier", values, 320)["out"]
    np.testing.assert_array_equal(out, np.roll(values, -64))


def test_clusters(simt):
    values = np.arange(384, dtype=np.float32).reshape(2, 3, 64)
    out = run(simt("kernels/groups"), "clusters", values, (2, 3, 64))["out"]
    expected = np.repeat(values.sum(1, keepdims=True) + 3, 3, axis=1)
    np.testing.assert_array_equal(out, expected)
    assert (run(simt("kernels/groups"), "large_cluster", [0], 16)["out"] == 16).all()


REFUSED = [
    ("nothing", r"grid \(1, 1, 1\), block \(1025, 1, 1\), 0 bytes.*invalid configuration argument"),
    ("too_much_shared", r"233472 bytes of dynamic shared memory failed: invalid argument"),
    ("grid_too_large", r"grid \(1000, 1, 1\).*cooperative failed: too many blocks in cooperative"),
    ("odd_cluster", r"clusters of 2 failed: invalid configuration"),
]


@pytest.mark.parametrize(("kernel", "message"), REFUSED)
def test_launch_that_no_device_would_take(simt, kernel, message):
    with pytest.raises(KernelError, match=r"llmkern\.case: launch of .*" + message):
        run(simt("kernels/groups"), kernel, [0], 0)


def test_no_clusters_before_capability_90(simt):
    with pytest.raises(KernelError, match="clusters of 3 failed: invalid configuration"):
        run(simt("kernels/groups", 800), "clusters", np.zeros(384), 384)


@pytest.mark.parametrize("arch", [800, 900])
def test_asynchronous_copies(simt, arch):
    values = np.arange(64 * 5, dtype=np.float32)
    kernels = simt("kernels/pipeline", arch)
    out = run(kernels, "double_buffer", values, 64)["out"]
    np.testing.assert_array_equal(out, values.reshape(5, 64).sum(0)[THREAD ^ 1])
    out = run(kernels, "wide_copies", values, 64)["out"]
    np.testing.assert_array_equal(out, np.where(THREAD // 4 % 2 == 0, THREAD, 0))


@pytest.mark.parametrize("kernel", ["named_barriers", "mbarriers"])
def test_producer_and_consumer(simt, kernel):
    values = np.arange(32 * 7, dtype=np.float32)
    out = run(simt("kernels/pipeline"), kernel, values, 32)["out"]
    np.testing.assert_array_equal(out, values.reshape(7, 32).sum(0)[::-1])


def test_bulk_copies(simt):
    values = np.arange(64 * 5, dtype=np.float32)
    out = run(simt("kernels/pipeline"), "bulk_copies", values, 64)["out"]
    np.testing.assert_array_equal(out, values.reshape(5, 64).sum(0)[THREAD ^ 1])


def to_tf32(x: np.ndarray) -> np.ndarray:
    return ((x.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)


MATRICES = {
    "multiply<bfloat16>": (16, lambda x: from_bfloat16(to_bfloat16(x))),
    "multiply<float16>": (16, lambda x: x.astype(np.float16)),
    "multiply_tf32": (8, to_tf32),
}


@pytest.mark.parametrize("kernel", MATRICES)
def test_matrix_instructions(simt, kernel):
    K, rounded = MATRICES[kernel]
    rng = np.random.default_rng(0)
    A, B, C = (rng.standard_normal(s).astype(np.float32) for s in [(16, K), (K, 8), (16, 8)])
    values = np.concatenate([A.ravel(), B.ravel(), C.ravel()])
    out = run(simt("kernels/matrices"), kernel, values, (16, 8))["out"]
    expected = rounded(A).astype(np.float64) @ rounded(B).astype(np.float64) + C
    np.testing.assert_array_equal(out, expected.astype(np.float32))


def test_half_types_round_to_nearest_even(simt):
    rng = np.random.default_rng(0)
    bits = rng.integers(2**32, size=4000, dtype=np.uint32)
    edges = np.array([0, 0x1000, 0x8000, 0x33000000, 0x33000001, 0x387FE000, 0x38800000], np.uint32)
    large = np.array([0x477FEFFF, 0x477FF000, 0x7F7FFFFF, 0x7F800000, 0x3F808000], np.uint32)
    halves = (rng.integers(2**16, size=500, dtype=np.uint32) << 16) | 0x8000
    values = np.concatenate([bits, edges, large, halves]).view(np.float32)
    values = values[~np.isnan(values)]
    out = run(simt("kernels/matrices"), "narrowed", values, (2, values.size))["out"]
    np.testing.assert_array_equal(out[0], from_bfloat16(to_bfloat16(values)))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out[1], values.astype(np.float16).astype(np.float32))


def test_half_types_widen_exactly(simt):
    out = run(simt("kernels/matrices"), "widened", [0], (2, 65536))["out"]
    every = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(out[0], from_bfloat16(every))
    np.testing.assert_array_equal(out[1], every.view(np.float16).astype(np.float32))


def test_wrong_arguments_are_refused(simt):
    kernels = simt("kernels/warps")
    with pytest.raises(TypeError, match="shuffles has the fields"):
        kernels.run("shuffles", out=None)
    fields = {"out": None, "scratch": Scratch(1, np.float32), "counters": None, "N": 0}
    with pytest.raises(TypeError, match="in points to float32, got float64"):
        kernels.run("shuffles", **{"in": np.zeros(3)}, **fields)
    with pytest.raises(TypeError, match="in is read only"):
        kernels.run("shuffles", **{"in": Output(3, np.float32)}, **fields)
