# SPDX-License-Identifier: Apache-2.0
"""One step of truncated back-propagation through time: loss, gradient, clipping, update."""

import math

import torch
from torch import Tensor, nn

from llmkern.training.arguments import TrainingArguments
from llmkern.training.carried import Hidden, detached
from llmkern.training.memory import reraise_out_of_memory
from llmkern.training.optimization import LearningRate, make_optimizer


class Stepper:
    """The model, its optimizer and what the model carries from window to window.

    Args:
        model: has ``loss(ids, targets, state) -> (mean loss, state)``.
        arguments: name the optimizer, the schedule, the clipping and the reduction.
        steps_per_epoch: optimizer steps of an epoch.
        total_steps: optimizer steps of the whole run.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        steps_per_epoch: int,
        total_steps: int,
    ) -> None:
        self.model = model
        self.hidden: Hidden = None
        self._arguments = arguments
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self._parameters, arguments)
        self.learning_rate = LearningRate(self.optimizer, arguments, steps_per_epoch, total_steps)

    def step(self, inputs: Tensor, targets: Tensor, number: int) -> tuple[float, float]:
        """Takes optimizer step ``number`` (the first is 1).

        Returns:
            The mean loss in nats and the gradient's norm before it was clipped by the norm.

        Raises:
            FloatingPointError: one of the two is not finite; nothing was updated.
            MemoryError: there is not enough memory; says how many bytes were asked for and what to lower.
        """
        try:
            return self._step(inputs, targets, number)
        except (RuntimeError, MemoryError) as error:
            reraise_out_of_memory(
                error,
                f"llmkern.Trainer: out of memory in step {number}",
                batch_size=self._arguments.batch_size,
                bptt=self._arguments.bptt,
            )

    def _step(self, inputs: Tensor, targets: Tensor, number: int) -> tuple[float, float]:
        arguments = self._arguments
        self.optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=arguments.precision == "bf16"):
            loss, hidden = self.model.loss(inputs, targets, detached(self.hidden))  # type: ignore[operator]
        loss_value = loss.item()
        self._check_finite("loss", loss_value, number)
        (loss * inputs.shape[1] if arguments.loss_reduction == "sum_time" else loss).backward()
        if arguments.max_grad_value is not None:
            nn.utils.clip_grad_value_(self._parameters, arguments.max_grad_value)
        norm = nn.utils.clip_grad_norm_(self._parameters, arguments.max_grad_norm or math.inf)
        norm_value = norm.item()
        self._check_finite("gradient's norm", norm_value, number)
        self.optimizer.step()
        self.learning_rate.after_step()
        self.hidden = detached(hidden)
        return loss_value, norm_value

    def _check_finite(self, what: str, value: float, number: int) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"llmkern.Trainer: expected a finite {what}, got {value} in step {number}; training stopped before "
                f"its update. Lower learning_rate (now {self.learning_rate.value:g}) or clip the gradient harder "
                f"(max_grad_norm, now {self._arguments.max_grad_norm})"
            )
