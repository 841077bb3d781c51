# SPDX-License-Identifier: Apache-2.0
"""What an option of the LSTM layer costs: the layer with it beside the plain one, and beside a loop of torch operators.

The loop is what one would write without the option. It gets its masks ready-made, the same ones, so that results can
be compared.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkern import ops
from llmkern.benchmark.case import OURS, Case, Contender, Workload, agreement
from llmkern.benchmark.lstm import training_phases

PLAIN, LOOP = "llmkern plain", "torch loop"
# Layer norm divides by deviations, which amplifies roundings; sums over steps as in the plain layer.
TOLERANCE = 2e-4
# Those of Krueger et al. 2017 and Merity et al. 2017 for words of the Penn Treebank.
ZONEOUT_H, ZONEOUT_C, DROPOUT = 0.025, 0.25, 0.5
_ZONEOUT_CELL, _ZONEOUT_HIDDEN = 3, 4  # purposes of masks, csrc/kernels/philox.h


class _Layer(NamedTuple):
    """x [T, B, H], the parameters of a layer with I = H, and its randomness."""

    x: Tensor
    state: Tensor
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor
    norm_gates: Tensor
    norm_cell: Tensor
    seed: Tensor

    def run(self, **options: Any) -> Tensor:
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        return ops.lstm(self.x, self.state, self.state, *weights, **options)[0]


class _Option(NamedTuple):
    ours: Callable[[_Layer], Tensor]
    loop: Callable[[_Layer], Callable[[], Tensor]]
    norm: bool = False  # has norm_gates and norm_cell


def training(option: str, H: int, B: int, T: int) -> Case:
    """Forward and backward with "layer-norm", "zoneout", "weight-dropout" or "locked-dropout", float32."""
    with_option = _OPTIONS[option]

    def build() -> Workload:
        layer = _layer(H, B, T)
        grad, loop = torch.randn(T, B, H), with_option.loop(layer)
        plain = [layer.x, *layer[2:6]]
        wanted = [*plain, layer.norm_gates, layer.norm_cell] if with_option.norm else plain

        def contender(run: Callable[[], Tensor], wanted: list[Tensor]) -> Contender:
            return Contender(lambda: torch.autograd.grad(run(), wanted, grad))

        contenders = {
            OURS: contender(lambda: with_option.ours(layer), wanted),
            PLAIN: contender(layer.run, plain),
            LOOP: contender(loop, wanted),
        }
        return Workload(contenders, _check)

    name = f"option-{option}-H{H}-B{B}-T{T}"
    phases = training_phases(H, B, T, torch.float32)
    return Case("lstm", name, build, phases, training=True)


def _check(tensors: Mapping[str, Any]) -> float:
    """The plain layer computes something else."""
    return agreement(TOLERANCE)({name: tensors[name] for name in (OURS, LOOP)})


def _layer(H: int, B: int, T: int) -> _Layer:
    w_ih, w_hh, b_ih, b_hh = (p.detach().requires_grad_() for p in nn.LSTM(H, H).parameters())
    x = torch.randn(T, B, H, requires_grad=True)
    gates = torch.ones(2, 4 * H, requires_grad=True)
    cell = torch.stack([torch.ones(H), torch.zeros(H)]).requires_grad_()
    return _Layer(x, torch.zeros(B, H), w_ih, w_hh, b_ih, b_hh, gates, cell, torch.tensor(7))


def _loop(
    layer: _Layer,
    x: Tensor,
    weight_hh: Tensor,
    norm: bool = False,
    held: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The recurrence in torch operators; ``held`` are zoneout's masks [T, B, H] of cell and output."""
    h = c = layer.state
    H = h.shape[1]
    from_input = F.linear(x, layer.weight_ih)
    if norm:
        from_input = F.layer_norm(from_input, (4 * H,), layer.norm_gates[0])
    from_input = from_input + (layer.bias_ih + layer.bias_hh)
    outputs = []
    for t in range(x.shape[0]):
        from_hidden = F.linear(h, weight_hh)
        if norm:
            from_hidden = F.layer_norm(from_hidden, (4 * H,), layer.norm_gates[1])
        i, f, g, o = (from_input[t] + from_hidden).chunk(4, 1)
        new = f.sigmoid() * c + i.sigmoid() * g.tanh()
        shown = F.layer_norm(new, (H,), *layer.norm_cell) if norm else new
        out = o.sigmoid() * shown.tanh()
        c = new if held is None else torch.where(held[0][t], c, new)
        h = out if held is None else torch.where(held[1][t], h, out)
        outputs.append(h)
    return torch.stack(outputs)


def _zoneout_loop(layer: _Layer) -> Callable[[], Tensor]:
    T, B, H = layer.x.shape
    mask = torch.ops.llmkern.mask.default
    cell = mask(layer.seed, _ZONEOUT_CELL, T * B, H, ZONEOUT_C).view(T, B, H)
    hidden = mask(layer.seed, _ZONEOUT_HIDDEN, T * B, H, ZONEOUT_H).view(T, B, H)
    return lambda: _loop(layer, layer.x, layer.weight_hh, held=(cell, hidden))


def _weight_dropout_loop(layer: _Layer) -> Callable[[], Tensor]:
    factor = ops.dropout(torch.ones_like(layer.weight_hh), DROPOUT, seed=layer.seed)
    return lambda: _loop(layer, layer.x, layer.weight_hh * factor)


def _locked_dropout_loop(layer: _Layer) -> Callable[[], Tensor]:
    factor = ops.dropout(torch.ones_like(layer.x), DROPOUT, locked=True, seed=layer.seed)
    return lambda: _loop(layer, layer.x * factor, layer.weight_hh)


def _weight_dropout(layer: _Layer) -> Tensor:
    dropped = ops.dropout(layer.weight_hh, DROPOUT, seed=layer.seed)
    return layer._replace(weight_hh=dropped).run()


def _locked_dropout(layer: _Layer) -> Tensor:
    dropped = ops.dropout(layer.x, DROPOUT, locked=True, seed=layer.seed)
    return layer._replace(x=dropped).run()


_OPTIONS = {
    "layer-norm": _Option(
        lambda layer: layer.run(norm_gates=layer.norm_gates, norm_cell=layer.norm_cell),
        lambda layer: lambda: _loop(layer, layer.x, layer.weight_hh, norm=True),
        norm=True,
    ),
    "zoneout": _Option(
        lambda layer: layer.run(zoneout_h=ZONEOUT_H, zoneout_c=ZONEOUT_C, seed=layer.seed),
        _zoneout_loop,
    ),
    "weight-dropout": _Option(_weight_dropout, _weight_dropout_loop),
    "locked-dropout": _Option(_locked_dropout, _locked_dropout_loop),
}
