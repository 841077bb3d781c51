# SPDX-License-Identifier: Apache-2.0
"""What llmkern.nn.LSTM has beyond torch's layer: options of the constructor, reset, cell states."""

import itertools

import pytest
import torch
from torch import nn

import llmkern
from llmkern import ops
from tests.conftest import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
T, B, I, H, P = 6, 3, 5, 9, 4  # noqa: E741


def layer(**options):
    return llmkern.nn.LSTM(I, H, dtype=torch.float64, **options)


def test_layer_norm_parameters():
    lstm = layer(num_layers=2, bidirectional=True, layer_norm=True)
    norms = {name: p for name, p in lstm.named_parameters() if name.startswith("norm_")}
    suffixes = ["l0", "l0_reverse", "l1", "l1_reverse"]
    assert list(norms) == [f"norm_{of}_{s}" for s in suffixes for of in ("gates", "cell")]
    for name, p in norms.items():
        rows, columns = (p[:1], 4 * H) if "gates" in name else (p[:1], H)
        assert p.shape == (2, columns) and (rows == 1).all()
        assert (p[1] == (1 if "gates" in name else 0)).all()
    again = layer(num_layers=2, bidirectional=True, layer_norm=True)
    again.load_state_dict(lstm.state_dict())
    x = torch.randn(T, B, I, dtype=torch.float64)
    assert torch.equal(again(x)[0], lstm(x)[0])
    with torch.no_grad():
        lstm.norm_cell_l1 *= 2
    lstm.reset_parameters()
    assert torch.equal(lstm.norm_cell_l1, again.norm_cell_l1)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("proj_size", [0, P])
def test_a_stack_is_its_layers(batch_first, proj_size):
    """Two layers in two directions with everything switched on, put together by hand from the operator."""
    options = {"num_layers": 2, "bidirectional": True, "proj_size": proj_size, "layer_norm": True}
    lstm = layer(**options, batch_first=batch_first, zoneout_h=0.2, zoneout_c=0.3).eval()
    for p in lstm.parameters():
        nn.init.normal_(p)
    width = proj_size or H
    x = torch.randn(T, B, I, dtype=torch.float64)
    h_0 = torch.randn(4, B, width, dtype=torch.float64)
    c_0 = torch.randn(4, B, H, dtype=torch.float64)
    reset, lengths = torch.rand(T, B) < 0.3, torch.tensor([4, 6, 1])
    below, states, cells = x, [], []
    for level in range(2):
        outputs = []
        for direction, suffix in enumerate(("", "_reverse")):
            index = 2 * level + direction
            of = {
                name: p for name, p in lstm.named_parameters() if name.endswith(f"l{level}{suffix}")
            }
            of = {name.removesuffix(f"_l{level}{suffix}"): p for name, p in of.items()}
            # Backwards a document ends where, forwards, the next one begins.
            marks = (
                torch.cat([reset[1:], torch.zeros(1, B, dtype=torch.bool)]) if direction else reset
            )
            output, h, c, all_c = ops.lstm(
                below,
                h_0[index],
                c_0[index],
                **of,
                zoneout_h=0.2,
                zoneout_c=0.3,
                reverse=direction == 1,
                lengths=lengths,
                reset=marks,
                return_cells=True,
            )
            outputs.append(output)
            states.append((h, c))
            cells.append(all_c)
        below = torch.cat(outputs, dim=2)
    first = (lambda t: t.transpose(-3, -2)) if batch_first else (lambda t: t)
    given_reset = reset.T if batch_first else reset
    output, (h_n, c_n), all_cells = lstm(
        first(x), (h_0, c_0), lengths=lengths, reset=given_reset, return_cells=True
    )
    assert torch.equal(output, first(below))
    assert torch.equal(h_n, torch.stack([h for h, _ in states]))
    assert torch.equal(c_n, torch.stack([c for _, c in states]))
    assert torch.equal(all_cells, first(torch.stack(cells)))


def test_unbatched():
    lstm = layer(num_layers=2, layer_norm=True, proj_size=P)
    x, reset = torch.randn(T, 1, I, dtype=torch.float64), torch.rand(T, 1) < 0.5
    output, (h_n, c_n), cells = lstm(x, reset=reset, return_cells=True)
    alone, (h, c), alone_cells = lstm(x[:, 0], reset=reset[:, 0], return_cells=True)
    assert torch.equal(alone, output[:, 0]) and torch.equal(alone_cells, cells[:, :, 0])
    assert torch.equal(h, h_n[:, 0]) and torch.equal(c, c_n[:, 0])


@pytest.mark.parametrize(
    "options",
    [
        {"zoneout_h": 0.4},
        {"zoneout_c": 0.4},
        {"weight_dropout": 0.4},
        {"num_layers": 2, "dropout": 0.4, "locked_dropout": True},
    ],
    ids=lambda o: "+".join(o),
)
def test_masks_come_from_torchs_generator(options):
    lstm, x = layer(**options), torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)

    def once(seed):
        torch.manual_seed(seed)
        output = lstm(x)[0]
        return [output, *torch.autograd.grad(output.sum(), [x, *lstm.parameters()])]

    first, again, other = once(1), once(1), once(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    lstm.eval()
    assert torch.equal(once(1)[0], once(2)[0])


def test_zoneout_draws_other_masks_for_other_layers():
    lstm = layer(num_layers=2, bidirectional=True, zoneout_h=1.0, zoneout_c=1.0)
    x, c_0 = torch.zeros(T, B, I, dtype=torch.float64), torch.randn(4, B, H, dtype=torch.float64)
    _, (_, c_n) = lstm(x, (c_0, c_0))
    assert torch.equal(c_n, c_0)  # everything is held
    lstm.zoneout_h, lstm.zoneout_c = 0.0, 0.5
    for p in lstm.parameters():
        nn.init.zeros_(p)  # c halves where it is not held
    _, (_, c_n) = lstm(x[:1], (c_0, c_0))
    held = [tuple(row.flatten().tolist()) for row in c_n == c_0]
    assert len(set(held)) == 4 and 0.3 < (c_n == c_0).double().mean() < 0.7


def test_weight_dropout_is_one_mask_for_all_steps():
    lstm = layer(weight_dropout=0.5)
    x = torch.randn(T, B, I, dtype=torch.float64)
    torch.manual_seed(5)
    output, _ = lstm(x)
    torch.manual_seed(5)
    dropped = ops.dropout(lstm.weight_hh_l0, 0.5)
    zeros = (dropped == 0).double().mean()
    assert 0.3 < zeros < 0.7
    state = torch.zeros(B, H, dtype=torch.float64)
    weights = lstm.weight_ih_l0, dropped, lstm.bias_ih_l0, lstm.bias_hh_l0
    assert torch.equal(output, ops.lstm(x, state, state, *weights)[0])


def test_locked_dropout_is_one_mask_for_all_steps():
    """The upper layer sees the same units of the lower one at every step."""
    lstm = layer(num_layers=2, dropout=0.5, locked_dropout=True)
    torch.manual_seed(3)
    output, _ = lstm(torch.randn(1, B, I, dtype=torch.float64).expand(T, B, I))
    lower = llmkern.nn.LSTM(I, H, dtype=torch.float64)
    upper = llmkern.nn.LSTM(H, H, dtype=torch.float64)
    lower.load_state_dict({k: v for k, v in lstm.state_dict().items() if k.endswith("l0")})
    upper.load_state_dict(
        {k.replace("l1", "l0"): v for k, v in lstm.state_dict().items() if k.endswith("l1")}
    )
    torch.manual_seed(3)
    x = torch.randn(1, B, I, dtype=torch.float64).expand(T, B, I)
    between = ops.dropout(lower(x)[0], 0.5, locked=True)
    assert ((between == 0).sum(0) % T == 0).all() and (between == 0).any()
    assert torch.equal(output, upper(between)[0])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_recompute_gives_the_same_gradients(bidirectional):
    options = {"num_layers": 2, "bidirectional": bidirectional}
    plain, lean = layer(**options), layer(**options, recompute=True)
    lean.load_state_dict(plain.state_dict())
    x = torch.randn(T, B, I, dtype=torch.float64)
    gradients = []
    for lstm in (plain, lean):
        output, (h_n, c_n) = lstm(x)
        loss = output.sin().sum() + h_n.sum() - c_n.cos().sum()
        gradients.append(torch.autograd.grad(loss, list(lstm.parameters())))
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b)


def test_repr_shows_what_is_switched_on():
    assert (
        repr(layer(layer_norm=True, zoneout_h=0.1)) == "LSTM(5, 9, layer_norm=True, zoneout_h=0.1)"
    )
    assert repr(layer()) == repr(nn.LSTM(I, H))


def test_compile_with_every_option():
    """Masks are drawn inside of the graph; other lengths and seeds compile nothing anew."""
    torch.compiler.reset()
    lstm = layer(num_layers=2, zoneout_h=0.3, weight_dropout=0.4, layer_norm=True, proj_size=P)
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager", dynamic=True)

    def check(steps):
        x = torch.randn(steps, B, I, dtype=torch.float64, requires_grad=True)
        reset = torch.rand(steps, B) < 0.3
        results = []
        for run in (lstm, compiled):
            torch.manual_seed(steps)
            output = run(x, reset=reset)[0]
            results.append((output, *torch.autograd.grad(output.square().sum(), x)))
        for a, b in zip(*results, strict=True):
            assert_close(a, b)

    check(4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps in (7, 3):
            check(steps)


@pytest.mark.parametrize(
    ("name", "value"),
    list(
        itertools.product(("zoneout_h", "zoneout_c", "weight_dropout"), (-0.1, 1.1, float("nan")))
    ),
)
def test_bad_probabilities(name, value):
    with pytest.raises(
        ValueError, match=rf"llmkern\.LSTM: expected {name} in \[0, 1\], got {value}"
    ):
        layer(**{name: value})


def test_bad_arguments():
    lstm, x = layer(batch_first=True), torch.zeros(B, T, I, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"reset of shape \[B, T\], got \[6\]"):
        lstm(x, reset=torch.zeros(T, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"reset of shape \[T, B\] = \[6, 3\], got \[3, 6\]"):
        lstm(x, reset=torch.zeros(T, B, dtype=torch.bool))
    with pytest.raises(TypeError, match="reset to be a Tensor, got list"):
        lstm(x, reset=[True])
    packed = nn.utils.rnn.pack_sequence([x[0]])
    with pytest.raises(ValueError, match="no lengths, reset or return_cells beside a PackedSeq"):
        lstm(packed, return_cells=True)
    projected = layer(proj_size=P)
    state = torch.zeros(1, B, H, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"h_0 of shape \[S, B, P\] = \[1, 3, 4\], got \[1, 3, 9\]"
    ):
        projected(x.transpose(0, 1), (state, state))
