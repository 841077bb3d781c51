# SPDX-License-Identifier: Apache-2.0
"""Exported to ONNX, the layers compute the same in onnxruntime, by the standard's own nodes."""

import itertools
import re

import pytest
import torch

import llmkern
import llmkern.onnx
from llmkern.models import LanguageModel
from tests.conftest import assert_close

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # The exporter's own, from the libraries that it calls.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

T, B, I, H = 5, 3, 4, 6  # noqa: E741
TOLERANCE = 2e-6


def export(module, args, kwargs=None, **options):
    table = llmkern.onnx.translation_table()
    return torch.onnx.export(
        module.eval(),
        args,
        kwargs=kwargs,
        dynamo=True,
        custom_translation_table=table,
        verbose=False,
        **options,
    )


def session_of(program):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)


def run(session, *tensors):
    names = [i.name for i in session.get_inputs()]
    return [
        torch.from_numpy(r)
        for r in session.run(None, dict(zip(names, (t.numpy() for t in tensors), strict=True)))
    ]


def assert_same(session, module, args, kwargs=None):
    kwargs = kwargs or {}
    expected = torch.utils._pytree.tree_leaves(module(*args, **kwargs))
    tensors = torch.utils._pytree.tree_leaves((args, kwargs))
    for got, truth in zip(run(session, *tensors), expected, strict=True):
        assert_close(got, truth, TOLERANCE)


STRUCTURES = [
    dict(zip(("num_layers", "bias", "batch_first", "bidirectional"), values, strict=True))
    for values in itertools.product((1, 2), (True, False), (True, False), (True, False))
]


@pytest.mark.parametrize(
    "options", STRUCTURES[::3], ids=lambda o: "-".join(str(v) for v in o.values())
)
def test_structures_over_other_batches_and_sequences(options):
    lstm = llmkern.nn.LSTM(I, H, dropout=0.5 * (options["num_layers"] > 1), **options)
    time, batch = torch.export.Dim("time"), torch.export.Dim("batch")
    first = options["batch_first"]
    shapes = {"input": {0: batch, 1: time} if first else {0: time, 1: batch}}
    program = export(lstm, (torch.randn(B, T, I),), dynamic_shapes=shapes)
    nodes = [n for n in program.model.graph if n.op_type == "LSTM"]
    assert len(nodes) == options["num_layers"] * (2 if options["bidirectional"] else 1)
    assert not program.model.functions and all(n.domain == "" for n in program.model.graph)
    session = session_of(program)
    for rows, steps in ((B, T), (1, 9), (7, 1)):
        x = torch.randn(*((rows, steps) if first else (steps, rows)), I)
        assert_same(session, lstm, (x,))


def test_initial_states():
    lstm = llmkern.nn.LSTM(I, H, num_layers=2, bidirectional=True)
    args = torch.randn(T, B, I), (torch.randn(4, B, H), torch.randn(4, B, H))
    assert_same(session_of(export(lstm, args)), lstm, args)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_lengths(bidirectional):
    """They become sequence_lens; also of a row without steps."""
    lstm = llmkern.nn.LSTM(I, H, num_layers=2, bidirectional=bidirectional)
    S = 4 if bidirectional else 2
    args = torch.randn(T, B, I), (torch.randn(S, B, H), torch.randn(S, B, H))
    session = session_of(export(lstm, args, {"lengths": torch.tensor([5, 2, 1])}))
    for lengths in ([5, 2, 1], [0, 5, 3], [1, 1, 1]):
        assert_same(session, lstm, args, {"lengths": torch.tensor(lengths)})


def test_unbatched():
    lstm = llmkern.nn.LSTM(I, H)
    args = (torch.randn(T, I),)
    assert_same(session_of(export(lstm, args)), lstm, args)


def test_cell():
    cell = llmkern.nn.LSTMCell(I, H)
    args = torch.randn(B, I), (torch.randn(B, H), torch.randn(B, H))
    program = export(cell, args)
    assert [n.op_type for n in program.model.graph].count("LSTM") == 1
    assert_same(session_of(program), cell, args)


def test_a_layer_within_a_model():
    """What comes before and after is the exporter's business."""

    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = llmkern.nn.Embedding(11, I, padding_idx=0)
            self.lstm = llmkern.nn.LSTM(I, H, bidirectional=True, batch_first=True)
            self.head = torch.nn.Linear(2 * H, 3)

        def forward(self, ids):
            return self.head(self.lstm(self.embedding(ids))[0].amax(1))

    model = Classifier()
    session = session_of(export(model, (torch.randint(11, (B, T)),)))
    assert_same(session, model, (torch.randint(11, (B, T)),))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_an_embedding_is_a_gather(index_dtype):
    layer = llmkern.nn.Embedding(11, I, padding_idx=2, scale_grad_by_freq=True)
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}
    ids = torch.randint(11, (B, T), dtype=index_dtype)
    program = export(layer, (ids,), dynamic_shapes={"input": dims})
    assert [n.op_type for n in program.model.graph] == ["Gather"]
    session = session_of(program)
    for shape in ((B, T), (1, 9), (7, 1)):
        ids = torch.randint(11, shape, dtype=index_dtype)
        (got,) = run(session, ids)
        assert torch.equal(got, layer(ids))


@pytest.mark.filterwarnings("ignore:# The axis name:UserWarning")  # two inputs have the batch
@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_language_model(tied):
    """Logits and states, for other texts, from the beginning and further on."""
    model = LanguageModel(23, embedding_dim=H, hidden_size=H, num_layers=2, tie_weights=tied)
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}
    states = ({1: dims[0]},) * 2
    args = torch.randint(23, (B, T)), model.initial_state(B)
    program = export(model, args, dynamic_shapes={"ids": dims, "state": states})
    types = [n.op_type for n in program.model.graph]
    assert types.count("LSTM") == 2 and not program.model.functions
    assert all(n.domain == "" for n in program.model.graph)
    session = session_of(program)
    for rows, steps in ((B, T), (1, 1), (4, 8)):
        ids, state = torch.randint(23, (rows, steps)), model.initial_state(rows)
        assert_same(session, model, (ids, state))
        assert_same(session, model, (ids, tuple(torch.randn_like(s) for s in state)))


class Layer(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options
        self.h = torch.zeros(B, 2 if "weight_hr" in options else H)
        self.w_ih, self.w_hh = torch.randn(4 * H, I), torch.randn(4 * H, self.h.shape[1])

    def forward(self, x):
        c = x.new_zeros(B, H)
        return llmkern.ops.lstm(x, self.h, c, self.w_ih, self.w_hh, **self.options)


MISSING = {
    "a projection": {"weight_hr": torch.ones(2, H)},
    "layer norm": {"norm_gates": torch.ones(2, 4 * H), "norm_cell": torch.ones(2, H)},
    "zoneout": {"zoneout_c": 0.1},
    "resets": {"reset": torch.ones(T, B, dtype=torch.bool)},
    "the cell states of all steps": {"return_cells": True},
}


@pytest.mark.parametrize("name", MISSING)
def test_what_onnx_does_not_have(name):
    message = re.escape(f"llmkern.onnx: expected an LSTM that ONNX has, got {name}")
    with pytest.raises(torch.onnx.OnnxExporterError, match=message):
        export(Layer(**MISSING[name]), (torch.randn(T, B, I),))
