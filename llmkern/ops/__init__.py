# SPDX-License-Identifier: Apache-2.0
"""Functional operators, one file a family: validation, shapes for the compiler, gradients. The math is native."""

from llmkern.ops.embedding import embedding

__all__ = ["embedding"]
