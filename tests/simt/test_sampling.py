# SPDX-License-Identifier: Apache-2.0
"""Sampling's CUDA kernel, executed on the host: every output has the bits of the reference, row by row.

The reference is itself judged by the oracle (tests/ops/test_sampling_exact.py), to which some rows go here as well: it
shares no code with the kernel.
"""

import importlib.util
import itertools
import math
from importlib.machinery import PathFinder
from types import ModuleType

import numpy as np
import pytest

from tests.ops import sampling_oracle as oracle

from .harness import Output, Scratch, checkers_only, from_bfloat16, to_bfloat16

OFF = list(vars(oracle.Settings()).values())
COLUMNS = list(vars(oracle.Settings()))
CHOICES = {
    "temperature": [0.0, 0.7, 1.3, 5.0, 1e-3, 1e-29, 1e-31, 1e-300, 1e30, 1e300],
    "top_k": [1, 2, 3, 5, 50, 257, 10**6],
    "top_p": [1e-30, 0.01, 0.5, 0.9, 0.95, 0.999, 1 - 2**-53],
    "min_p": [1e-30, 1e-9, 0.01, 0.1, 0.5, 1.0],
    "typical_p": [1e-30, 0.05, 0.5, 0.9, 0.99],
    "repetition_penalty": [0.5, 1.2, 2.0, 1e-40, 3e38],
    "presence_penalty": [0.7, -0.7, 1e30],
    "frequency_penalty": [0.3, -0.3, 3e38, -3e38],
}
INVALID = {"token": -1, "valid": False, "rank": 0, "num_kept": 0, "processed": -np.inf}
INVALID |= dict.fromkeys(("logprob", "filtered_logprob", "entropy"), np.nan)


def _normal(V: int, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 3, V)


def _ties(V: int, rng: np.random.Generator) -> np.ndarray:
    return np.round(rng.normal(0, 2, V))


def _constant(V: int, rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random(V) < 0.5, 0.0, -0.0)  # the same number


def _peaked(V: int, rng: np.random.Generator) -> np.ndarray:
    x = rng.normal(-30, 15, V)
    x[rng.integers(V)] = 10
    return x


def _denormal(V: int, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 1e-41, V)


def _huge(V: int, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 3e38, V)


def _merged(V: int, rng: np.random.Generator) -> np.ndarray:
    """Many y that differ, with one y - m."""
    x = rng.integers(0, 20, V) * 1e-9
    x[rng.integers(V)] = 3
    return x


def _infinities(V: int, rng: np.random.Generator) -> np.ndarray:
    x = rng.normal(0, 3, V)
    x[rng.random(V) < 0.3] = -np.inf
    x[rng.random(V) < 0.05] = np.inf
    return x


def _nan(V: int, rng: np.random.Generator) -> np.ndarray:
    x = rng.normal(0, 3, V)
    x[rng.integers(V)] = np.copysign(np.nan, rng.normal())
    return x


def _nothing(V: int, rng: np.random.Generator) -> np.ndarray:
    return np.full(V, -np.inf)


KINDS = [_normal, _normal, _ties, _constant, _peaked, _denormal]
KINDS += [_huge, _merged, _infinities, _nan, _nothing]


def rows_of(kinds: list, B: int, V: int, rng: np.random.Generator) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.stack([kinds[b % len(kinds)](V, rng) for b in range(B)]).astype(np.float32)


def setting_rows(B: int, rng: np.random.Generator, share: float = 0.35) -> np.ndarray:
    """[B, 8]: every column is off, or with probability `share` one of its choices."""
    columns = []
    for name, off in zip(COLUMNS, OFF, strict=True):
        on = rng.random(B) < share
        columns.append(np.where(on, rng.choice(CHOICES[name], B), float(off)))
    return np.stack(columns, axis=1)


ON_REQUEST = ("logprob", "entropy", "rank", "processed")


def call(logits: np.ndarray, rng: np.random.Generator, **changed: object) -> dict[str, object]:
    """What a call is given: any seeds and positions, no filter, all there is to return, and whatever is changed.

    Besides the inputs of the reference: what the logits are stored as, how far apart their rows are, whether the mask
    is packed, and what is wanted.
    """
    B = len(logits)
    inputs = dict.fromkeys(
        ("bias", "bias_ids", "bias_values", "allowed", "prompt_ids", "output_ids")
    )
    inputs["settings"] = np.array([OFF], np.float64)
    inputs["seeds"] = rng.integers(-(2**63), 2**63, B)
    inputs["positions"] = rng.integers(-(2**63), 2**63, B)
    inputs |= {"storage": "float", "row_stride": None, "packed": False, "wanted": ON_REQUEST}
    return {"logits": logits, "num_logprobs": 0, **inputs, **changed}


def stored(logits: np.ndarray, storage: str) -> np.ndarray:
    """As they lie in memory, float32 rounded where they have fewer bits; bfloat16 as uint16."""
    if storage == "bfloat16":
        return to_bfloat16(logits)
    with np.errstate(over="ignore"):
        return logits.astype(np.float16 if storage == "float16" else np.float32)


def widened(array: np.ndarray, storage: str) -> np.ndarray:
    return from_bfloat16(array) if storage == "bfloat16" else array.astype(np.float32)


def spread(logits: np.ndarray, row_stride: int | None) -> np.ndarray:
    """Rows so far apart, with bits between them that are NaN in every type."""
    if row_stride is None:
        return logits
    gap = np.full((len(logits), row_stride - logits.shape[1]), -1, f"i{logits.itemsize}")
    return np.hstack([logits, gap.view(logits.dtype)])


def packed_bits(allowed: np.ndarray) -> np.ndarray:
    """Token v is bit v % 32 of word v / 32; all bits behind the last token are set."""
    V = allowed.shape[-1]
    whole = np.ones((*allowed.shape[:-1], -(-V // 32) * 32), bool)
    whole[..., :V] = allowed
    return np.packbits(whole, axis=-1, bitorder="little")


def mask_fields(allowed: np.ndarray | None, packed: bool) -> dict[str, object]:
    if allowed is None:
        return {"allowed": None, "allowed_stride": 0, "allowed_kind": 0}
    mask = packed_bits(allowed) if packed else allowed.view(np.uint8)
    stride = 0 if mask.ndim == 1 else mask.shape[1] // (4 if packed else 1)
    return {"allowed": mask, "allowed_stride": stride, "allowed_kind": 2 if packed else 1}


def workspace_bytes(B: int, V: int, num_logprobs: int) -> int:
    room = 2 ** (num_logprobs - 1).bit_length() if num_logprobs > 0 else 0
    return B * (-(-V // 4) * 4 * 8 + -(-room // 2) * 2 * 8)


def outputs(B: int, V: int, n: int, wanted: tuple[str, ...]) -> dict[str, Output | None]:
    of_row = {
        "token": np.int64,
        "valid": bool,
        "num_kept": np.int64,
        "filtered_logprob": np.float32,
    }
    all_of_them = {name: Output(B, dtype) for name, dtype in of_row.items()}
    on_request = {
        "logprob": Output(B, np.float32),
        "entropy": Output(B, np.float32),
        "rank": Output(B, np.int64),
        "processed": Output((B, V), np.float32),
    }
    all_of_them |= {name: on_request[name] if name in wanted else None for name in ON_REQUEST}
    top = {"top_ids": Output((B, n), np.int64), "top_logprobs": Output((B, n), np.float32)}
    return all_of_them | (top if n > 0 else dict.fromkeys(top))


def sample(simt, inputs: dict[str, object], multiprocessors: int = 1) -> dict[str, np.ndarray]:
    """Runs the kernel; rows are shared by blocks where there are more multiprocessors than rows."""
    fields = dict(inputs)
    storage, row_stride, packed, wanted = (
        fields.pop(name) for name in ("storage", "row_stride", "packed", "wanted")
    )
    n = fields["num_logprobs"]
    B, V = fields["logits"].shape

    def stride(name: str) -> int:
        array = fields[name]
        return 0 if array is None or len(array) != B else math.prod(array.shape[1:])

    fields |= {
        "logits": spread(stored(fields["logits"], storage), row_stride),
        "logits_stride": row_stride or V,
        "bias_stride": 0 if fields["bias"] is None or fields["bias"].ndim == 1 else V,
        "bias_ids_stride": stride("bias_ids"),
        "settings_stride": stride("settings") // 8,
        "seed_stride": stride("seeds"),
        "position_stride": stride("positions"),
        "B": B,
        "V": V,
    }
    for length, name in (
        ("prompt_length", "prompt_ids"),
        ("output_length", "output_ids"),
        ("num_bias_ids", "bias_ids"),
    ):
        fields[length] = 0 if fields[name] is None else fields[name].shape[1]
    fields |= mask_fields(fields["allowed"], packed)
    fields |= outputs(B, V, n, wanted)
    fields["workspace"] = Scratch(workspace_bytes(B, V, n), np.uint8)
    fields["error"] = np.zeros(4, np.int64)  # the two int32 first
    kernels = simt("sampling")
    kernels.configure(multiprocessors=multiprocessors)
    return kernels.run(f"Sample<{storage}>", **fields)


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """llmkern._reference without its package, which would load torch."""
    folder = importlib.util.find_spec("llmkern").submodule_search_locations
    spec = PathFinder.find_spec("llmkern._reference", folder)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_reference(reference: ModuleType, inputs: dict[str, object]) -> dict[str, np.ndarray]:
    B = len(inputs["logits"])
    given = {
        name: value
        for name, value in inputs.items()
        if name not in ("storage", "row_stride", "packed", "wanted")
    }
    given["logits"] = widened(stored(given["logits"], inputs["storage"]), inputs["storage"])
    if given["positions"] is None:
        given["positions"] = np.arange(B) * (len(given["seeds"]) != B)
    for name in ("bias", "allowed", "bias_ids", "bias_values", "settings", "seeds", "positions"):
        if given[name] is not None:
            of_row = given[name].shape[-1:] if name not in ("seeds", "positions") else ()
            given[name] = np.ascontiguousarray(np.broadcast_to(given[name], (B, *of_row)))
    expected = reference.sample(**given)
    return expected | {"valid": expected["token"] >= 0}


def check(
    simt, reference: ModuleType, inputs: dict[str, object], multiprocessors: int = 1
) -> dict[str, np.ndarray]:
    """Compares every output, bit by bit; returns them."""
    got = sample(simt, inputs, multiprocessors)
    expected = by_reference(reference, inputs)
    assert got.pop("error").tolist() == [0, 0, 0, 0]
    for name, array in got.items():
        differ = np.flatnonzero(
            array.view(f"i{array.itemsize}") != expected[name].view(f"i{array.itemsize}")
        )
        row = differ[0] // max(1, array[0].size) if len(differ) else None
        assert row is None, (
            f"{name}, row {row}: {inputs['settings'][row % len(inputs['settings'])]}: "
            f"{array[row]} instead of {expected[name][row]}"
        )
    return got


# ---- rows of every kind ----


def mixed(B: int, V: int, num_logprobs: int, extras: bool) -> dict[str, object]:
    """Rows of every kind under settings of every kind; extras are a bias, a mask and seen tokens."""
    rng = np.random.default_rng([V, extras, num_logprobs])
    inputs = call(rows_of(KINDS, B, V, rng), rng, num_logprobs=num_logprobs)
    inputs["settings"] = setting_rows(B, rng)
    if extras:
        inputs["bias"] = rng.normal(0, 2, (B, V)).astype(np.float32)
        inputs["bias"][rng.random((B, V)) < 0.01] = -np.inf
        inputs["allowed"] = rng.random((B, V)) < rng.choice([0.1, 0.5, 0.95, 1.0], (B, 1))
        inputs["prompt_ids"] = rng.integers(-2, V + 2, (B, 6))
        inputs["output_ids"] = rng.integers(-2, min(V, 5) + 1, (B, 9))
        inputs["bias_ids"], inputs["bias_values"] = sparse_bias(B, V, rng)
    return inputs


def sparse_bias(B: int, V: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Up to 9 tokens a row, the first among them, some of them padding; infinite for some."""
    ids = np.stack([rng.permutation(V + 6)[:9] - 3 for _ in range(B)])
    ids[:, 0] = np.where((ids == 0).any(axis=1), -1, 0)
    values = rng.normal(0, 3, ids.shape).astype(np.float32)
    values[rng.random(ids.shape) < 0.03] = -np.inf
    values[rng.random(ids.shape) < 0.03] = np.inf
    return ids, values


def unless_sanitized(*shapes: tuple[int, int, int]) -> list:
    return [pytest.param(*shape, marks=checkers_only) for shape in shapes]


# V, B, num_logprobs: both block sizes, rows that are aligned and rows that are not, fewer tokens than threads.
ONE_BLOCK = [(1, 40, 1), (2, 40, 1), (31, 60, 5), (33, 60, 33), (257, 60, 257)]
ONE_BLOCK += [(1000, 22, 5), (1001, 11, 70), (2500, 5, 0), (2300, 3, 2300)]
ONE_BLOCK += unless_sanitized((1000, 44, 0), (2500, 11, 1), (4099, 11, 5), (4100, 11, 0))
# The last has as many slices as there may be, and the last of those is short.
SLICED = [
    (4099, 3, 5),
    *unless_sanitized((4096, 11, 0), (4099, 11, 7), (6400, 11, 20), (65601, 1, 3)),
]


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(("V", "B", "num_logprobs"), ONE_BLOCK)
def test_bits_are_those_of_the_reference(simt, reference, V, B, num_logprobs, extras):
    check(simt, reference, mixed(B, V, num_logprobs, extras))


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(("V", "B", "num_logprobs"), SLICED)
def test_several_blocks_a_row_give_the_same_bits(simt, reference, V, B, num_logprobs, extras):
    check(simt, reference, mixed(B, V, num_logprobs, extras), multiprocessors=1000)


def test_slices_have_much_to_do(simt, reference):
    """Every row draws from all of its tokens, with a penalty in every slice."""
    rng = np.random.default_rng(5)
    inputs = call(rows_of([_normal, _constant], 6, 6200, rng), rng)
    inputs["settings"] = np.array([[3, 0, 1, 0, 1, 1.5, 0.1, 0.1]])
    inputs["output_ids"] = rng.integers(0, 6200, (6, 700))
    tokens = check(simt, reference, inputs, multiprocessors=1000)["token"]
    assert len(set((tokens // 2100).tolist())) > 1


@pytest.mark.parametrize("name", COLUMNS)
def test_every_setting_alone(simt, reference, name):
    rng = np.random.default_rng(COLUMNS.index(name))
    rows = np.tile(np.array(OFF, np.float64), (len(CHOICES[name]) * 2, 1))
    rows[:, COLUMNS.index(name)] = np.repeat(CHOICES[name], 2)
    inputs = call(rows_of([_normal, _ties], len(rows), 300, rng), rng, settings=rows)
    inputs["output_ids"] = rng.integers(-1, 40, (len(rows), 30))
    check(simt, reference, inputs)


def test_filters_one_after_another(simt, reference):
    rng = np.random.default_rng(1)
    steps = [[0, 50, 400], [1, 0.9], [0, 0.01], [1, 0.8]]
    rows = [
        [temperature, *filters, 1, 0, 0]
        for temperature in (1, 3)
        for filters in itertools.product(*steps)
    ]
    logits = rows_of([_normal, _ties], len(rows), 700, rng)
    out = check(simt, reference, call(logits, rng, settings=np.array(rows, np.float64)))
    assert len({int(n) for n in out["num_kept"]}) > 20


def test_shared_bias_mask_settings_and_seed(simt, reference):
    rng = np.random.default_rng(2)
    inputs = call(rows_of([_normal], 5, 333, rng), rng, num_logprobs=3)
    inputs["bias"] = rng.normal(0, 2, 333).astype(np.float32)
    inputs["allowed"] = rng.random(333) < 0.7
    inputs["settings"] = np.array([[0.8, 40, 0.9, 0.01, 0.95, 1.1, 0.2, 0.3]])
    inputs["seeds"] = np.array([7])
    inputs["prompt_ids"] = rng.integers(0, 333, (5, 200))
    out = check(simt, reference, inputs)
    assert inputs["allowed"][out["token"]].all()
    check(
        simt, reference, inputs | {"output_ids": inputs["prompt_ids"][:, ::3], "prompt_ids": None}
    )


@pytest.mark.parametrize("multiprocessors", [1, pytest.param(1000, marks=checkers_only)])
@pytest.mark.parametrize("row_stride", [2301, 2304])
@pytest.mark.parametrize("storage", ["float", "bfloat16", "float16"])
def test_logits_as_they_are_stored(simt, reference, storage, row_stride, multiprocessors):
    V = 2299 if multiprocessors == 1 else 4100
    inputs = mixed(6, V, 3, extras=row_stride % 2 == 1)
    inputs |= {
        "storage": storage,
        "row_stride": row_stride + V - 2299,
        "packed": row_stride == 2301,
    }
    valid = check(simt, reference, inputs, multiprocessors)["valid"]
    assert valid.any()


@pytest.mark.parametrize("V", [1, 31, 32, 33, 150, 1001])
def test_a_packed_mask_is_that_of_bytes(simt, V):
    inputs = mixed(22, V, 1, extras=True)
    as_bytes = sample(simt, inputs)
    for name, array in sample(simt, inputs | {"packed": True}).items():
        np.testing.assert_array_equal(array, as_bytes[name])
    shared = inputs["allowed"][0] | (np.arange(V) == 0)
    for packed in (False, True):
        masked = sample(simt, inputs | {"packed": packed, "allowed": shared})
        assert shared[masked["token"]][masked["valid"]].all()


def test_a_sparse_bias_is_that_of_every_token(simt):
    """In its place: behind the bias of every token, in front of mask and penalties."""
    rng = np.random.default_rng(6)
    B, V = 12, 3000
    inputs = call(rows_of([_normal, _ties], B, V, rng), rng, settings=setting_rows(B, rng))
    inputs["output_ids"] = rng.integers(0, V, (B, 90))
    ids = np.stack([rng.permutation(V)[:700] for _ in range(B)])
    values = rng.normal(0, 3, ids.shape).astype(np.float32)
    whole = np.zeros((B, V), np.float32)
    np.put_along_axis(whole, ids, values, axis=1)
    expected = sample(simt, inputs | {"bias": whole})
    padded = np.where(np.arange(701) < 700, np.pad(ids, ((0, 0), (0, 1))), V)
    given = {"bias_ids": padded, "bias_values": np.pad(values, ((0, 0), (0, 1)))}
    for name, array in sample(simt, inputs | given).items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(("V", "multiprocessors"), [(700, 1), (4100, 1000)])
def test_what_nobody_asks_for_changes_nothing(simt, V, multiprocessors, extras):
    inputs = mixed(22 if V < 4000 else 5, V, 0, extras)
    whole = sample(simt, inputs, multiprocessors)
    for wanted in ((), *((name,) for name in ON_REQUEST)):
        got = sample(simt, inputs | {"wanted": wanted}, multiprocessors)
        assert got.keys() == whole.keys() - set(ON_REQUEST) | set(wanted)
        for name, array in got.items():
            np.testing.assert_array_equal(array, whole[name])


@pytest.mark.parametrize("shared_seed", [False, True])
@pytest.mark.parametrize("positions", [None, np.array([11])])
def test_positions_left_out_or_shared(simt, reference, positions, shared_seed):
    rng = np.random.default_rng(7)
    inputs = call(rows_of([_normal], 6, 333, rng), rng, positions=positions)
    inputs["seeds"] = np.array([3]) if shared_seed else np.full(6, 3)
    tokens = check(simt, reference, inputs)["token"]
    assert len(set(tokens.tolist())) > 1


def test_zeros_of_either_sign(simt, reference):
    """They are equal, and processed as they are."""
    rng = np.random.default_rng(8)
    zeros = np.array([[-0.0, 0.0, -1], [0.0, -0.0, -1], [-0.0, -1, -1], [-1, 0, -0.0]], np.float32)
    for settings in ([1, 1, 1, 0, 1], [0.7, 0, 1, 0, 1], [2, 0, 1, 0.9, 1], [1, 0, 0.1, 0, 1]):
        inputs = call(zeros, rng, settings=np.array([[*settings, 1.0, 0, 0]]), num_logprobs=3)
        assert np.signbit(check(simt, reference, inputs)["processed"][2, 0])
        inputs["bias"] = np.zeros(3, np.float32)
        assert not np.signbit(check(simt, reference, inputs)["processed"][2, 0])


def test_integers_are_those_of_the_oracle(simt):
    rng = np.random.default_rng(3)
    B, V, n = 33, 150, 12
    inputs = call(rows_of(KINDS, B, V, rng), rng, num_logprobs=n, settings=setting_rows(B, rng))
    inputs["output_ids"] = rng.integers(-2, 9, (B, 9))
    got = sample(simt, inputs)
    for b in range(B):
        settings = oracle.Settings(*inputs["settings"][b].tolist())
        place = int(inputs["seeds"][b]), int(inputs["positions"][b])
        row = oracle.sample(
            inputs["logits"][b], settings, *place, output_ids=inputs["output_ids"][b].tolist()
        )
        top = (row.order + [-1] * n)[:n]
        assert [got[name][b] for name in ("token", "rank", "num_kept")] == [
            row.token,
            row.rank,
            row.num_kept,
        ]
        assert got["top_ids"][b].tolist() == top


@checkers_only
def test_more_rows_than_blocks(simt):
    rng = np.random.default_rng(4)
    inputs = call(np.full((1027, 1), np.nan, np.float32), rng)
    inputs["logits"][[1, 1025]] = 0  # both are the second row of a block
    out = sample(simt, inputs)
    assert np.flatnonzero(out["token"] == 0).tolist() == [1, 1025]
    assert (out["token"] == -1).sum() == 1025


def test_no_rows(simt):
    inputs = call(np.zeros((0, 7), np.float32), np.random.default_rng(0), num_logprobs=2)
    out = sample(simt, inputs)
    assert out["token"].shape == (0,)
    assert out["top_ids"].shape == (0, 2)


# ---- settings out of range ----

WRONG = {
    "temperature": [-1.0, np.inf, np.nan, -1e-300],
    "top_k": [-1.0, 2.5, np.inf, np.nan],
    "top_p": [0.0, 1.5, -0.5, np.nan],
    "min_p": [-0.1, 1.1, np.nan],
    "typical_p": [0.0, 2.0, np.nan],
    "repetition_penalty": [0.0, -1.0, np.inf, 3.5e38, np.nan],
    "presence_penalty": [np.inf, -np.inf, 3.5e38, np.nan],
    "frequency_penalty": [np.inf, -1e39, np.nan],
}
SAMPLE_SETTING = 3


@pytest.mark.parametrize("name", WRONG)
def test_a_setting_out_of_range_is_reported_and_its_row_invalid(simt, name):
    rng = np.random.default_rng(0)
    for value in WRONG[name]:
        inputs = call(rows_of([_normal], 3, 10, rng), rng, num_logprobs=2)
        assert_reported(simt, inputs, name, value)


def test_a_setting_out_of_range_is_reported_with_several_blocks_a_row(simt):
    rng = np.random.default_rng(0)
    inputs = call(rows_of([_normal], 3, 4100, rng), rng, num_logprobs=2)
    assert_reported(simt, inputs, "top_p", 0.0, multiprocessors=1000)


def assert_reported(
    simt, inputs: dict[str, object], name: str, value: float, multiprocessors: int = 1
) -> None:
    """Of three rows the second has a wrong setting; the others are as they were without it."""
    expected = sample(simt, inputs, multiprocessors)
    column = COLUMNS.index(name)
    inputs["settings"] = np.tile(np.array(OFF, np.float64), (3, 1))
    inputs["settings"][1, column:] = value
    got = sample(simt, inputs, multiprocessors)
    bits = int(np.float64(value).view(np.int64))
    assert got.pop("error").tolist() == [SAMPLE_SETTING | 1 << 32, 1, bits, column]
    for field, array in got.items():
        invalid = INVALID.get(field, -1 if field == "top_ids" else np.nan)
        np.testing.assert_array_equal(array[1], np.full_like(array[1], invalid))
        np.testing.assert_array_equal(array[[0, 2]], expected[field][[0, 2]])
