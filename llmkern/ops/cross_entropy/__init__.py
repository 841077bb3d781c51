# SPDX-License-Identifier: Apache-2.0
"""Linear cross entropy: :mod:`loss` and :mod:`logits` have the functions, the others what serves its derivatives."""

from llmkern.ops.cross_entropy.logits import linear_logits
from llmkern.ops.cross_entropy.loss import linear_cross_entropy

__all__ = ["linear_cross_entropy", "linear_logits"]
