# SPDX-License-Identifier: Apache-2.0
"""Export to ONNX: LSTM layers and embeddings become the standard's own LSTM and Gather, which run wherever ONNX does.

    program = torch.onnx.export(
        model, (x,), dynamo=True, custom_translation_table=llmkern.onnx.translation_table()
    )

Needs ``pip install 'llmkern[onnx]'``: onnx and onnxscript, as torch.onnx.export itself does. Call
``model.eval()`` first.
"""

from collections.abc import Callable
from typing import Any

import torch

_INT32 = 6  # onnx.TensorProto.INT32


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What torch.onnx.export needs to know of llmkern's layers, for its ``custom_translation_table``.

    :class:`llmkern.nn.LSTM` and :class:`llmkern.nn.LSTMCell` are translated with any number of layers, both directions,
    with or without biases, initial states, sequences of different lengths (``lengths`` becomes ``sequence_lens``), and
    dynamic T and B; :class:`llmkern.nn.Embedding` with any options, as they matter to its gradient alone. So a whole
    :class:`llmkern.models.LanguageModel` can be exported too.

    Raises, during the export:
        NotImplementedError: projections, layer norm, zoneout, resets or the cell states of all steps, which the LSTM of
            ONNX does not have.

    Example:
        >>> import llmkern.onnx
        >>> lstm, x = llmkern.nn.LSTM(256, 512).eval(), torch.randn(35, 20, 256)
        >>> table = llmkern.onnx.translation_table()
        >>> torch.onnx.export(lstm, (x,), "lstm.onnx", dynamo=True, custom_translation_table=table)
    """
    return {
        torch.ops.llmkern.lstm.default: _lstm,
        torch.ops.llmkern.embedding.default: _embedding,
    }


def _embedding(
    ids: Any, weight: Any, padding_idx: int = -1, scale_grad_by_freq: bool = False
) -> Any:
    from onnxscript import opset18

    return opset18.Gather(weight, ids, axis=0)


def _lstm(
    input: Any,
    h_0: Any,
    c_0: Any,
    weight_ih: Any,
    weight_hh: Any,
    bias_ih: Any = None,
    bias_hh: Any = None,
    weight_hr: Any = None,
    norm_gates: Any = None,
    norm_cell: Any = None,
    lengths: Any = None,
    reset: Any = None,
    seed: Any = None,
    packed: Any = None,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    reverse: bool = False,
    save_cells: bool = False,
    save_gates: bool = False,
) -> tuple[Any, ...]:
    """llmkern::lstm as operators of ONNX; what only a backward pass needs is left out."""
    from onnxscript import opset18

    op: Any = opset18  # it takes lists of numbers for tensors, which its annotations do not say
    variants = {"a projection": weight_hr, "layer norm": norm_gates, "resets": reset}
    variants |= {"zoneout": zoneout_h or zoneout_c or None}
    for name, value in variants.items():
        if value is not None:
            raise NotImplementedError(f"llmkern.onnx: expected an LSTM that ONNX has, got {name}")

    four_h, columns = weight_hh.shape
    i_o_f_c = [0, 3, 1, 2]  # the standard's order, in terms of torch's i, f, g, o

    def reordered(weight: Any) -> Any:
        """[4*H, X] as [1, 4*H, X]."""
        blocks = op.Reshape(weight, [4, four_h // 4, -1])
        return op.Reshape(op.Gather(blocks, i_o_f_c), [1, four_h, -1])

    bias = None
    if bias_ih is not None:
        blocks = op.Reshape(op.Concat(bias_ih, bias_hh, axis=0), [8, -1])
        both = i_o_f_c + [4 + gate for gate in i_o_f_c]
        bias = op.Reshape(op.Gather(blocks, both), [1, -1])
    output, h_n, c_n = op.LSTM(
        input,
        reordered(weight_ih),
        reordered(weight_hh),
        bias,
        None if lengths is None else op.Cast(lengths, to=_INT32),
        op.Unsqueeze(h_0, [0]),
        op.Unsqueeze(c_0, [0]),
        direction="reverse" if reverse else "forward",
        hidden_size=int(columns),
    )
    h_n, c_n = op.Squeeze(h_n, [0]), op.Squeeze(c_n, [0])
    if (
        lengths is not None
    ):  # the standard does not say what a row without steps ends with; here, with what it began
        empty = op.Unsqueeze(op.Equal(lengths, 0), [1])
        h_n, c_n = op.Where(empty, h_0, h_n), op.Where(empty, c_0, c_n)
    return _Results((op.Squeeze(output, [1]), h_n, c_n))


class _Results(tuple[Any, ...]):
    """The results that ONNX has; whoever reaches for one of the others hears what is missing."""

    def __getitem__(self, index: Any) -> Any:
        if index >= len(self):
            raise NotImplementedError(
                "llmkern.onnx: expected an LSTM that ONNX has, got the cell states of all steps"
            )
        return super().__getitem__(index)
