# SPDX-License-Identifier: Apache-2.0
"""Training language models: the trainer and its settings, evaluation, metrics, checkpoints."""

from llmkern.training.arguments import TrainingArguments
from llmkern.training.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from llmkern.training.metrics import (
    EvaluationResult,
    classification_report,
    evaluate,
    perplexity,
)
from llmkern.training.trainer import Trainer, TrainingResult

__all__ = [
    "EvaluationResult",
    "Trainer",
    "TrainingArguments",
    "TrainingResult",
    "classification_report",
    "evaluate",
    "list_checkpoints",
    "load_checkpoint",
    "perplexity",
    "save_checkpoint",
]
