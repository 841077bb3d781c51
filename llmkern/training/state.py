# SPDX-License-Identifier: Apache-2.0
"""Where a run is: the part of a checkpoint that is neither parameters nor random numbers."""

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainingState:
    """The position and the books of a run.

    Attributes:
        step: optimizer steps taken.
        epoch: epochs finished.
        position: columns of the lanes read in this epoch.
        loss_sum: the sum of this epoch's losses over its tokens, in nats.
        tokens: tokens of this epoch.
        interval_loss_sum: the sum of the losses since the last line of the log.
        interval_tokens: tokens since then.
        learning_rate: of the last step.
        best_loss: the best validation loss so far; None before the first.
        best_step: the step of the model that had it.
        epochs_without_gain: epochs since the one that ended with the best validation loss. Validations in mid-epoch
            do not count: where a run was stopped must not decide when it ends.
        history: one dict for each finished epoch: epoch, step, learning_rate, train_loss, valid_loss.
        log_size: bytes of the log that belong to this state; what a killed run wrote after them is cut off.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    loss_sum: float = 0.0
    tokens: int = 0
    interval_loss_sum: float = 0.0
    interval_tokens: int = 0
    learning_rate: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    epochs_without_gain: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    log_size: int = 0

    def add(self, loss: float, tokens: int, learning_rate: float, position: int) -> None:
        """Books a step: its mean loss over so many tokens, its learning rate, and where it ended."""
        self.step += 1
        self.position = position
        self.learning_rate = learning_rate
        self.loss_sum += loss * tokens
        self.tokens += tokens
        self.interval_loss_sum += loss * tokens
        self.interval_tokens += tokens

    def interval_loss(self) -> float:
        """The mean loss since the last line of the log."""
        return self.interval_loss_sum / self.interval_tokens

    def end_interval(self) -> None:
        """After a line of the log."""
        self.interval_loss_sum, self.interval_tokens = 0.0, 0

    def validated(self, loss: float) -> bool:
        """Books a validation; True if its model is the best so far."""
        is_best = self.best_loss is None or loss < self.best_loss
        if is_best:
            self.best_loss, self.best_step = loss, self.step
        return is_best

    def end_epoch(self, valid_loss: float | None) -> None:
        """Closes the books of an epoch."""
        before = [record["valid_loss"] for record in self.history]
        self.epoch += 1
        record = {
            "epoch": self.epoch,
            "step": self.step,
            "learning_rate": self.learning_rate,
            "train_loss": self.loss_sum / self.tokens,
            "valid_loss": valid_loss,
        }
        self.history.append(record)
        self.position, self.loss_sum, self.tokens = 0, 0.0, 0
        if valid_loss is not None:
            gained = valid_loss < min(before, default=math.inf)
            self.epochs_without_gain = 0 if gained else self.epochs_without_gain + 1

    def to_dict(self) -> dict[str, Any]:
        """As plain Python values."""
        return asdict(self)


class Stopwatch:
    """Tokens a second since it was started, validation and saving left out by starting it anew."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._tokens = 0
        self._began = time.monotonic()

    def speed(self, tokens: int) -> float:
        """After so many more tokens."""
        self._tokens += tokens
        return self._tokens / max(time.monotonic() - self._began, 1e-9)
