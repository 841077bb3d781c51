# SPDX-License-Identifier: Apache-2.0
"""From a trainer to the content of its checkpoint, and back."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from llmkern.models.building import shortened
from llmkern.models.pretrained import PretrainedMixin
from llmkern.text import Tokenizer
from llmkern.training import restoring
from llmkern.training.arguments import TrainingArguments
from llmkern.training.carried import packed, unpacked
from llmkern.training.checkpoints import (
    load_checkpoint,
    newest_checkpoint,
    random_state,
    reading,
    set_random_state,
    unusable,
)
from llmkern.training.optimization import make_optimizer
from llmkern.training.state import TrainingState
from llmkern.training.stepping import Stepper

# The parts of a checkpoint, and their types.
_PARTS: dict[str, type | tuple[type, ...]] = {
    "model_class": str,
    "model_config": (dict, type(None)),
    "tokenizer": (str, type(None)),
    "arguments": dict,
    "files": list,
    "data": dict,
    "source": (dict, type(None)),
    "state": dict,
    "model": dict,
    "optimizer": dict,
    "learning_rate": dict,
    "hidden": object,
    "random": dict,
}


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


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile was given, which has the same parameters under their own names; else the model."""
    found = getattr(model, "_orig_mod", model)
    assert isinstance(found, nn.Module)
    return found


def take(trainer: Run, files: frozenset[str]) -> dict[str, Any]:
    """Everything the next step depends on, what builds the same trainer again, and which files the run writes."""
    tokenizer = trainer.tokenizer
    model = uncompiled(trainer.model)
    return {
        "model_class": type(model).__name__,
        # Others' modules have configurations of any kind, and are built by those who know them.
        "model_config": model.config if isinstance(model, PretrainedMixin) else None,
        "tokenizer": None if tokenizer is None else tokenizer.to_json(),
        "arguments": asdict(trainer.arguments),
        "files": sorted(files),
        "data": trainer.data,
        "source": trainer.source,
        "state": trainer.state.to_dict(),
        "model": model.state_dict(),
        "optimizer": trainer.stepper.optimizer.state_dict(),
        "learning_rate": trainer.stepper.learning_rate.state_dict(),
        "hidden": packed(trainer.stepper.hidden),
        "random": random_state(),
    }


def read(folder: Path, device: Any = "cpu") -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint of a folder: its file, and its content, all parts of which are there.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, or is not a trainer's; names it.
    """
    path = newest_checkpoint(folder)
    content = load_checkpoint(path, device)
    for name, kind in _PARTS.items():
        if name not in content or not isinstance(content[name], kind):
            got = type(content[name]).__name__ if name in content else "none"
            raise unusable(path, f"expected its part {name} to be {_named(kind)}, got {got}")
    return path, content


def restore(trainer: Run, columns: int) -> None:
    """Puts a trainer where its newest checkpoint was taken.

    Args:
        trainer: the trainer.
        columns: of the lanes that its text is cut into.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it cannot be read, or belongs to another model, text or training; names it.
    """
    assert trainer.output_dir is not None
    path, content = read(trainer.output_dir, trainer.device)
    with reading(path, "its arguments are not those of a training"):
        arguments = TrainingArguments(**content["arguments"])
    _check_same_run(trainer, arguments, content["data"])
    model, stepper = uncompiled(trainer.model), trainer.stepper
    with reading(path, "it is of another model"):
        restoring.check_model(model.state_dict(), content["model"])
        model.load_state_dict(content["model"])
    with reading(path, "its optimizer is not this run's"):
        optimizer = restoring.checked_optimizer(
            stepper.optimizer,
            lambda parameters: make_optimizer(parameters, trainer.arguments),
            content["optimizer"],
            stepped=content["state"].get("step") != 0,
        )
        stepper.optimizer.load_state_dict(optimizer)
    with reading(path, "its learning rate is not this run's"):
        schedule = restoring.completed(
            stepper.learning_rate.state_dict(),
            content["learning_rate"],
            "learning_rate",
            lambda name: not name.startswith("_"),
        )
        stepper.learning_rate.load_state_dict(schedule)
    with reading(path, "its place in the text is none"):
        trainer.state = restoring.checked_state(content["state"], columns)
    with reading(path, "what it carries from step to step is not this model's"):
        stepper.hidden = unpacked(content["hidden"])
        _check_hidden(trainer)
    trainer.source = content["source"] if trainer.source is None else trainer.source
    with reading(path, "its random numbers are none"):
        set_random_state(content["random"])


def _named(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(k.__name__ for k in kinds)


def _check_hidden(trainer: Run) -> None:
    """Compares shapes where the model says how its state begins."""
    initial_state = getattr(trainer.model, "initial_state", None)
    if initial_state is not None and trainer.state.position > 0:
        mine = initial_state(trainer.arguments.batch_size)
        # Under autocast a state is of fewer bits than the parameters.
        restoring.check_alike(mine, trainer.stepper.hidden, "the state", dtypes=False)


def _check_same_run(trainer: Run, saved: TrainingArguments, data: dict[str, Any]) -> None:
    where = f"llmkern.Trainer: the checkpoint in {trainer.output_dir}"
    changes = trainer.arguments.changes(saved)
    if changes:
        listed = ", ".join(f"{name} {old!r}, got {new!r}" for name, (new, old) in changes.items())
        raise ValueError(f"{where} was trained with other settings: expected {listed}")
    for name in trainer.data | data:
        mine, theirs = trainer.data.get(name), data.get(name)
        if mine != theirs:
            raise ValueError(
                f"{where} is of another text: expected {shortened(name).strip(chr(39))} of {_described(theirs)}, "
                f"got {_described(mine)}"
            )


def _described(data: Any) -> str:
    if data is None:
        return "none at all"
    if not isinstance(data, dict) or not isinstance(data.get("sha256"), str):
        return shortened(data)
    return f"{data.get('length')} tokens with SHA-256 {data['sha256'][:12]}"
