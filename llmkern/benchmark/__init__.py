# SPDX-License-Identifier: Apache-2.0
"""Timing llmkern beside its peers: the one harness of ``llmkern bench`` and of the ``benchmarks`` folder.

A family's module (``lstm``, ``embedding``, ...) says what a case is: who competes, on what, how right they must be and
how much work it is. This package does the rest: it checks the results, times all contenders in one run, interleaved,
measures what the machine can do, and reports both side by side.

Example:
    >>> from llmkern.benchmark import lstm, measure, measure_ceilings, table
    >>> result = measure(lstm.decode(H=512))
    >>> print(table([result], measure_ceilings()))
"""

from llmkern.benchmark.case import OURS, Case, Contender, Phase, Workload, agreement
from llmkern.benchmark.ceilings import Ceilings, Level, measure_ceilings
from llmkern.benchmark.ceilings_cuda import measure_cuda_ceilings
from llmkern.benchmark.report import document, summary, table, write_document
from llmkern.benchmark.timing import Protocol, Result, Timing, check, measure

__all__ = [
    "OURS",
    "Case",
    "Ceilings",
    "Contender",
    "Level",
    "Phase",
    "Protocol",
    "Result",
    "Timing",
    "Workload",
    "agreement",
    "check",
    "document",
    "measure",
    "measure_ceilings",
    "measure_cuda_ceilings",
    "summary",
    "table",
    "write_document",
]
