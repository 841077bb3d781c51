# SPDX-License-Identifier: Apache-2.0
"""The settings of a training run, checked when they are made."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Optimizer = Literal["sgd", "adam", "adamw", "rmsprop"]
Schedule = Literal["constant", "decay", "plateau", "cosine"]
LossReduction = Literal["mean", "sum_time"]
Precision = Literal["float32", "bf16"]
OPTIMIZERS, SCHEDULES, LOSS_REDUCTIONS = map(get_args, (Optimizer, Schedule, LossReduction))
PRECISIONS = get_args(Precision)


@dataclass(frozen=True, kw_only=True)
class TrainingArguments:
    """How to train. Everything has a default that trains a small model well.

    Args:
        batch_size: B, the number of lanes the text is cut into, read side by side; None: 32, and fewer for a short
            text, so that an epoch has about 20 steps.
        bptt: T, the number of steps the gradient reaches back (truncated back-propagation through time).
        epochs: passes over the text.
        max_steps: stop after so many optimizer steps in all; None: no limit.
        max_seconds: stop each call after so many seconds; None: no limit.
        optimizer: "sgd", "adam", "adamw" or "rmsprop".
        learning_rate: the schedule's starting value.
        momentum: of "sgd" and "rmsprop".
        weight_decay: of every optimizer.
        rmsprop_alpha: the smoothing of "rmsprop".
        max_grad_norm: the gradient's norm is cut to this; None: off.
        max_grad_value: each element of the gradient is cut to [-this, this], before the norm;
            None: off.
        lr_schedule: "constant"; "decay" (Zaremba et al., 2014: times lr_decay for each epoch after
            the first lr_decay_after); "plateau" (times lr_decay when the validation loss has not
            improved at an epoch's end); "cosine" (linear warm-up over warmup_steps, then half a cosine
            down to zero at step schedule_steps).
        lr_decay: the factor of "decay" and "plateau".
        lr_decay_after: how many epochs "decay" keeps the starting value.
        warmup_steps: of "cosine".
        schedule_steps: where "cosine" reaches zero; None: at the last step, by epochs and max_steps as
            they are when the run begins. It belongs to the run: no resumed call moves it.
        loss_reduction: "mean" over all tokens of a window; "sum_time" is the mean over the batch
            of the sum over the window, Zaremba's loss: T times larger, and so are its gradients,
            before clipping.
        precision: "float32", or "bf16" on CUDA: a step's matrix products in bfloat16 under autocast; parameters, cell
            states, losses, updates and validation stay float32.
        seed: of the dropout masks, and of the parameters for whoever builds the model.
        eval_batch_size: lanes in validation; None: batch_size, and fewer for a short text.
        eval_every_steps: validate, and keep the model if it is the best, after so many steps, besides at
            each epoch's end; 0: at each epoch's end alone.
        save_every_steps: a checkpoint after so many steps, besides one after each epoch; 0: after
            each epoch alone.
        keep: how many checkpoints stay, the newest ones.
        patience: stop after so many epochs that ended without a better validation loss; None: off.
        log_every: a line in the log for so many steps.
        tensorboard: also write TensorBoard's event files.

    Raises:
        ValueError: a value is out of range, or a setting has no effect beside the others; names it.
    """

    batch_size: int | None = None
    bptt: int = 35
    epochs: int = 10
    max_steps: int | None = None
    max_seconds: float | None = None
    optimizer: Optimizer = "adam"
    learning_rate: float = 2e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    rmsprop_alpha: float = 0.99
    max_grad_norm: float | None = 1.0
    max_grad_value: float | None = None
    lr_schedule: Schedule = "constant"
    lr_decay: float = 0.25
    lr_decay_after: int = 1
    warmup_steps: int = 0
    schedule_steps: int | None = None
    loss_reduction: LossReduction = "mean"
    precision: Precision = "float32"
    seed: int = 0
    eval_batch_size: int | None = None
    eval_every_steps: int = 0
    save_every_steps: int = 1000
    keep: int = 1
    patience: int | None = None
    log_every: int = 100
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise _error(name, f"one of {', '.join(choices)}", getattr(self, name))
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise _error(name, f"an int >= {least}", value)
        for name, (test, expected) in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not isinstance(value, (int, float)) or not math.isfinite(value) or not test(value):
                raise _error(name, expected, value)
        for name, (other, values) in EFFECTIVE_WITH.items():
            if getattr(self, name) != _DEFAULTS[name] and getattr(self, other) not in values:
                raise ValueError(
                    f"llmkern.TrainingArguments: expected {name} beside {other} {' or '.join(values)} alone, got "
                    f"{name}={getattr(self, name)!r} beside {other} {getattr(self, other)}, where it has no effect"
                )

    def changes(self, other: "TrainingArguments") -> dict[str, tuple[Any, Any]]:
        """The settings that decide the parameters and differ: name -> (mine, the other's).

        How long to train, how often to save and what to log may change when a run is resumed.
        """
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return {n: p for n, p in pairs.items() if p[0] != p[1] and n not in RESUMABLE}


# A resumed run may change these; docs/language-model.md has the whole table.
RESUMABLE = (
    *("epochs", "max_steps", "max_seconds", "patience"),
    *("eval_every_steps", "save_every_steps", "keep", "log_every", "tensorboard"),
)
# Settings that matter only where another one has one of these values.
EFFECTIVE_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "momentum": ("optimizer", ("sgd", "rmsprop")),
    "rmsprop_alpha": ("optimizer", ("rmsprop",)),
    "lr_decay": ("lr_schedule", ("decay", "plateau")),
    "lr_decay_after": ("lr_schedule", ("decay",)),
    "warmup_steps": ("lr_schedule", ("cosine",)),
    "schedule_steps": ("lr_schedule", ("cosine",)),
}
_DEFAULTS = {field.name: field.default for field in fields(TrainingArguments)}

_CHOICES = {
    "optimizer": OPTIMIZERS,
    "lr_schedule": SCHEDULES,
    "loss_reduction": LOSS_REDUCTIONS,
    "precision": PRECISIONS,
}
_OPTIONAL = (
    *("batch_size", "max_steps", "max_seconds", "schedule_steps", "eval_batch_size", "patience"),
    *("max_grad_norm", "max_grad_value"),
)
_INTEGERS = {
    "batch_size": 1,
    "bptt": 1,
    "epochs": 1,
    "max_steps": 1,
    "lr_decay_after": 0,
    "warmup_steps": 0,
    "schedule_steps": 1,
    "seed": 0,
    "eval_batch_size": 1,
    "eval_every_steps": 0,
    "save_every_steps": 0,
    "keep": 1,
    "patience": 1,
    "log_every": 1,
}
_POSITIVE = (lambda value: value > 0, "a finite number > 0")
_NUMBERS = {
    "max_seconds": _POSITIVE,
    "learning_rate": _POSITIVE,
    "momentum": (lambda value: 0 <= value < 1, "a number in [0, 1)"),
    "weight_decay": (lambda value: value >= 0, "a finite number >= 0"),
    "rmsprop_alpha": (lambda value: 0 <= value < 1, "a number in [0, 1)"),
    "max_grad_norm": _POSITIVE,
    "max_grad_value": _POSITIVE,
    "lr_decay": (lambda value: 0 < value <= 1, "a number in (0, 1]"),
}


def _error(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"llmkern.TrainingArguments: expected {name} to be {expected}, got {got!r}")
