# SPDX-License-Identifier: Apache-2.0
"""The samples that torch tests its own LSTM and LSTMCell with, given to ours: results, gradients, copies, errors."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import llmkern
from tests.conftest import assert_close

pytest.importorskip("expecttest")  # torch.testing._internal needs it
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch's own, of its float32 layers with projections.
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

OURS = {torch.nn.LSTM: llmkern.nn.LSTM, torch.nn.LSTMCell: llmkern.nn.LSTMCell}
INFOS = [info for info in module_db if info.module_cls in OURS]


def samples_of(info, dtype=torch.float64, training=True):
    return info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training
    )


CASES = [
    pytest.param(info, i, id=f"{info.module_cls.__name__}-{i}")
    for info in INFOS
    for i in range(len(samples_of(info)))
]
sampled = pytest.mark.parametrize(("info", "i"), CASES)


def test_all_of_them_are_there():
    assert [info.module_cls.__name__ for info in INFOS] == ["LSTMCell", "LSTM"]
    assert len(CASES) == 2 + 32


def twins(info, i, dtype=torch.float64, training=True):
    """Our module, torch's with the same parameters, what it is called with, and the sample itself."""
    sample = list(samples_of(info, dtype, training))[i]
    made = sample.constructor_input
    theirs = info.module_cls(*made.args, **made.kwargs, dtype=dtype).train(training)
    ours = OURS[info.module_cls](*made.args, **made.kwargs, dtype=dtype).train(training)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, sample.forward_input, sample


def leaves_of(call):
    return [t for t in tree_leaves((call.args, call.kwargs)) if isinstance(t, torch.Tensor)]


def values_and_gradients(module, args, kwargs):
    outputs = tree_leaves(module(*args, **kwargs))
    torch.manual_seed(2)
    upstream = [torch.randn_like(o) for o in outputs]
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    grads = torch.autograd.grad(outputs, [*inputs, *module.parameters()], upstream)
    return [*outputs, *grads]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@sampled
def test_values_and_gradients(info, i, dtype, training):
    ours, theirs, call, _ = twins(info, i, dtype, training)
    expected = values_and_gradients(theirs, call.args, call.kwargs)
    for a, b in zip(values_and_gradients(ours, call.args, call.kwargs), expected, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, None if dtype == torch.float64 else 4e-6)


@sampled
def test_equals_the_reference_of_the_sample(info, i):
    """For these that is the same module on a batch of one."""
    ours, _, call, sample = twins(info, i)
    expected = sample.reference_fn(ours, *call.args, **call.kwargs)
    for a, b in zip(
        tree_leaves(ours(*call.args, **call.kwargs)), tree_leaves(expected), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("check", ["gradcheck", "gradgradcheck"])
@sampled
def test_numerical_gradients(info, i, check):
    ours, _, call, _ = twins(info, i)
    names, parameters = zip(*ours.named_parameters(), strict=True)
    inputs, spec = torch.utils._pytree.tree_flatten((call.args, call.kwargs))

    def run(*values):
        args, kwargs = torch.utils._pytree.tree_unflatten(values[: len(inputs)], spec)
        given = dict(zip(names, values[len(inputs) :], strict=True))
        return tuple(tree_leaves(torch.func.functional_call(ours, given, args, kwargs)))

    options = {"check_undefined_grad": False} if check == "gradgradcheck" else {}
    checked = getattr(torch.autograd, check)
    assert checked(run, (*inputs, *parameters), fast_mode=True, **options)


@sampled
def test_non_contiguous_arguments_and_gradients(info, i):
    """As torch has it: every input, and every gradient from above, with strides of its own."""
    ours, _, call, _ = twins(info, i)
    expected = values_and_gradients(ours, call.args, call.kwargs)

    def strided(tensor):
        spread = torch.stack([tensor.detach(), torch.full_like(tensor, 7)], dim=-1)[..., 0]
        return spread.requires_grad_()

    args, kwargs = tree_map(strided, (call.args, call.kwargs))
    assert not all(t.is_contiguous() for t in tree_leaves((args, kwargs)))
    outputs = tree_leaves(ours(*args, **kwargs))
    torch.manual_seed(2)
    upstream = [torch.randn_like(o) for o in outputs]
    upstream = [torch.stack([g, g], dim=-1)[..., 0] for g in upstream]
    inputs = tree_leaves((args, kwargs))
    grads = torch.autograd.grad(outputs, [*inputs, *ours.parameters()], upstream)
    for a, b in zip([*outputs, *grads], expected, strict=True):
        assert torch.equal(a, b)


@sampled
def test_copies(info, i):
    """pickle, deepcopy, torch.save of the whole module, and state_dict: the same outputs, no shared parameters."""
    ours, theirs, call, _ = twins(info, i)
    expected = tree_leaves(ours(*call.args, **call.kwargs))
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    theirs.load_state_dict(ours.state_dict())
    for twin in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours), loaded):
        assert type(twin) is type(ours) and repr(twin) == repr(ours) == repr(theirs)
        for a, b in zip(tree_leaves(twin(*call.args, **call.kwargs)), expected, strict=True):
            assert torch.equal(a, b)
        for p, q in zip(twin.parameters(), ours.parameters(), strict=True):
            assert p.data_ptr() != q.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@sampled
def test_factory_arguments(info, i, dtype):
    """``device`` and ``dtype`` reach every parameter; ``to`` changes them, to the meta device and back too."""
    sample = list(samples_of(info))[i]
    made = sample.constructor_input
    module = OURS[info.module_cls](*made.args, **made.kwargs, device="meta", dtype=dtype)
    assert all(p.is_meta and p.dtype == dtype for p in module.parameters())
    call = tree_map(lambda t: t.to("meta", dtype), sample.forward_input.args)
    assert all(o.is_meta and o.dtype == dtype for o in tree_leaves(module(*call)))
    real = module.to_empty(device="cpu")
    real.reset_parameters()
    assert all(p.isfinite().all() and p.dtype == dtype for p in real.parameters())


@sampled
def test_gradients_accumulate_and_are_forgotten(info, i):
    ours, _, call, _ = twins(info, i)
    sums = []
    for _ in range(2):
        sum(o.sum() for o in tree_leaves(ours(*call.args, **call.kwargs))).backward()
        sums.append([p.grad.clone() for p in ours.parameters()])
    for once, twice in zip(*sums, strict=True):
        assert_close(twice, 2 * once)
    ours.zero_grad()
    assert all(p.grad is None for p in ours.parameters())


ERRORS = [
    (info, sample)
    for info in INFOS
    for dtype in (torch.float32, torch.float64)
    for sample in info.module_error_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=True
    )
]


@pytest.mark.parametrize(("info", "sample"), ERRORS)
def test_wrong_input_raises_the_same_type(info, sample):
    """Messages differ: ours name what was expected and what was there."""
    made, call = (
        sample.module_error_input.constructor_input,
        sample.module_error_input.forward_input,
    )
    if sample.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(sample.error_type, match=sample.error_regex):
            OURS[info.module_cls](*made.args, **made.kwargs)
        return
    module = OURS[info.module_cls](*made.args, **made.kwargs)
    with pytest.raises(sample.error_type, match=r"llmkern\.\w+: expected .*got"):
        module(*call.args, **call.kwargs)


def lstm(**options):
    return {"args": (3, 5), "kwargs": options, "cls": torch.nn.LSTM}


CELL = {"args": (3, 5), "kwargs": {}, "cls": torch.nn.LSTMCell}
ones = torch.ones
WRONG = {
    "no steps": (lstm(), ones(0, 2, 3)),
    "one dimension": (lstm(), ones(3)),
    "four dimensions": (lstm(), ones(1, 2, 2, 3)),
    "features": (lstm(), ones(4, 2, 7)),
    "dtype": (lstm(), ones(4, 2, 3).double()),
    "integers": (lstm(), ones(4, 2, 3).int()),
    "unbatched states": (lstm(), ones(4, 2, 3), (ones(1, 5), ones(1, 5))),
    "batched states": (lstm(), ones(4, 3), (ones(1, 2, 5), ones(1, 2, 5))),
    "batch of h_0": (lstm(), ones(4, 2, 3), (ones(1, 3, 5), ones(1, 2, 5))),
    "hidden size of c_0": (lstm(), ones(4, 2, 3), (ones(1, 2, 5), ones(1, 2, 4))),
    "layers of h_0": (lstm(num_layers=2), ones(4, 2, 3), (ones(1, 2, 5), ones(2, 2, 5))),
    "dtype of h_0": (lstm(), ones(4, 2, 3), (ones(1, 2, 5).double(), ones(1, 2, 5))),
    "cell: no dimension": (CELL, ones(())),
    "cell: three dimensions": (CELL, ones(4, 2, 3)),
    "cell: features": (CELL, ones(2, 7)),
    "cell: dtype": (CELL, ones(2, 3).double()),
    "cell: batch of c_0": (CELL, ones(2, 3), (ones(2, 5), ones(3, 5))),
    "cell: dimensions of c_0": (CELL, ones(2, 3), (ones(2, 5), ones(2, 1, 5))),
    "cell: dtype of h_0": (CELL, ones(2, 3), (ones(2, 5).double(), ones(2, 5))),
}


@pytest.mark.parametrize("name", WRONG)
def test_whoever_catches_torchs_exception_catches_ours(name):
    made, *call = WRONG[name]
    with pytest.raises((RuntimeError, ValueError, TypeError)) as torchs:
        made["cls"](*made["args"], **made["kwargs"])(*call)
    with pytest.raises(torchs.type, match=r"llmkern\.\w+: expected .*got"):
        OURS[made["cls"]](*made["args"], **made["kwargs"])(*call)
