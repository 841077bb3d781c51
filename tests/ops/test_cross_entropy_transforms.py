# SPDX-License-Identifier: Apache-2.0
"""Linear cross entropy under torch.func and in forward mode, second derivatives, and which gradients are computed."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import llmkern
from tests.conftest import assert_close
from tests.ops.test_cross_entropy import arguments_of, torch_loss

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch's own, the first time it is asked for derivatives in forward mode.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

N, D, V = SHAPE = (5, 3, 4)
SAMPLES = 3
KINDS = ["classes", "probabilities"]
CASES = [
    pytest.param(option, kind, reduction, id=f"{option}-{kind}-{reduction}")
    for option, kind, reduction in [
        (0, "classes", "mean"),
        (4, "classes", "mean"),
        (4, "classes", "none"),
        (3, "classes", "sum"),
        (0, "probabilities", "mean"),
        (6, "probabilities", "none"),
        (6, "probabilities", "mean"),
    ]
]


def problem(option, kind, reduction="mean"):
    """Every differentiable argument by name, and the others."""
    tensors, target, options = arguments_of(SHAPE, min(option, 5))
    if option >= 4:
        tensors["weight"] = options.pop("weight", torch.rand(V)).double()
    options["reduction"] = reduction
    if kind == "probabilities":
        options.pop("ignore_index", None)
        options["label_smoothing"] = 0.3 if option else 0.0
        tensors["target"] = torch.randn(N, V).softmax(-1).double()
    else:
        options["target"] = target
    return tensors, options


def losses(option, kind, reduction="mean"):
    """Ours and torch's loss as functions of the differentiable arguments, which are returned too."""
    tensors, options = problem(option, kind, reduction)

    def of(f):
        return lambda *values: f(**dict(zip(tensors, values, strict=True)), **options)

    return of(llmkern.ops.linear_cross_entropy), of(exact_loss), tuple(tensors.values())


def exact_loss(input, linear_weight, target, *, weight=None, ignore_index=-100, **options):
    """torch's loss, with a gradient for class weights too."""
    if target.is_floating_point():
        return torch_loss(input, linear_weight, target, weight=weight, **options)
    if weight is None:
        return torch_loss(input, linear_weight, target, ignore_index=ignore_index, **options)
    counts = target != ignore_index
    chosen = torch.nn.functional.one_hot(target * counts, V).to(input.dtype)
    reduction = options.pop("reduction")
    rows = torch_loss(input, linear_weight, chosen, weight=weight, reduction="none", **options)
    rows, total = torch.where(counts, rows, 0), (counts * weight[target * counts]).sum()
    return rows if reduction == "none" else rows.sum() / (total if reduction == "mean" else 1)


def assert_all_close(got, expected):
    got, expected = (torch.utils._pytree.tree_leaves(r) for r in (got, expected))
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)


# ---- forward mode


@pytest.mark.parametrize(("option", "kind", "reduction"), CASES)
def test_forward_mode(option, kind, reduction):
    ours, torchs, values = losses(option, kind, reduction)
    tangents = tuple(torch.randn_like(v) for v in values)
    (loss, got), (expected_loss, expected) = (jvp(f, values, tangents) for f in (ours, torchs))
    assert expected.abs().max() > 1e-3
    assert_all_close((loss, got), (expected_loss, expected))


def test_forward_mode_by_hand():
    """Logits 0 and 0, so probabilities of a half: the tangent of -log p_0 along the first logit is p_0 - 1."""
    x, weight = torch.zeros(1, 2), torch.eye(2)

    def loss(x):
        return llmkern.ops.linear_cross_entropy(x, weight, torch.tensor([0]))

    _, tangent = jvp(loss, (x,), (torch.tensor([[1.0, 0.0]]),))
    assert tangent.item() == -0.5


@pytest.mark.parametrize("frozen", [False, True])
def test_dual_numbers(frozen):
    """Without torch.func, among parameters that want gradients."""
    layer = llmkern.nn.LinearCrossEntropyLoss(D, V, bias=True, dtype=torch.float64)
    layer.requires_grad_(not frozen)
    x, along = torch.randn(2, N, D, dtype=torch.float64)
    target = torch.randint(V, (N,))
    with forward_ad.dual_level():
        loss = layer(forward_ad.make_dual(x, along), target)
        tangent = forward_ad.unpack_dual(loss).tangent
        expected = torch_loss(
            forward_ad.make_dual(x, along),
            layer.linear.weight,
            target,
            linear_bias=layer.linear.bias,
        )
        assert_close(tangent, forward_ad.unpack_dual(expected).tangent)


def test_a_gradient_in_forward_mode():
    """A graph recorded outside of the dual level, differentiated inside of it."""
    ours, torchs, values = losses(4, "classes", "none")
    upstream, along = torch.randn(2, N, dtype=torch.float64)
    tangents = []
    for f in (ours, torchs):
        leaves = [v.clone().requires_grad_() for v in values]
        loss = f(*leaves)
        with forward_ad.dual_level():
            grads = torch.autograd.grad(loss, leaves, forward_ad.make_dual(upstream, along))
            tangents.append([forward_ad.unpack_dual(g).tangent for g in grads])
    assert_all_close(*tangents)


def test_forward_mode_checks_classes():
    x = torch.zeros(2, D)
    with pytest.raises(IndexError, match=r"in \[0, 4\) or -100, got 4 at position 1"):
        jvp(
            lambda x: llmkern.ops.linear_cross_entropy(
                x, torch.zeros(V, D), torch.tensor([-100, 4])
            ),
            (x,),
            (x,),
        )


def test_forward_mode_of_unknown_classes_where_values_are_hidden():
    """Under vmap nobody can look at them: NaN, and no wild read."""
    x = torch.zeros(2, D)
    loss, _ = vmap(
        lambda x, y: jvp(
            lambda x: llmkern.ops.linear_cross_entropy(x, torch.zeros(V, D), y), (x,), (x,)
        )
    )(x, torch.tensor([3, 4]))
    assert loss.isnan().tolist() == [False, True]


# ---- torch.func


@pytest.mark.parametrize(("option", "kind", "reduction"), CASES)
def test_gradients_by_torch_func(option, kind, reduction):
    ours, torchs, values = losses(option, kind, reduction)
    everything = tuple(range(len(values)))
    if reduction == "none":
        assert_all_close(*(jacrev(f, everything)(*values) for f in (ours, torchs)))
    else:
        assert_all_close(*(grad(f, everything)(*values) for f in (ours, torchs)))
    assert_all_close(*(vjp(f, *values)[0] for f in (ours, torchs)))
    assert_all_close(*(jacfwd(f, everything)(*values) for f in (ours, torchs)))


@pytest.mark.parametrize("shared", [("linear_weight", "linear_bias"), (), ("input",)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_mapped_arguments(kind, shared):
    """Losses and gradients of every sample, in one call and one by one: the same bits."""
    tensors, options = problem(4, kind)
    names, target = list(tensors), options.pop("target", None)
    targets = None if target is None else torch.stack([target.roll(i) for i in range(SAMPLES)], 1)
    stacked = {
        k: t if k in shared else torch.stack([t + i / 9 for i in range(SAMPLES)])
        for k, t in tensors.items()
    }

    def both(target, *values):
        def loss(*values):
            hard = {} if target is None else {"target": target}
            named = dict(zip(names, values, strict=True))
            return llmkern.ops.linear_cross_entropy(**named, **hard, **options)

        return loss(*values), grad(loss, tuple(range(len(values))))(*values)

    dims = [None if k in shared else 0 for k in names]
    got = vmap(both, in_dims=(None if target is None else 1, *dims))(targets, *stacked.values())
    for i in range(SAMPLES):
        values = [t if k in shared else t[i] for k, t in stacked.items()]
        alone = both(None if target is None else targets[:, i], *values)
        for a, b in zip(*map(torch.utils._pytree.tree_leaves, (got, alone)), strict=True):
            assert torch.equal(a[i], b)


def test_per_sample_gradients_of_a_layer():
    """As differential privacy takes them, against a loop over backward()."""
    layer = llmkern.nn.LinearCrossEntropyLoss(D, V, bias=True, dtype=torch.float64)
    x, target = torch.randn(SAMPLES, N, D).double(), torch.randint(V, (SAMPLES, N))

    def loss(parameters, x, target):
        return functional_call(layer, parameters, (x, target))

    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    got = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, target)
    for i in range(SAMPLES):
        layer.zero_grad()
        layer(x[i], target[i]).backward()
        for name, p in layer.named_parameters():
            assert_close(got[name][i], p.grad)


def test_gradient_of_a_mapped_loss():
    """The other order: vmap inside, the gradient outside, by torch.func and by backward()."""
    xs, weight = torch.randn(SAMPLES, N, D).double(), torch.randn(V, D).double()
    targets = torch.randint(V, (SAMPLES, N))

    def total(weight):
        return vmap(lambda x, y: llmkern.ops.linear_cross_entropy(x, weight, y))(xs, targets).sum()

    leaf = weight.clone().requires_grad_()
    total(leaf).backward()
    expected = grad(lambda w: sum(map(torch_loss, xs, [w] * SAMPLES, targets)))(weight)
    assert_close(leaf.grad, expected)
    assert_close(grad(total)(weight), expected)


# ---- second derivatives


@pytest.mark.parametrize(("option", "kind", "reduction"), CASES)
def test_gradgradcheck(option, kind, reduction):
    ours, _, values = losses(option, kind, reduction)
    values = [v.requires_grad_() for v in values]
    assert torch.autograd.gradcheck(ours, values)
    assert torch.autograd.gradgradcheck(ours, values)


def test_second_derivatives_by_every_road():
    ours, torchs, values = losses(4, "classes")

    def at(f):
        return lambda x: f(x, *values[1:])

    expected = torch.autograd.functional.hessian(at(torchs), values[0])
    v = torch.randn_like(values[0])
    product = (expected * v).sum((-1, -2))
    x = values[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(at(ours)(x), x, create_graph=True)
    assert_close(torch.autograd.grad((first * v).sum(), x)[0], product)
    assert_close(hessian(at(ours))(values[0]), expected)
    assert_close(jacrev(jacrev(at(ours)))(values[0]), expected)
    assert_close(jacrev(jacfwd(at(ours)))(values[0]), expected)
    assert_close(jvp(grad(at(ours)), (values[0],), (v,))[1], product)


@pytest.mark.parametrize("wanted", ["input", "linear_weight", "linear_bias"])
def test_second_derivative_of_one_gradient(wanted):
    tensors, options = problem(4, "classes")
    seconds = []
    for f in (llmkern.ops.linear_cross_entropy, exact_loss):
        leaves = {k: t.clone().requires_grad_(k == wanted) for k, t in tensors.items()}
        (first,) = torch.autograd.grad(f(**leaves, **options), leaves[wanted], create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), leaves[wanted])[0])
    assert_close(*seconds)


# ---- what is wanted, and no more


class Calls(TorchDispatchMode):
    """What the operators were asked for and returned."""

    def __init__(self):
        super().__init__()
        self.made, self.saved = [], []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        results = f(*args, **(kwargs or {}))
        if f is torch.ops.llmkern.linear_cross_entropy_backward.default:
            self.made += [[t.numel() for t in results]]
        if f is torch.ops.llmkern.linear_cross_entropy.default:
            self.saved += [results[3].numel()]
        return results


NAMES = ["input", "linear_weight", "linear_bias", "target"]
SIZES = dict(zip(NAMES, [N * D, V * D, V, N * V], strict=True))


def leaves_of(kind, wanted):
    tensors, options = problem(4, kind)
    for name in wanted:
        tensors[name].requires_grad_()
    return tensors, options


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "wanted",
    [
        {"linear_weight"},
        {"linear_bias"},
        {"input", "linear_bias"},
        {"linear_weight", "linear_bias"},
    ],
    ids=lambda w: "-".join(sorted(w)),
)
def test_only_wanted_gradients_are_computed(wanted, kind):
    tensors, options = leaves_of(kind, wanted)
    with Calls() as calls:
        llmkern.ops.linear_cross_entropy(**tensors, **options).backward()
    assert calls.made == [[SIZES[name] if name in wanted else 0 for name in NAMES]]
    assert calls.saved == [0]
    assert {k for k, t in tensors.items() if t.grad is not None} == wanted


def test_only_the_probabilities_gradient_is_computed():
    tensors, options = leaves_of("probabilities", {"target"})
    with Calls() as calls:
        llmkern.ops.linear_cross_entropy(**tensors, **options).backward()
    assert calls.made == [[0, 0, 0, N * V]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_gradient_of_the_input_alone_needs_no_second_pass(reduction, kind):
    """A frozen head: the forward pass, which has the logits, makes the gradient; the operator is not called again."""
    tensors, options = leaves_of(kind, {"input"})
    options["reduction"] = reduction
    grads = []
    for f in (llmkern.ops.linear_cross_entropy, exact_loss):
        with Calls() as calls:
            loss = f(**tensors, **options)
            upstream = torch.linspace(-1, 2, loss.numel()).double().reshape(loss.shape)
            grads += torch.autograd.grad(loss, tensors["input"], upstream)
        assert calls.made == []
        assert calls.saved == ([N * D] if f is llmkern.ops.linear_cross_entropy else [])
    assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_input_alone_is_that_among_others(isa, dtype):
    """Over several chunks of rows."""
    x, weight = torch.randn(70, 33).to(dtype), torch.randn(66_000, 33).to(dtype) / 6
    target, grads = torch.randint(66_000, (70,)), []
    for frozen in (True, False):
        leaf = x.clone().requires_grad_()
        loss = llmkern.ops.linear_cross_entropy(leaf, weight.requires_grad_(not frozen), target)
        grads += torch.autograd.grad(loss, leaf)
    assert_close(*grads, 1e-6 if dtype == torch.float32 else 2**-7)


def test_nothing_more_is_saved_without_gradients():
    tensors, options = leaves_of("classes", {"input"})
    with Calls() as calls, torch.no_grad():
        llmkern.ops.linear_cross_entropy(**tensors, **options)
    assert calls.saved == [0]
