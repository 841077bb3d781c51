# SPDX-License-Identifier: Apache-2.0
"""Functional operators, one file a family: validation, shapes for the compiler, gradients. The math is native."""

from llmkern.ops import _flops as _flops  # registers formulas
from llmkern.ops._deferred import raise_deferred_errors
from llmkern.ops._memory import empty_cache
from llmkern.ops.cross_entropy import linear_cross_entropy, linear_logits
from llmkern.ops.decoding import (
    BeamCandidates,
    Verified,
    beam_search_step,
    multinomial,
    speculative_verify,
)
from llmkern.ops.dropout import dropout
from llmkern.ops.embedding import embedding
from llmkern.ops.lstm import lstm, lstm_cell, lstm_pack
from llmkern.ops.sampling import SampleOutput, filter_logits, sample

__all__ = [
    "BeamCandidates",
    "SampleOutput",
    "Verified",
    "beam_search_step",
    "dropout",
    "embedding",
    "empty_cache",
    "filter_logits",
    "linear_cross_entropy",
    "linear_logits",
    "lstm",
    "lstm_cell",
    "lstm_pack",
    "multinomial",
    "raise_deferred_errors",
    "sample",
    "speculative_verify",
]
