# SPDX-License-Identifier: Apache-2.0
"""LSTM layers and cells: :mod:`layer` has the functions, the other modules what serves their derivatives."""

from llmkern.ops.lstm.layer import lstm, lstm_cell, lstm_pack

__all__ = ["lstm", "lstm_cell", "lstm_pack"]
