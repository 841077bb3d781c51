# SPDX-License-Identifier: Apache-2.0
"""Drop-in layers: the constructors, state_dicts, outputs and errors of torch.nn, on llmkern's kernels."""

from llmkern.nn._weights import snapshot_weights
from llmkern.nn.embedding import Embedding
from llmkern.nn.linear_cross_entropy import LinearCrossEntropyLoss
from llmkern.nn.lstm import LSTM
from llmkern.nn.lstm_cell import LSTMCell
from llmkern.nn.sampler import Sampler

__all__ = ["LSTM", "Embedding", "LSTMCell", "LinearCrossEntropyLoss", "Sampler", "snapshot_weights"]
