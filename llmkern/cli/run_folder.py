# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: is it free, what was in it, and how to go on from it."""

import dataclasses
from pathlib import Path
from typing import Any

from llmkern.models import LanguageModel
from llmkern.text import Tokenizer
from llmkern.training import TrainingArguments, list_checkpoints, load_checkpoint


def resumed(
    folder: Path, tokenizer: dict[str, Any], model: dict[str, Any], training: dict[str, Any]
) -> tuple[LanguageModel, Tokenizer, TrainingArguments]:
    """The model (its parameters still to be loaded), tokenizer and settings of the run in a folder.

    What the command line says goes over the settings; what would make it another run is refused. The limits of
    one call, max_steps and max_seconds, hold for that call alone.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint is corrupt, or the command line asks for another model or tokenizer.
    """
    if not list_checkpoints(folder):
        raise FileNotFoundError(f"--resume: expected a checkpoint in {folder}, found none")
    content = load_checkpoint(folder)
    if content["model_class"] != LanguageModel.__name__ or content["tokenizer"] is None:
        raise ValueError(
            f"--resume: expected a run of llmkern train in {folder}, got one of a {content['model_class']}"
        )
    words = Tokenizer.from_json(content["tokenizer"])
    _check_same("tokenizer", tokenizer.get("kind", words.kind), words.kind)
    for name, value in model.items():
        _check_same(name, value, content["model_config"][name])
    saved = TrainingArguments(**content["arguments"])
    limits: dict[str, Any] = {"max_steps": None, "max_seconds": None}
    arguments = dataclasses.replace(saved, **(limits | training))
    return LanguageModel(**content["model_config"]), words, arguments


def _check_same(name: str, asked: Any, saved: Any) -> None:
    if asked != saved:
        option = "--" + name.replace("_", "-")
        raise ValueError(
            f"--resume: expected {option} {saved} as in the run's checkpoint, got {asked}"
        )
