# SPDX-License-Identifier: Apache-2.0
"""How good a model is: loss, perplexity, bits per character, accuracy; and a report for classifiers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmkern._optional import require
from llmkern.text import bptt_windows, contiguous_lanes

# Logits of one chunk, in values: 16 MB of float32, so that a large vocabulary needs no large memory.
_MAX_LOGITS = 2**22


@dataclass(frozen=True)
class EvaluationResult:
    """What evaluate() found.

    Attributes:
        loss: mean cross entropy of a token, in nats.
        perplexity: exp(loss).
        bits_per_character: loss / ln 2 for a token of one character, None if characters were not counted.
        top1_accuracy: the share of tokens that were the most probable one; None if not asked for.
        top5_accuracy: the share of tokens that were among the five most probable; None likewise.
        tokens: the number of tokens predicted.
    """

    loss: float
    perplexity: float
    bits_per_character: float | None
    top1_accuracy: float | None
    top5_accuracy: float | None
    tokens: int


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    ids: Tensor,
    *,
    batch_size: int = 10,
    bptt: int = 35,
    accuracy: bool = True,
    characters_per_token: float | None = None,
    on_progress: Callable[[int, int], object] | None = None,
) -> EvaluationResult:
    """Predicts every token of a text from all tokens before it in its lane, the state carried throughout.

    Args:
        model: has ``.loss(ids, targets, state)``, and for the accuracy ``model(ids, state) -> (logits, state)``.
        ids: the text, int64 or int32 [N].
        batch_size: lanes the text is cut into. Each starts without context, so a published number goes with its
            batch size; 1 is the exact one and the slowest.
        bptt: tokens a lane reads at a time; changes nothing but the memory used.
        accuracy: also compute top-1 and top-5 accuracy. Equal logits rank by id.
        characters_per_token: of this text, 1 for characters; None leaves bits_per_character out.
        on_progress: called with (columns read, columns in all) now and then.

    Raises:
        ValueError: the text has fewer than 2 * batch_size tokens.

    Example:
        >>> evaluate(model, ids, batch_size=1).perplexity
    """
    lanes = contiguous_lanes(ids.to(_device(model)), batch_size)
    was_training = model.training
    model.eval()
    try:
        totals = _total_by_logits if accuracy else _total_by_loss
        loss_sum, top1, top5 = totals(model, lanes, bptt, on_progress)
    finally:
        model.train(was_training)
    tokens = lanes.shape[0] * (lanes.shape[1] - 1)
    loss = loss_sum / tokens
    return EvaluationResult(
        loss=loss,
        perplexity=perplexity(loss),
        bits_per_character=None
        if characters_per_token is None
        else loss / math.log(2) / characters_per_token,
        top1_accuracy=None if top1 is None else top1 / tokens,
        top5_accuracy=None if top5 is None else top5 / tokens,
        tokens=tokens,
    )


def perplexity(loss: float) -> float:
    """exp(loss), infinity where that is too large for a float."""
    return math.exp(loss) if loss < math.log(torch.finfo(torch.float64).max) else math.inf


def classification_report(preds: Tensor, targets: Tensor, num_classes: int) -> dict[str, Any]:
    """Accuracy, precision, recall and F1 of a classifier, by torchmetrics.

    Args:
        preds: predicted classes, integers in [0, num_classes), any shape.
        targets: true classes, of the same shape.
        num_classes: the number of classes.

    Returns:
        "accuracy" (the share of right predictions); "precision", "recall" and "f1", the means over the classes
        that occur; and "classes", for each class a dict of the three and of "support", its true number.

    Raises:
        ValueError: the shapes differ, there is nothing to score, or a class is out of range.

    Example:
        >>> classification_report(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 2)["f1"]
        0.6666666865348816
    """
    _check_classes(preds, targets, num_classes)
    scores = require("torchmetrics.functional.classification", "scores classifiers")
    preds, targets = preds.reshape(-1), targets.reshape(-1)
    functions = {
        "precision": scores.multiclass_precision,
        "recall": scores.multiclass_recall,
        "f1": scores.multiclass_f1_score,
    }
    by_class = {
        name: function(preds, targets, num_classes, average="none").tolist()
        for name, function in functions.items()
    }
    means = {
        name: function(preds, targets, num_classes, average="macro").item()
        for name, function in functions.items()
    }
    support = torch.bincount(targets, minlength=num_classes).tolist()
    classes = [
        {name: values[i] for name, values in by_class.items()} | {"support": support[i]}
        for i in range(num_classes)
    ]
    accuracy = scores.multiclass_accuracy(preds, targets, num_classes, average="micro").item()
    return {"accuracy": accuracy, **means, "classes": classes}


def _check_classes(preds: Tensor, targets: Tensor, num_classes: int) -> None:
    where = "llmkern.classification_report"
    if preds.shape != targets.shape or preds.numel() == 0:
        raise ValueError(
            f"{where}: expected preds and targets of one shape and not empty, "
            f"got {list(preds.shape)} and {list(targets.shape)}"
        )
    for name, values in (("preds", preds), ("targets", targets)):
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{where}: expected {name} in [0, {num_classes}), got {low if low < 0 else high}"
            )


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _total_by_loss(
    model: nn.Module, lanes: Tensor, bptt: int, on_progress: Callable[[int, int], object] | None
) -> tuple[float, None, None]:
    total, state = 0.0, None
    for start, inputs, targets in bptt_windows(lanes, bptt):
        loss, state = model.loss(inputs, targets, state)  # type: ignore[operator]
        total += loss.item() * targets.numel()
        if on_progress is not None:
            on_progress(start + targets.shape[1], lanes.shape[1] - 1)
    return total, None, None


def _total_by_logits(
    model: nn.Module, lanes: Tensor, bptt: int, on_progress: Callable[[int, int], object] | None
) -> tuple[float, int, int]:
    total, top1, top5, state = 0.0, 0, 0, None
    vocab_size = getattr(model, "vocab_size", 1)
    window = max(1, min(bptt, _MAX_LOGITS // (lanes.shape[0] * vocab_size)))
    for start, inputs, targets in bptt_windows(lanes, window):
        logits, state = model(inputs, state)
        logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        total += F.cross_entropy(logits, targets, reduction="sum").item()
        first, among_five = _hits(logits, targets)
        top1 += first
        top5 += among_five
        if on_progress is not None:
            on_progress(start + inputs.shape[1], lanes.shape[1] - 1)
    return total, top1, top5


def _hits(logits: Tensor, targets: Tensor) -> tuple[int, int]:
    """How many targets are the first token, and among the first five, by logit descending and id ascending."""
    own = logits.gather(1, targets[:, None])
    # Not "logits > own": NaN compares false with everything and would make every target the best.
    rank = (logits <= own).logical_not().sum(1)
    close = (rank < 5).nonzero()[:, 0]  # an equal logit with a lower id can only move these out
    ids = torch.arange(logits.shape[1], device=logits.device)
    before = (logits[close] == own[close]) & (ids < targets[close, None])
    rank = rank[close] + before.sum(1)
    return int((rank < 1).sum()), int((rank < 5).sum())
