# SPDX-License-Identifier: Apache-2.0
"""The optimizer and the learning rate of a run, both torch's own."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from llmkern.training.arguments import TrainingArguments


def make_optimizer(parameters: Iterable[nn.Parameter], arguments: TrainingArguments) -> Optimizer:
    """The optimizer the arguments name."""
    lr, decay = arguments.learning_rate, arguments.weight_decay
    if arguments.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr, momentum=arguments.momentum, weight_decay=decay, fused=True
        )
    if arguments.optimizer == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=decay, fused=True)
    if arguments.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr, weight_decay=decay, fused=True)
    return torch.optim.RMSprop(
        parameters,
        lr,
        alpha=arguments.rmsprop_alpha,
        momentum=arguments.momentum,
        weight_decay=decay,
    )


class LearningRate:
    """The schedule: told of every step and of every epoch, it sets the optimizer's learning rate.

    Args:
        optimizer: whose learning rate is set.
        arguments: name the schedule.
        steps_per_epoch: optimizer steps of an epoch.
        total_steps: optimizer steps of the whole run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        arguments: TrainingArguments,
        steps_per_epoch: int,
        total_steps: int,
    ) -> None:
        self._optimizer = optimizer
        self._plateau: ReduceLROnPlateau | None = None
        self._by_step: LambdaLR | None = None
        if arguments.lr_schedule == "plateau":
            self._plateau = ReduceLROnPlateau(
                optimizer, factor=arguments.lr_decay, patience=0, threshold=0.0, eps=0.0
            )
        else:
            self._by_step = LambdaLR(
                optimizer, lambda step: _factor(arguments, step, steps_per_epoch, total_steps)
            )

    @property
    def value(self) -> float:
        """The learning rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def after_step(self) -> None:
        """After every optimizer step."""
        if self._by_step is not None:
            self._by_step.step()

    def after_epoch(self, valid_loss: float) -> None:
        """After every evaluation."""
        if self._plateau is not None:
            self._plateau.step(valid_loss)

    def state_dict(self) -> dict[str, Any]:
        scheduler = self._plateau or self._by_step
        assert scheduler is not None
        return scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        scheduler = self._plateau or self._by_step
        assert scheduler is not None
        scheduler.load_state_dict(state)


def _factor(
    arguments: TrainingArguments, step: int, steps_per_epoch: int, total_steps: int
) -> float:
    """The learning rate of step number ``step`` (the first is 0) over the starting value."""
    if arguments.lr_schedule == "decay":
        epoch = step // steps_per_epoch
        return float(arguments.lr_decay ** max(0, epoch + 1 - arguments.lr_decay_after))
    if arguments.lr_schedule == "cosine":
        warmup = arguments.warmup_steps
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, total_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return 1.0
