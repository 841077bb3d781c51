# SPDX-License-Identifier: Apache-2.0
"""Going on with a run: its checkpoint says how it was begun, and the command line may change a part of that.

docs/language-model.md has the table of what may change; RESUMABLE is its part of the training settings.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from llmkern.models import LanguageModel
from llmkern.models.building import build, shortened
from llmkern.text import Tokenizer
from llmkern.training import TrainingArguments, snapshots
from llmkern.training.arguments import RESUMABLE
from llmkern.training.checkpoints import reading

# Options whose name is not their setting's, for True and for False.
_FLAGS = {
    "tie_weights": ("--tied", "--untied"),
    "lowercase": ("--lowercase", "--no-lowercase"),
    "unk": ("--unk", "--no-unk"),
    "tensorboard": ("--tensorboard", "--no-tensorboard"),
}
# What the tokenizer's options are where a run was begun without them.
_TOKENIZER_DEFAULTS = {"min_frequency": 1, "lowercase": False, "unk": False}


class Resumed(NamedTuple):
    """A run to go on with."""

    model: LanguageModel
    tokenizer: Tokenizer
    arguments: TrainingArguments
    source: dict[str, Any]


def resumed(
    folder: Path, tokenizer: dict[str, Any], model: dict[str, Any], training: dict[str, Any]
) -> Resumed:
    """The run in a folder, with what the command line says over its settings.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint is corrupt, or the command line asks for what would be another run.
    """
    path, content = snapshots.read(folder)
    config = content["model_config"]
    if (
        content["model_class"] != LanguageModel.__name__
        or config is None
        or content["tokenizer"] is None
    ):
        raise ValueError(
            f"--resume: expected a run of llmkern train in {folder}, got one of a {shortened(content['model_class'])}"
        )
    with reading(path, "its tokenizer cannot be read"):
        run_tokenizer = Tokenizer.from_json(content["tokenizer"])
    with reading(path, "its arguments are not those of a training"):
        saved = TrainingArguments(**content["arguments"])
    model_there = build(
        LanguageModel,
        config,
        content["model"],
        described_by=f"--resume: {path}",
        stored_in=f"--resume: {path}",
    )
    source = content["source"] or {}
    with reading(path, "its source is not that of a text"):
        options = _TOKENIZER_DEFAULTS | source.get("tokenizer", {}) | {"kind": run_tokenizer.kind}
    for name, value in tokenizer.items():
        check_same(name, value, options.get(name))
    for name, value in model.items():
        check_same(name, value, model_there.config[name])
    for name, value in training.items():
        if name not in RESUMABLE:
            check_same(name, value, getattr(saved, name))
    arguments = dataclasses.replace(saved, **training)
    return Resumed(model_there, run_tokenizer, arguments, source)


def check_same(name: str, asked: Any, saved: Any) -> None:
    """Refuses a setting that is not the run's own.

    Raises:
        ValueError: it is not; names the option as the command line knows it.
    """
    if asked != saved:
        raise ValueError(
            f"--resume: expected {_option(name, saved)} as in the run's checkpoint, got {_option(name, asked)}"
        )


def _option(name: str, value: Any) -> str:
    if name in _FLAGS:
        return _FLAGS[name][not value]
    option = "--tokenizer" if name == "kind" else "--" + name.replace("_", "-")
    return f"no {option}" if value is None else f"{option} {value}"
