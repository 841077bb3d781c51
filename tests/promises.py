# SPDX-License-Identifier: Apache-2.0
"""What every operator and layer promises, whatever it computes: one list of operators, one list of promises.

A new family adds its operators to OPS and gets every promise on the CPU (tests/test_promises.py), on the emulated GPU
(tests/simt/operators.py) and on a GPU (tests/cuda/test_promises.py). A promise takes an `Op` and a device. What an
operator does not keep is in its `owes`, with the reason; the day it does, the test says so.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import llmkern
from tests.conftest import ROOT, assert_close

Device = torch.device | str
Arguments = Sequence[Tensor | None]
Promise = Callable[["Op", Device], None]


@dataclass(frozen=True)
class Op:
    """A call to test.

    Attributes:
        name: for the test's name.
        forward: the function, deterministic given its arguments.
        arguments: on the CPU, None where one is left out. A floating one that requires a gradient gets one.
            Their shapes differ where they can, so that a gradient is known by its shape.
        family: the stem in csrc/kernels.
        twin: the same of torch, where that has one.
        samples: the places of the arguments that a batch of samples has one of each; the others are parameters.
        joint: places whose gradients one computation gives, whichever of them is wanted.
        free: places whose gradients come with any other's.
        module: of a layer itself; its parameters are the last arguments.
        owes: promises by name that are not kept yet, and why.
    """

    name: str
    forward: Callable[..., Any]
    arguments: tuple[Tensor | None, ...]
    family: str = ""
    twin: Callable[..., Any] | None = None
    samples: tuple[int, ...] = (0,)
    joint: tuple[int, ...] = ()
    free: tuple[int, ...] = ()
    module: nn.Module | None = None
    owes: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def differentiable(self) -> bool:
        return any(t is not None and t.requires_grad for t in self.arguments)


def leaf(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def moved(
    arguments: Arguments, device: Device, dtype: torch.dtype | None = None
) -> list[Tensor | None]:
    """Copies on a device, leaves where they were leaves; floating ones of another dtype where one is given."""

    def copied(t: Tensor) -> Tensor:
        to = dtype if dtype is not None and t.is_floating_point() else t.dtype
        return t.detach().to(device, to, copy=True).requires_grad_(t.requires_grad)

    return [None if t is None else copied(t) for t in arguments]


def tensors_of(outputs: Any) -> list[Tensor]:
    """Of a tensor, or of however nested tuples of them; None where a result was not asked for."""
    return [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def loss_of(outputs: Any) -> Tensor:
    """A sum of squares, whose own gradient needs nothing from the host."""
    wide = (
        t if t.dtype == torch.float64 else t.float()
        for t in tensors_of(outputs)
        if t.is_floating_point()
    )  # fmt: skip
    return sum(t.square().sum() for t in wide)  # type: ignore[return-value]


def results(
    forward: Callable[..., Any], arguments: Arguments, parameters: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Outputs, then the gradients of every argument that requires one, and of what else `forward` depends on."""
    outputs = tensors_of(forward(*arguments))
    leaves = [*(t for t in arguments if t is not None and t.requires_grad), *parameters]
    if not leaves:
        return outputs
    loss = loss_of([t for t in outputs if t.requires_grad])
    return [t.detach() for t in outputs] + list(torch.autograd.grad(loss, leaves))


def assert_same_bits(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(got) == len(expected) > 0
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        a, b = a.detach().cpu(), b.detach().cpu()
        assert a.dtype == b.dtype and a.shape == b.shape, f"result {i}"
        if a.is_floating_point():
            assert torch.equal(a.isnan(), b.isnan()), f"result {i} has NaN elsewhere"
            a, b = a.nan_to_num(), b.nan_to_num()
        assert torch.equal(a, b), f"result {i} differs in {int((a != b).sum())} of {a.numel()}"


def assert_all_close(got: Any, expected: Any, tolerance: float | None = None) -> None:
    got, expected = tensors_of(got), tensors_of(expected)
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, tolerance) if a.is_floating_point() else assert_same_bits([a], [b])


def of_leaves(
    op: Op, arguments: Arguments
) -> tuple[Callable[..., Any], tuple[int, ...], tuple[Tensor, ...]]:
    """The operator as a function of those arguments alone that want gradients; their places and values."""
    places = tuple(i for i, t in enumerate(arguments) if t is not None and t.requires_grad)

    def forward(*leaves: Tensor) -> Any:
        given = list(arguments)
        for place, value in zip(places, leaves, strict=True):
            given[place] = value
        return op.forward(*given)

    return forward, places, tuple(arguments[i].detach() for i in places)  # type: ignore[union-attr]


class Calls(TorchDispatchMode):
    """Notes the calls of this package's operators, with what they returned."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = func(*args, **(kwargs or {}))
        if func.namespace == "llmkern":
            self.seen.append((func, args, dict(kwargs or {}), output))
        return output


# ---- what is promised of every operator ----


def same_bits_on_every_run(op: Op, device: Device) -> None:
    arguments = moved(op.arguments, device)
    expected = results(op.forward, arguments)
    for _ in range(5):
        assert_same_bits(results(op.forward, arguments), expected)


def passes_opcheck(op: Op, device: Device) -> None:
    """Every operator below it, of the forward and of the backward pass, with the arguments that it got there."""
    calls = Calls()
    with calls:
        results(op.forward, moved(op.arguments, device))
    assert calls.seen, f"{op} calls no operator of llmkern"
    checked = set()
    for func, args, kwargs, _ in calls.seen:
        if func not in checked:
            checked.add(func)
            copies = torch.utils._pytree.tree_map_only(
                Tensor, lambda t: moved([t.detach().requires_grad_(t.requires_grad)], device)[0], (args, kwargs)
            )  # fmt: skip
            torch.library.opcheck(func, *copies)


def compiles_in_one_graph_and_once(op: Op, device: Device) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    arguments = moved(op.arguments, device)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op.forward, fullgraph=True, backend=counter)
    for _ in range(3):
        assert_same_bits(results(compiled, arguments), results(op.forward, arguments))
        with torch.no_grad():
            for t in arguments:
                if t is not None and t.is_floating_point():
                    t.mul_(0.75)
    assert counter.frame_count == 1


def takes_any_strides(op: Op, device: Device) -> None:
    """What is not contiguous, and what repeats itself in memory, gives the bits of a contiguous copy."""
    for place, t in enumerate(op.arguments):
        if t is None or t.dim() == 0:
            continue
        apart = torch.stack([t.detach(), t.detach()], -1)[..., 0]
        repeated = t.detach()[:1].expand(t.shape)
        for view in (apart, repeated):
            assert not view.is_contiguous() or view.shape[0] == 1
            expected, got = list(op.arguments), list(op.arguments)
            expected[place] = view.contiguous().requires_grad_(t.requires_grad)
            expected, got = moved(expected, device), moved(got, device)
            got[place] = view.to(device).requires_grad_(t.requires_grad)
            assert_same_bits(results(op.forward, got), results(op.forward, expected))


def takes_gradients_of_any_strides(op: Op, device: Device) -> None:
    """The gradient that a sum sends down is one number with strides of 0."""
    arguments = moved(op.arguments, device)
    leaves = [t for t in arguments if t is not None and t.requires_grad]
    outputs = [t for t in tensors_of(op.forward(*arguments)) if t.requires_grad]
    one = torch.ones((), device=device)
    found = []
    for dense in (False, True):
        upstream = [one.to(t.dtype).expand(t.shape) for t in outputs]
        upstream = [u.contiguous() for u in upstream] if dense else upstream
        found.append(torch.autograd.grad(outputs, leaves, upstream, retain_graph=True))
    assert_same_bits(*found)


def only_wanted_gradients(op: Op, device: Device) -> None:
    """One argument alone gets the gradient that it gets among all, and no operator computes another argument's."""
    arguments = moved(op.arguments, device)
    leaves = [i for i, t in enumerate(arguments) if t is not None and t.requires_grad]
    everything = dict(zip(leaves, results(op.forward, arguments)[-len(leaves) :], strict=True))
    for wanted in leaves:
        alone = moved(op.arguments, device)
        for i in leaves:
            alone[i].requires_grad_(i == wanted)  # type: ignore[union-attr]
        calls = Calls()
        with calls:
            *_, gradient = results(op.forward, alone)
        assert_close(gradient, everything[wanted])
        shapes = {i: t.shape for i, t in enumerate(alone) if i in leaves}  # type: ignore[union-attr]
        with_it = {wanted, *op.free, *(op.joint if wanted in op.joint else ())}
        unwanted = {shapes[i] for i in leaves} - {shapes[i] for i in leaves if i in with_it}
        for func, _, _, output in calls.seen:
            if "backward" in func.name():
                computed = unwanted & {t.shape for t in tensors_of(output)}
                assert not computed, (
                    f"{func} computes gradients of {computed} for argument {wanted}"
                )


def gradients_are_right(op: Op, device: Device) -> None:
    forward, _, values = of_leaves(op, moved(op.arguments, device))
    outputs = lambda *leaves: tuple(t for t in tensors_of(forward(*leaves)) if t.requires_grad)  # noqa: E731
    torch.autograd.gradcheck(outputs, [v.requires_grad_() for v in values], fast_mode=True)


def has_forward_derivatives(op: Op, device: Device) -> None:
    """With tangents v and upstream gradients u, <u, J v> = <J^T u, v>; by torch.func and by dual numbers."""
    forward, _, values = of_leaves(op, moved(op.arguments, device))
    tangents = tuple(torch.randn_like(v) for v in values)

    def floats(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(t for t in tensors_of(forward(*leaves)) if t.is_floating_point())

    outputs, pull_back = torch.func.vjp(floats, *values)
    upstream = tuple(torch.randn_like(t) for t in outputs)
    expected = sum((a * b).sum() for a, b in zip(pull_back(upstream), tangents, strict=True))
    _, along = torch.func.jvp(floats, values, tangents)
    assert_close(sum((a * b).sum() for a, b in zip(upstream, along, strict=True)), expected, 1e-10)
    with forward_ad.dual_level():
        duals = floats(*map(forward_ad.make_dual, values, tangents))
        found = [forward_ad.unpack_dual(t).tangent for t in duals]
    assert all(t is not None for t in found), "dual numbers lose their tangents"
    assert_all_close(found, list(along), 1e-10)


def has_functional_gradients(op: Op, device: Device) -> None:
    """torch.func.grad gives what autograd gives."""
    arguments = moved(op.arguments, device)
    forward, _, values = of_leaves(op, arguments)
    expected = results(op.forward, arguments)[-len(values) :]
    every = tuple(range(len(values)))
    got = torch.func.grad(lambda *leaves: loss_of(forward(*leaves)), every)(*values)
    assert_all_close(got, expected)


def has_gradients_of_samples(op: Op, device: Device) -> None:
    """Of each sample by itself, all at once: vmap of grad is a loop over grad."""
    arguments = moved(op.arguments, device)
    batches = [
        _samples(t.detach()) if i in op.samples else None if t is None else t.detach()
        for i, t in enumerate(arguments)
    ]
    dims = tuple(0 if i in op.samples else None for i in range(len(arguments)))
    wanted = tuple(i for i, t in enumerate(arguments) if t is not None and t.requires_grad)
    gradient = torch.func.grad(lambda *given: loss_of(op.forward(*given)), wanted)
    got = torch.func.vmap(gradient, in_dims=dims)(*batches)
    for n in range(3):
        one = gradient(*(t[n] if i in op.samples else t for i, t in enumerate(batches)))  # type: ignore[index]
        assert_all_close([t[n] for t in got], list(one))


def _samples(t: Tensor) -> Tensor:
    """Three of it: itself, and with rows in other orders, so that what has a range stays in its range."""
    return torch.stack([t, t.flip(0), t.roll(1, 0)])


def can_be_mapped(op: Op, device: Device) -> None:
    """vmap over any one argument is a loop."""
    arguments = [t if t is None else t.detach() for t in moved(op.arguments, device)]
    for place, t in enumerate(arguments):
        if t is None or t.dim() == 0:
            continue
        given = list(arguments)
        given[place] = _samples(t)
        dims = tuple(0 if i == place else None for i in range(len(given)))
        got = tensors_of(torch.func.vmap(op.forward, in_dims=dims)(*given))
        for n in range(3):
            one = list(arguments)
            one[place] = given[place][n]  # type: ignore[index]
            assert_all_close([r[n] for r in got], tensors_of(op.forward(*one)))


def can_be_traced(op: Op, device: Device) -> None:
    """With the tracer's own check, with gradients and without; a trace made without them trains nevertheless."""
    forward, arguments, parameters = op.forward, moved(op.arguments, device), []
    if op.module is not None:  # the tracer takes no module whose parameters are arguments
        forward = copy.deepcopy(op.module).to(device)
        parameters = list(forward.parameters())
        arguments = arguments[: -len(parameters)]
    for record in (True, False):
        with torch.set_grad_enabled(record), warnings.catch_warnings():
            # Tracing is deprecated, and it warns of every Python number that comes from a shape.
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(forward, tuple(arguments))
        expected = results(forward, arguments, parameters)
        assert_all_close(results(traced, arguments, parameters), expected)


def can_be_exported(op: Op, device: Device) -> None:
    """An export made without gradients trains nevertheless."""
    arguments = moved(op.arguments, device)
    module = nn.Module()
    module.forward = op.forward
    for record in (True, False):
        with torch.set_grad_enabled(record):
            program = torch.export.export(module, tuple(arguments))
        assert_all_close(results(program.module(), arguments), results(op.forward, arguments))


def follows_autocast(op: Op, device: Device) -> None:
    """Results have the dtypes of the twin's, and gradients those of their arguments."""
    assert op.twin is not None
    arguments = moved(op.arguments, device, torch.float32)
    exact = results(op.twin, arguments)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        ours = results(op.forward, arguments)
        try:
            theirs = results(op.twin, arguments)
        except RuntimeError as error:  # nn.LSTM in bfloat16 needs AVX-512 on a CPU
            pytest.skip(f"torch has nothing to compare with here: {error}")
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    assert_all_close(ours, exact, 0.1)


def same_bits_on_any_number_of_threads(op: Op, device: Device) -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(op.forward, moved(op.arguments, device)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same_bits(other, found[0])


ALWAYS: list[Promise] = [
    passes_opcheck,
    compiles_in_one_graph_and_once,
    takes_any_strides,
    same_bits_on_every_run,
]
OF_GRADIENTS: list[Promise] = [
    takes_gradients_of_any_strides,
    only_wanted_gradients,
    gradients_are_right,
    has_forward_derivatives,
    has_functional_gradients,
    has_gradients_of_samples,
    can_be_mapped,
    can_be_traced,
    can_be_exported,
]


def owed_by(op: Op) -> list[Promise]:
    """The promises that fit an operator, on every device."""
    return [
        *ALWAYS,
        *(OF_GRADIENTS if op.differentiable else ()),
        *([follows_autocast] if op.twin else ()),
    ]


def every_promise_of(
    ops: Sequence[Op],
    *more: Promise,
    fits: Callable[[Promise, Op], bool] = lambda promise, op: True,
) -> pytest.MarkDecorator:
    """Parametrises a test by `promise` and `op`, those that fit."""
    pairs = []
    for op in ops:
        for promise in filter(lambda promise: fits(promise, op), [*owed_by(op), *more]):
            reason = op.owes.get(promise.__name__)
            marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
            pairs.append(pytest.param(promise, op, id=f"{promise.__name__}-{op}", marks=marks))
    return pytest.mark.parametrize(("promise", "op"), pairs)


# ---- the operators and layers ----


def _layer(
    name: str, family: str, ours: nn.Module, theirs: nn.Module | None, *inputs: Tensor, **more: Any
) -> Op:
    """A module as a function of its inputs and its parameters."""
    names = [key for key, _ in ours.named_parameters()]

    def calling(module: nn.Module) -> Callable[..., Any]:
        def call(*arguments: Tensor) -> Any:
            values = dict(zip(names, arguments[len(inputs) :], strict=True))
            return functional_call(module, values, arguments[: len(inputs)])

        return call

    parameters = (p.detach().clone().requires_grad_() for p in ours.parameters())
    twin = None if theirs is None else calling(theirs)
    joint = tuple(range(len(inputs), len(inputs) + len(names)))
    return Op(
        name, calling(ours), (*inputs, *parameters), family, twin, joint=joint, module=ours, **more
    )


def _lstm(**options: Any) -> Callable[..., Any]:
    return lambda *arguments: llmkern.ops.lstm(*arguments, **options)


def _lstm_variant(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, w_hr: Tensor, lengths: Tensor
) -> Any:
    return llmkern.ops.lstm(x, h, c, w_ih, w_hh, weight_hr=w_hr, lengths=lengths, reverse=True)


def _sampled(logits: Tensor, temperature: Tensor, seen: Tensor, seed: Tensor) -> Any:
    return llmkern.ops.sample(
        logits, temperature=temperature, top_k=9, top_p=0.9, repetition_penalty=1.2, output_ids=seen,
        seed=seed, position=3, num_logprobs=2, return_entropy=True,
    )  # fmt: skip


def _loss(input: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return llmkern.ops.linear_cross_entropy(
        input, weight, target, linear_bias=bias, label_smoothing=0.1
    )


def _torch_loss(input: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, weight, bias), target, label_smoothing=0.1)


def _ops() -> list[Op]:
    T, B, I, H, P, V, D = 4, 3, 5, 6, 2, 11, 7  # noqa: E741
    f64 = torch.float64
    ids, targets = torch.randint(V, (B, 5)), torch.randint(V, (B,))
    seeds = torch.arange(B)

    def f(*shape: int) -> Tensor:
        return leaf(*shape, dtype=f64, scale=0.5)

    layer = (f(T, B, I), f(B, H), f(B, H), f(4 * H, I), f(4 * H, H))
    return [
        Op("embedding", lambda ids, table: llmkern.ops.embedding(ids, table),
           (ids, f(V, D)), family="embedding", twin=F.embedding),
        Op("dropout", lambda x, seed: llmkern.ops.dropout(x, 0.4, locked=True, seed=seed),
           (f(T, B, D), torch.tensor(3)), family="dropout"),
        Op("lstm", llmkern.ops.lstm, layer, family="lstm", joint=(3, 4), free=(1, 2)),
        Op("lstm with a projection", _lstm_variant,
           (f(T, B, I), f(B, P), f(B, H), f(4 * H, I), f(4 * H, P), f(P, H), torch.tensor([4, 1, 0])),
           family="lstm", joint=(3, 4, 5), free=(1, 2)),
        Op("lstm cell", llmkern.ops.lstm_cell, (f(B, I), *layer[1:]), family="lstm",
           samples=(0, 1, 2), joint=(3, 4), free=(1, 2)),
        Op("loss", _loss, (f(B, D), f(V, D), f(V), targets), family="cross_entropy", twin=_torch_loss, samples=(0, 3)),
        Op("sample", _sampled,
           (torch.randn(B, V), torch.rand(B) + 0.5, torch.randint(V, (B, 4)), seeds), family="sampling"),
        Op("multinomial", lambda rows, seed: llmkern.ops.multinomial(rows, 3, seed=seed, position=4),
           (torch.rand(B, V), seeds), family="decoding"),
        Op("beam search", lambda logits, scores: llmkern.ops.beam_search_step(logits, scores),
           (torch.randn(2, B, V), torch.randn(2, B)), family="decoding"),
        Op("speculative",
           lambda ids, draft, target, seed: llmkern.ops.speculative_verify(ids, draft, target, seed=seed, position=2),
           (ids[:, :2], torch.randn(B, 2, V), torch.randn(B, 3, V), seeds), family="decoding"),
    ]  # fmt: skip


def _layers() -> list[Op]:
    T, B, I, H, V, D = 4, 3, 5, 6, 11, 7  # noqa: E741
    f64 = {"dtype": torch.float64}
    x = leaf(T, B, I, **f64)
    lstm = {"num_layers": 2, "bidirectional": True}
    return [
        _layer("Embedding", "embedding", llmkern.nn.Embedding(V, D, **f64), nn.Embedding(V, D, **f64),
               torch.randint(V, (B, 5))),
        _layer("LSTM", "lstm", llmkern.nn.LSTM(I, H, **lstm, **f64), nn.LSTM(I, H, **lstm, **f64), x),
        _layer("LSTM with layer norm", "lstm", llmkern.nn.LSTM(I, H, layer_norm=True, **f64), None, x),
        _layer("LSTMCell", "lstm", llmkern.nn.LSTMCell(I, H, **f64), nn.LSTMCell(I, H, **f64), leaf(B, I, **f64)),
        _layer("LinearCrossEntropyLoss", "cross_entropy",
               llmkern.nn.LinearCrossEntropyLoss(D, V, **f64), None,
               leaf(B, D, **f64), torch.randint(V, (B,)), samples=(0, 1)),
    ]  # fmt: skip


def _made(make: Callable[[], list[Op]]) -> list[Op]:
    """The same tensors in every process, and none of the tests' random numbers used up."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


OPS = _made(_ops) + _made(_layers)


def with_cuda_kernels() -> list[Op]:
    return [op for op in OPS if (ROOT / f"csrc/kernels/cuda/{op.family}.cu").exists()]
