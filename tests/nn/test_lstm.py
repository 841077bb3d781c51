# SPDX-License-Identifier: Apache-2.0
"""llmkern.nn.LSTM and LSTMCell against torch's."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import llmkern
from tests.conftest import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
T, B, I, H = 5, 3, 7, 9  # noqa: E741
STRUCTURES = [
    dict(zip(("num_layers", "bias", "batch_first", "bidirectional"), values, strict=True))
    for values in itertools.product((1, 2, 3), (True, False), (True, False), (True, False))
]


def twins(dtype=torch.float64, **options):
    theirs = nn.LSTM(I, H, dtype=dtype, **options)
    ours = llmkern.nn.LSTM(I, H, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def state_of(layer, *batch):
    layers = layer.num_layers * (2 if layer.bidirectional else 1)
    return [torch.randn(layers, *batch, H, dtype=torch.float64) for _ in "hc"]


def run(layer, x, hx, seed=None):
    """Outputs, then the gradients of the input, the state and the parameters."""
    leaves = [t.clone().requires_grad_() for t in (x, *(hx or ()))]
    if seed is not None:
        torch.manual_seed(seed)
    output, (h_n, c_n) = layer(leaves[0], tuple(leaves[1:]) if hx else None)
    loss = output.sin().sum() + h_n.square().sum() - c_n.cos().sum()
    return output, h_n, c_n, *torch.autograd.grad(loss, [*leaves, *layer.parameters()])


@pytest.mark.parametrize("given", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("options", STRUCTURES, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_outputs_and_gradients_are_torchs(options, batched, given):
    ours, theirs = twins(**options)
    shape = (T, I) if not batched else (B, T, I) if options["batch_first"] else (T, B, I)
    x = torch.randn(shape, dtype=torch.float64)
    hx = state_of(ours, *([B] if batched else [])) if given else None
    for a, b in zip(run(ours, x, hx), run(theirs, x, hx), strict=True):
        assert_close(a, b)


def test_float32():
    ours, theirs = twins(torch.float32, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I)
    for a, b in zip(run(ours, x, None), run(theirs, x, None), strict=True):
        assert_close(a, b, 4e-6)  # ours and torch's error


@pytest.mark.parametrize("options", STRUCTURES[::3], ids=str)
def test_parameters_are_torchs(options):
    """The same seed initialises the same values under the same names, and state_dicts go both ways."""
    torch.manual_seed(5)
    theirs = nn.LSTM(I, H, **options)
    torch.manual_seed(5)
    ours = llmkern.nn.LSTM(I, H, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
    fresh = nn.LSTM(I, H, **options)
    fresh.load_state_dict(ours.state_dict())
    x = torch.randn((B, T, I) if options["batch_first"] else (T, B, I))
    assert torch.equal(fresh(x)[0], theirs(x)[0])
    assert repr(ours) == repr(theirs)


def test_copies_keep_their_parameters():
    ours, _ = twins(num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I, dtype=torch.float64)
    expected, _ = ours(x)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(again(x)[0], expected)
        with torch.no_grad():
            again.weight_hh_l0.zero_()
        assert not torch.equal(again(x)[0], expected)
        assert torch.equal(ours(x)[0], expected)
    single = copy.deepcopy(ours).float()
    assert single.weight_ih_l0.dtype == torch.float32
    assert_close(single(x.float())[0], expected, 4e-6)
    assert torch.equal(single.double()(x)[0].float(), copy.deepcopy(single)(x)[0].float())


def test_replaced_parameters_are_used():
    ours, theirs = twins()
    weight = nn.Parameter(torch.randn(4 * H, I, dtype=torch.float64))
    ours.weight_ih_l0 = theirs.weight_ih_l0 = weight
    x = torch.randn(T, B, I, dtype=torch.float64)
    assert_close(ours(x)[0], theirs(x)[0])


def test_dropout_between_layers():
    """The masks are torch's under the same seed; in evaluation there are none."""
    ours, theirs = twins(num_layers=3, dropout=0.4)
    x = torch.randn(T, B, I, dtype=torch.float64)
    for a, b in zip(run(ours, x, None, seed=3), run(theirs, x, None, seed=3), strict=True):
        assert_close(a, b)
    assert not torch.equal(ours(x)[0], ours(x)[0])
    ours.eval()
    assert torch.equal(ours(x)[0], ours(x)[0])
    assert_close(ours(x)[0], theirs.eval()(x)[0])


def test_dropout_statistics():
    """An upper layer that is linear in what it reads shows which of its inputs were dropped, and how often."""
    H, p, n = 4, 0.25, 2000
    layer = llmkern.nn.LSTM(1, H, num_layers=2, dropout=p)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.zero_()
            if name.startswith("bias_ih"):
                parameter.fill_(1.0)
        layer.weight_ih_l1[2 * H : 3 * H] = 1e-3 * torch.eye(H)  # the cell's gate sees its unit
    _, (_, c_n) = layer(torch.zeros(1, n, 1))
    upper = c_n[1]  # an even mixture of two values, dropped or kept
    dropped = upper == upper.min()
    assert len(upper.unique()) == 2
    assert abs(dropped.float().mean().item() - p) < 5 * (p * (1 - p) / (n * H)) ** 0.5
    kept, lowest = (upper[~dropped][0] - upper.min()).item(), upper.min().item()
    layer.eval()
    _, (_, c_n) = layer(torch.zeros(1, 1, 1))
    assert (c_n[1, 0, 0].item() - lowest) / kept == pytest.approx(
        1 - p, rel=1e-2
    )  # scaled by 1 / (1 - p)


def test_zero_layers_of_batch():
    output, (h_n, c_n) = llmkern.nn.LSTM(I, H, num_layers=2)(torch.zeros(T, 0, I))
    assert output.shape == (T, 0, H) and h_n.shape == c_n.shape == (2, 0, H)


def bad_call(error, message, input, hx=None, **options):
    with pytest.raises(error, match=r"llmkern\.(LSTM|lstm): expected " + message):
        llmkern.nn.LSTM(I, H, **options)(input, hx)


def test_bad_input():
    x, state = torch.zeros(T, B, I), torch.zeros(1, B, H)
    bad_call(TypeError, "a Tensor, got list", [1.0])
    bad_call(
        ValueError, r"input of shape \[T, B, I\] or \[T, I\] with I = 7, got \[5\]", x[:, 0, 0]
    )
    bad_call(
        ValueError, r"input of shape \[B, T, I\].*got \[5, 3, 6\]", x[..., 1:], batch_first=True
    )
    bad_call(ValueError, r"at least one time step, got input of shape \[0, 3, 7\]", x[:0])
    bad_call(TypeError, "h_0 of input's dtype float64, got float32", x.double(), (state, state))
    bad_call(TypeError, "weight_ih of input's dtype float16, got float32", x.half())
    bad_call(
        ValueError, r"h_0 of shape \[S, B, H\] = \[1, 3, 9\], got \[1, 9\]", x, (state[:, 0], state)
    )
    bad_call(
        ValueError,
        r"c_0 of shape \[S, B, H\] = \[1, 3, 9\], got \[2, 3, 9\]",
        x,
        (state, state.expand(2, B, H)),
    )
    bad_call(
        ValueError, r"h_0 of shape \[S, H\] = \[1, 9\], got \[1, 3, 9\]", x[:, 0], (state, state)
    )
    bad_call(ValueError, r"hx to be \(h_0, c_0\), got 1 values", x, (state,))
    bad_call(TypeError, "h_0 to be a Tensor, got NoneType", x, (None, state))
    bad_call(
        ValueError,
        "every tensor on one device, got input on meta and h_0 on cpu",
        x.to("meta"),
        (state, state),
    )


def test_bad_options():
    with pytest.raises(ValueError, match="proj_size has to be smaller than hidden_size"):
        llmkern.nn.LSTM(I, H, proj_size=H)
    with pytest.raises(ValueError, match="dropout should be a number in range"):
        llmkern.nn.LSTM(I, H, dropout=1.5)
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        llmkern.nn.LSTM(I, H, dropout=0.5)


def test_compile_without_recompiles_over_sequence_lengths():
    torch.compiler.reset()
    ours, _ = twins(num_layers=2, bidirectional=True, batch_first=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)

    def check(steps):
        x = torch.randn(B, steps, I, dtype=torch.float64, requires_grad=True)
        (got,) = torch.autograd.grad(compiled(x)[0].square().sum(), x)
        (expected,) = torch.autograd.grad(ours(x)[0].square().sum(), x)
        assert_close(got, expected)

    check(4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps in (6, 11, 2):
            check(steps)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own, when it is imported
def test_a_language_model_compiled_by_inductor():
    """Embedding, LSTM and loss in one graph, forward and backward."""
    torch.compiler.reset()
    embedding, lstm = llmkern.nn.Embedding(11, I), llmkern.nn.LSTM(I, H, num_layers=2)
    head = llmkern.nn.LinearCrossEntropyLoss(H, 11, bias=True)
    parameters = [p for m in (embedding, lstm, head) for p in m.parameters()]

    def loss(ids, targets):
        return head(torch.tanh(lstm(embedding(ids))[0]), targets)

    ids, targets = torch.randint(11, (2, T, B)).unbind()
    compiled = torch.compile(loss, fullgraph=True)
    got = [compiled(ids, targets), *torch.autograd.grad(compiled(ids, targets), parameters)]
    expected = [loss(ids, targets), *torch.autograd.grad(loss(ids, targets), parameters)]
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("given", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("bias", [True, False])
def test_cell_is_torchs(bias, batched, given):
    theirs = nn.LSTMCell(I, H, bias=bias, dtype=torch.float64)
    ours = llmkern.nn.LSTMCell(I, H, bias=bias, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, nn.LSTMCell) and repr(ours) == repr(theirs)
    batch = [B] if batched else []
    leaves = [torch.randn(*batch, n, dtype=torch.float64) for n in (I, H, H)]
    results = []
    for cell in (ours, theirs):
        x, h_0, c_0 = leaves = [t.detach().requires_grad_() for t in leaves]
        h_1, c_1 = cell(x, (h_0, c_0) if given else None)
        loss = h_1.sin().sum() + c_1.square().sum()
        used = [*(leaves if given else leaves[:1]), *cell.parameters()]
        results.append([h_1, c_1, *torch.autograd.grad(loss, used)])
    for a, b in zip(*results, strict=True):
        assert_close(a, b)


def test_bad_input_of_the_cell():
    cell = llmkern.nn.LSTMCell(I, H)
    x, state = torch.zeros(2, I), torch.zeros(2, H)
    with pytest.raises(TypeError, match=r"llmkern\.LSTMCell: expected a Tensor, got list"):
        cell([1.0])
    with pytest.raises(
        ValueError, match=r"llmkern\.LSTMCell: .* \[B, I\] or \[I\], got \[1, 2, 7\]"
    ):
        cell(x[None])
    with pytest.raises(
        ValueError, match=r"llmkern\.lstm_cell: .*h_0 of shape .* = \[2, 9\], got \[9\]"
    ):
        cell(x, (state[0], state))
    with pytest.raises(ValueError, match=r"llmkern\.lstm_cell: .*h_0 of shape .* got \[1, 2, 9\]"):
        cell(x[0], (state, state))
