# SPDX-License-Identifier: Apache-2.0
"""Linear cross entropy: :mod:`loss` has the function, the other modules what serves its derivatives."""

from llmkern.ops.cross_entropy.loss import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
