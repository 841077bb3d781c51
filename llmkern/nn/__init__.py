# SPDX-License-Identifier: Apache-2.0
"""Drop-in layers: the constructors, state_dicts, outputs and errors of torch.nn, on llmkern's kernels."""

from llmkern.nn.embedding import Embedding

__all__ = ["Embedding"]
