# SPDX-License-Identifier: Apache-2.0
"""From a trainer to the content of its checkpoint, and back."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from llmkern.text import Tokenizer
from llmkern.training.arguments import TrainingArguments
from llmkern.training.checkpoints import load_checkpoint, random_state, set_random_state
from llmkern.training.state import TrainingState
from llmkern.training.stepping import Stepper


class Run(Protocol):
    """What a snapshot reads and restores: a trainer."""

    model: nn.Module
    arguments: TrainingArguments
    tokenizer: Tokenizer | None
    output_dir: Path | None
    device: torch.device
    data: dict[str, Any]
    source: dict[str, Any] | None
    state: TrainingState
    stepper: Stepper


def take(trainer: Run) -> dict[str, Any]:
    """Everything the next step depends on, and what builds the same trainer again."""
    tokenizer = trainer.tokenizer
    return {
        "model_class": type(trainer.model).__name__,
        "model_config": getattr(trainer.model, "config", None),
        "tokenizer": None if tokenizer is None else tokenizer.to_json(),
        "arguments": asdict(trainer.arguments),
        "data": trainer.data,
        "source": trainer.source,
        "state": trainer.state.to_dict(),
        "model": trainer.model.state_dict(),
        "optimizer": trainer.stepper.optimizer.state_dict(),
        "learning_rate": trainer.stepper.learning_rate.state_dict(),
        "hidden": trainer.stepper.hidden,
        "random": random_state(),
    }


def restore(trainer: Run) -> None:
    """Puts a trainer where its newest checkpoint was taken.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it cannot be read, or belongs to another model, text or training.
    """
    assert trainer.output_dir is not None
    content = load_checkpoint(trainer.output_dir, trainer.device)
    _check_same_run(trainer, content)
    try:
        trainer.model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise ValueError(
            f"llmkern.Trainer: the checkpoint in {trainer.output_dir} is of another model: {error}"
        ) from error
    trainer.stepper.optimizer.load_state_dict(content["optimizer"])
    trainer.stepper.learning_rate.load_state_dict(content["learning_rate"])
    trainer.stepper.hidden = content["hidden"]
    trainer.state = TrainingState(**content["state"])
    trainer.source = content["source"] if trainer.source is None else trainer.source
    set_random_state(content["random"])


def _check_same_run(trainer: Run, content: dict[str, Any]) -> None:
    where = f"llmkern.Trainer: the checkpoint in {trainer.output_dir}"
    changes = trainer.arguments.changes(TrainingArguments(**content["arguments"]))
    if changes:
        listed = ", ".join(f"{name} {old!r}, got {new!r}" for name, (new, old) in changes.items())
        raise ValueError(f"{where} was trained with other settings: expected {listed}")
    for name in trainer.data | content["data"]:
        mine, saved = trainer.data.get(name), content["data"].get(name)
        if mine != saved:
            raise ValueError(
                f"{where} is of another text: expected {name} of {_described(saved)}, got {_described(mine)}"
            )


def _described(data: dict[str, Any] | None) -> str:
    if data is None:
        return "none at all"
    return f"{data['length']} tokens with SHA-256 {data['sha256'][:12]}"
