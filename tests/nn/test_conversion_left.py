# SPDX-License-Identifier: Apache-2.0
"""What convert() and revert() leave as it is, and the reasons that their reports give."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune, spectral_norm, weight_norm

import llmkern
from tests.conftest import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = (llmkern.nn.LSTM, llmkern.nn.LSTMCell, llmkern.nn.Embedding)


class OwnForward(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input * 2, hx)


class OwnReset(nn.LSTMCell):
    def reset_parameters(self):
        nn.init.zeros_(self.weight_ih)


class OwnName(nn.Embedding):
    pass


class Symmetric(nn.Module):
    def forward(self, x):
        return x


def with_replaced_forward():
    layer = nn.Embedding(5, 3)
    forward = layer.forward
    layer.forward = lambda ids: forward(ids) * 2
    return layer


def with_parametrization():
    layer = nn.LSTM(3, 4)
    parametrize.register_parametrization(layer, "weight_hh_l0", Symmetric())
    return layer


def with_two_dtypes():
    layer = nn.LSTMCell(3, 4)
    layer.weight_hh = nn.Parameter(layer.weight_hh.double())
    return layer


def with_plain_weight():
    """As implementations of weight dropout do it."""
    layer = nn.LSTM(3, 4)
    weight = layer._parameters.pop("weight_hh_l0")
    layer.register_parameter("weight_hh_l0_raw", weight)
    layer.weight_hh_l0 = weight * 0.5
    return layer


def with_subclassed_parameter():
    class Tagged(nn.Parameter):
        pass

    layer = nn.Embedding(5, 3)
    layer._parameters["weight"] = Tagged(layer.weight.detach())
    return layer


def lazy():
    layer = nn.LSTMCell(3, 4)
    layer.weight_ih = nn.UninitializedParameter()
    return layer


def prepared():
    layer = nn.LSTM(3, 4)
    layer.qconfig = torch.ao.quantization.float16_dynamic_qconfig
    return layer


def pruned():
    return prune.l1_unstructured(nn.LSTM(3, 4), "weight_hh_l0", 0.5)


LEFT = {
    "own forward": (lambda: OwnForward(3, 4), "a subclass of torch.nn.LSTM with its own forward"),
    "own reset": (
        lambda: OwnReset(3, 4),
        "a subclass of torch.nn.LSTMCell with its own reset_parameters",
    ),
    "own name": (lambda: OwnName(3, 4), "a subclass of torch.nn.Embedding"),
    "replaced forward": (with_replaced_forward, "its forward was replaced"),
    "parametrized": (
        with_parametrization,
        "weight_hh_l0 is computed by torch.nn.utils.parametrize; swap the layer before that",
    ),
    "weight_norm": (
        lambda: weight_norm(nn.LSTM(3, 4), "weight_hh_l0"),
        "weight_hh_l0 is no parameter but computed by torch.nn.utils.weight_norm.WeightNorm",
    ),
    "spectral_norm": (
        lambda: spectral_norm(nn.Embedding(5, 3)),
        "weight is no parameter but computed by torch.nn.utils.spectral_norm.SpectralNorm",
    ),
    "pruned": (
        pruned,
        "weight_hh_l0 is no parameter but computed by torch.nn.utils.prune.L1Unstructured",
    ),
    "plain weight": (with_plain_weight, "weight_hh_l0 is no parameter but computed"),
    "other parameter": (with_subclassed_parameter, "weight is a tests.nn.test_conversion_left."),
    "two dtypes": (with_two_dtypes, "float32 on cpu and float64 on cpu"),
    "lazy": (lazy, "not initialised yet; call it once before"),
    "to be quantised": (prepared, "prepared for quantisation"),
    "sparse": (lambda: nn.Embedding(5, 3, sparse=True), "sparse=True, whose gradient"),
    "complex": (lambda: nn.Embedding(5, 3, dtype=torch.complex64), "got complex64"),
    "8 bits": (
        lambda: nn.Embedding(5, 3).to(torch.float8_e5m2),
        "expected weight of dtype float32",
    ),
    "another option": (lambda: changed(nn.LSTM(3, 4), bias=1), "bias should be of type bool"),
}


def changed(layer, **attributes):
    vars(layer).update(attributes)
    return layer


@pytest.mark.parametrize("case", LEFT)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's older norms
def test_what_cannot_be_served_is_left_with_the_reason(case):
    make, reason = LEFT[case]
    layer = make()
    model = nn.ModuleDict({"odd": layer, "even": nn.LSTM(2, 2)})
    kind, attributes = type(layer), dict(vars(layer))
    report = llmkern.convert(model)
    assert [x.name for x in report.converted] == ["even"]
    ((name, left, why),) = report.left
    assert (name, left) == ("odd", kind) and reason in why, why
    assert type(layer) is kind and model["odd"] is layer
    assert vars(layer).keys() == attributes.keys()
    assert all(vars(layer)[key] is value for key, value in attributes.items())
    assert f"odd: {kind.__module__}" in str(report) or "odd: torch.nn." in str(report)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.ao and torch.jit are deprecated
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_and_scripted_layers_are_left_with_the_reason():
    model = nn.Sequential(nn.LSTM(3, 4))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})
    kind = type(quantised[0])
    (left,) = llmkern.convert(quantised).left
    assert left == ("0", kind, "quantised, or prepared for it")
    assert type(quantised[0]) is kind
    scripted = torch.jit.script(model)
    (left,) = llmkern.convert(scripted).left
    assert (left.name, left.reason) == ("0", "compiled by torch.jit")


def test_dtypes_without_kernels_are_asked_of_the_kernels(monkeypatch):
    """float16 is taken as soon as the class takes it."""
    layer = nn.LSTM(3, 4, dtype=torch.float16)

    def served(self, input, hx=None):
        assert input.dtype == self.weight_ih_l0.dtype == torch.float16
        return input, None

    monkeypatch.setattr(llmkern.nn.LSTM, "forward", served)
    assert llmkern.convert(layer).left == ()


@pytest.mark.parametrize("proj_size", [0, 2])
def test_projections_are_asked_of_the_class(proj_size):
    layer = nn.LSTM(3, 4, proj_size=proj_size, dtype=torch.float64)
    try:
        llmkern.nn.LSTM(3, 4, proj_size=proj_size)
        served = True
    except ValueError as error:
        served, reason = False, str(error)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    expected, _ = layer(x)
    report = llmkern.convert(layer)
    assert_close(layer(x)[0], expected)
    assert report.left == (() if served else (("", nn.LSTM, reason),))


def test_options_of_llmkern_alone_cannot_be_reverted():
    """Each keyword-only option of each class, away from its default."""
    values = {bool: True, float: 0.25, type(None): 2.0}
    for ours in CLASSES:
        for name, parameter in inspect.signature(ours).parameters.items():
            if parameter.kind is not parameter.KEYWORD_ONLY:
                continue
            value = values[type(parameter.default)]
            layer = ours(3, 4, **{name: value})
            reason = f"{name}={value} has no counterpart in torch.nn"
            assert llmkern.revert(layer).left == (("", ours, reason),)
            assert type(layer) is ours


def test_an_option_in_use_keeps_a_layer_from_being_reverted(monkeypatch):
    plain = llmkern.nn.LSTMCell.__init__

    def with_option(self, *args, peephole=False, **kwargs):
        plain(self, *args, **kwargs)
        self.peephole = peephole

    monkeypatch.setattr(llmkern.nn.LSTMCell, "__init__", with_option)
    model = nn.ModuleList(
        [llmkern.nn.LSTMCell(3, 4, peephole=True), llmkern.nn.LSTMCell(3, 4), nn.LSTMCell(3, 4)]
    )
    llmkern.convert(model)
    assert model[2].peephole is False
    report = llmkern.revert(model)
    assert report.left == (
        ("0", llmkern.nn.LSTMCell, "peephole=True has no counterpart in torch.nn"),
    )
    assert [x.name for x in report.converted] == ["1", "2"]
    assert not hasattr(model[1], "peephole") and not hasattr(model[2], "peephole")


def test_subclasses_of_llmkerns_layers_are_not_reverted():
    class Mine(llmkern.nn.LSTM):
        def forward(self, input, hx=None):
            return super().forward(input, hx)

    layer = Mine(3, 4)
    assert llmkern.convert(layer).left == ()
    (left,) = llmkern.revert(layer).left
    assert left.reason == "a subclass of llmkern.nn.LSTM with its own forward"
    assert type(layer) is Mine


def test_the_report_in_print():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), OwnForward(3, 4))
    report = llmkern.convert(model)
    kind = f"{OwnForward.__module__}.OwnForward"
    assert (
        str(report)
        == repr(report)
        == (
            "1 converted, 1 left\n"
            "  0: torch.nn.Embedding -> llmkern.nn.Embedding\n"
            f"  2: {kind} left: a subclass of torch.nn.LSTM with its own forward"
        )
    )
