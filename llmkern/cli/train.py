# SPDX-License-Identifier: Apache-2.0
"""llmkern train: a text in, a run folder with a trained model out."""

import secrets
import shlex
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from llmkern.cli.corpus import Encoded, checked_device, encode, train_tokenizer
from llmkern.cli.data_record import data_record
from llmkern.cli.presets import PRESETS
from llmkern.cli.resuming import check_same, resumed
from llmkern.models import LanguageModel
from llmkern.text import Splits, Tokenizer, corpus_files, language_modeling_splits
from llmkern.text.backends import KINDS
from llmkern.training import Trainer, TrainingArguments, TrainingResult, evaluate, perplexity
from llmkern.training.arguments import (
    EFFECTIVE_WITH,
    LOSS_REDUCTIONS,
    OPTIMIZERS,
    PRECISIONS,
    SCHEDULES,
)
from llmkern.training.run_folder import check_folder
from llmkern.training.texts import checked_lanes, default_eval_batch_size

_TOKENIZER_OPTIONS = ("vocab_size", "min_frequency", "lowercase", "unk")
_MODEL_OPTIONS = (
    *("embedding_dim", "hidden_size", "num_layers", "dropout", "tie_weights", "init_range"),
)
_TRAINING_OPTIONS = tuple(field.name for field in fields(TrainingArguments))
_ZERO_IS_OFF = ("max_grad_norm", "max_grad_value", "max_steps", "max_seconds", "patience")
_VALID_FRACTION = 0.1


def _option(panel: str, text: str, *names: str, choices: Iterable[str] = ()) -> Any:
    metavar = "|".join(choices) or None
    return typer.Option(
        *names, help=text, metavar=metavar, rich_help_panel=panel, show_default=False
    )


def train(
    path: Annotated[
        list[Path],
        typer.Argument(
            help="A text file, a folder of them, or several; files called *train*, *valid* and *test* are the splits."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The run's folder; made if need be.")],
    preset: Annotated[
        str | None,
        typer.Option(
            help="Settings to start from; options go over them.", metavar="|".join(PRESETS)
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --output.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --output.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1, auto.")] = "auto",
    valid_fraction: Annotated[
        float | None,
        typer.Option(
            help="The end of the text that is held out where no file is called *valid*; 0: none; default: 0.1.",
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    tokenizer: Annotated[
        str | None, _option("Tokenizer", "What a token is; default: char.", choices=KINDS)
    ] = None,
    vocab_size: Annotated[int | None, _option("Tokenizer", "At most so many tokens.")] = None,
    min_frequency: Annotated[
        int | None, _option("Tokenizer", "Leave out tokens rarer than this; default: 1.")
    ] = None,
    lowercase: Annotated[bool | None, _option("Tokenizer", "Lower-case the text.")] = None,
    unk: Annotated[
        bool | None,
        _option(
            "Tokenizer", "Have a token for characters that only other texts hold.", "--unk/--no-unk"
        ),
    ] = None,
    embedding_dim: Annotated[
        int | None, _option("Model", "Width of the embedding; default: 256.")
    ] = None,
    hidden_size: Annotated[int | None, _option("Model", "Width of the LSTM; default: 512.")] = None,
    num_layers: Annotated[int | None, _option("Model", "Layers of the LSTM; default: 1.")] = None,
    dropout: Annotated[
        float | None, _option("Model", "Dropout between the layers; default: 0.")
    ] = None,
    tie_weights: Annotated[
        bool | None,
        _option("Model", "Share the embedding with the softmax.", "--tied/--untied"),
    ] = None,
    init_range: Annotated[
        float | None, _option("Model", "Draw parameters from U(-this, this); default: 0.1.")
    ] = None,
    epochs: Annotated[int | None, _option("Training", "Passes over the text; default: 10.")] = None,
    max_steps: Annotated[
        int | None, _option("Training", "Stop after so many steps in all; 0 is off.")
    ] = None,
    max_seconds: Annotated[
        float | None, _option("Training", "Stop each call after so long; 0 is off.")
    ] = None,
    batch_size: Annotated[
        int | None,
        _option("Training", "Lanes read side by side; default: 32, fewer for a short text."),
    ] = None,
    bptt: Annotated[
        int | None, _option("Training", "Steps the gradient reaches back; default: 35.")
    ] = None,
    optimizer: Annotated[
        str | None, _option("Training", "Default: adam.", choices=OPTIMIZERS)
    ] = None,
    learning_rate: Annotated[float | None, _option("Training", "Default: 0.002.")] = None,
    momentum: Annotated[
        float | None, _option("Training", "Of sgd and rmsprop; default: 0.")
    ] = None,
    weight_decay: Annotated[float | None, _option("Training", "Default: 0.")] = None,
    rmsprop_alpha: Annotated[float | None, _option("Training", "Smoothing; default: 0.99.")] = None,
    max_grad_norm: Annotated[
        float | None, _option("Training", "Cut the gradient's norm to this; 0 is off; default: 1.")
    ] = None,
    max_grad_value: Annotated[
        float | None,
        _option("Training", "Cut each gradient to [-this, this]; 0 is off; default: off."),
    ] = None,
    lr_schedule: Annotated[
        str | None, _option("Training", "Default: constant.", choices=SCHEDULES)
    ] = None,
    lr_decay: Annotated[
        float | None, _option("Training", "Factor of decay and plateau; default: 0.25.")
    ] = None,
    lr_decay_after: Annotated[
        int | None, _option("Training", "Epochs before decay sets in; default: 1.")
    ] = None,
    warmup_steps: Annotated[int | None, _option("Training", "Of cosine; default: 0.")] = None,
    schedule_steps: Annotated[
        int | None, _option("Training", "Where cosine ends; default: at the last step.")
    ] = None,
    loss_reduction: Annotated[
        str | None,
        _option("Training", "sum_time is Zaremba's loss; default: mean.", choices=LOSS_REDUCTIONS),
    ] = None,
    precision: Annotated[
        str | None,
        _option("Training", "bf16 needs CUDA; default: float32.", choices=PRECISIONS),
    ] = None,
    patience: Annotated[
        int | None, _option("Training", "Stop after so many epochs without gain; 0 is off.")
    ] = None,
    seed: Annotated[
        int | None,
        _option("Training", "Of parameters and dropout; default: drawn, printed and saved."),
    ] = None,
    eval_batch_size: Annotated[
        int | None,
        _option("Run", "Lanes in validation; default: the batch size, fewer for a short text."),
    ] = None,
    eval_every_steps: Annotated[
        int | None,
        _option("Run", "Steps between validations; 0: after each epoch; default: 0."),
    ] = None,
    save_every_steps: Annotated[
        int | None, _option("Run", "Steps between checkpoints; 0: after each epoch; default: 1000.")
    ] = None,
    keep: Annotated[int | None, _option("Run", "Checkpoints that stay; default: 1.")] = None,
    log_every: Annotated[
        int | None, _option("Run", "Steps between lines of the log; default: 100.")
    ] = None,
    tensorboard: Annotated[
        bool | None, _option("Run", "Write TensorBoard files; default: yes.")
    ] = None,
) -> None:
    """Train a language model on a text.

    Leaves in --output the model with the best validation loss (config.json,
    model.safetensors, tokenizer.json), the last checkpoint, log.jsonl, and
    tb/ for TensorBoard. Ctrl-C saves and stops; --resume goes on from there.

    Example: llmkern train poems.txt --output run --hidden-size 256 --epochs 20

    Example: llmkern train ptb/ --output run --preset zaremba-small
    """
    given = {name: value for name, value in locals().items() if value is not None}
    torch_device = checked_device(device)
    if overwrite and resume:
        raise ValueError("expected --resume or --overwrite, got both")
    options = _options(given)
    check_folder(output, resume=resume, overwrite=overwrite)
    saved = resumed(output, *options) if resume else None
    fraction = _valid_fraction(valid_fraction, path, None if saved is None else saved.source)
    splits = language_modeling_splits(*path, valid_fraction=fraction)
    if saved is None:
        model, run_tokenizer, arguments = _new(splits, *options, show=not quiet)
        source = data_record(path, splits, fraction, options.tokenizer)
    else:
        model, run_tokenizer, arguments, source = saved
        source = data_record(path, splits, fraction, source.get("tokenizer", {}))
    texts = {
        name: encode(run_tokenizer, text, f"the {name} text", show=not quiet)
        for name, text in splits._asdict().items()
        if text
    }
    del splits  # as large as the ids
    trainer = Trainer(
        model.to(torch_device),
        arguments,
        texts["train"].ids,
        texts["valid"].ids if "valid" in texts else None,
        output_dir=output,
        tokenizer=run_tokenizer,
        source=source,
        show_progress=not quiet,
    )
    test_lanes = _test_lanes(trainer, texts)
    if not quiet:
        _describe(model, run_tokenizer, texts, trainer.arguments)
    result = trainer.train(resume=resume, overwrite=overwrite)
    _report(result, trainer.arguments, output)
    again = _line_to_go_on(result, trainer.arguments, path, output, given)
    if again is not None:
        print(f"to go on: {again}")
    if result.stop_reason == "interrupted":
        raise typer.Exit(130)
    if "test" in texts:
        best = LanguageModel.from_pretrained(output, torch_device)
        test = evaluate(best, texts["test"].ids, batch_size=test_lanes, accuracy=False)
        print(f"test loss {test.loss:.4f}, perplexity {test.perplexity:.2f}")


class _Options(NamedTuple):
    """What the command line says about tokenizer, model and training."""

    tokenizer: dict[str, Any]
    model: dict[str, Any]
    training: dict[str, Any]


def _options(given: dict[str, Any]) -> _Options:
    """What the command line says, over what its preset says."""
    preset = given.get("preset")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"--preset: expected one of {', '.join(PRESETS)}, got {preset}")
    base = None if preset is None else PRESETS[preset]
    parts: list[dict[str, Any]] = []
    for kind, names in (
        ("tokenizer", _TOKENIZER_OPTIONS),
        ("model", _MODEL_OPTIONS),
        ("training", _TRAINING_OPTIONS),
    ):
        said = {name: given[name] for name in names if name in given}
        parts.append((getattr(base, kind) if base else {}) | said)
    options = _Options(*parts)
    if "tokenizer" in given:
        options.tokenizer["kind"] = given["tokenizer"]
    for name in _ZERO_IS_OFF:
        if options.training.get(name) == 0:
            options.training[name] = None
    # What a preset says about a schedule or an optimizer goes with it; what the user says is checked.
    for name, (other, values) in EFFECTIVE_WITH.items():
        if name not in given and options.training.get(other, values[0]) not in values:
            options.training.pop(name, None)
    return options


def _valid_fraction(asked: float | None, paths: list[Path], source: dict[str, Any] | None) -> float:
    """The share of the text to hold out: what is asked for, else the resumed run's own, else a tenth."""
    if asked is not None and (files := corpus_files(*paths).valid):
        raise ValueError(
            f"--valid-fraction: expected it left out where {files[0]} is the validation text, got {asked}"
        )
    saved = None if source is None else source.get("valid_fraction")
    if asked is not None and saved is not None:
        check_same("valid_fraction", asked, saved)
    return next(value for value in (asked, saved, _VALID_FRACTION) if value is not None)


def _test_lanes(trainer: Trainer, texts: dict[str, Encoded]) -> int:
    """The lanes that the test text is cut into; that it can be scored is known before training."""
    if "test" not in texts:
        return 0
    ids = texts["test"].ids
    lanes = default_eval_batch_size(len(ids), trainer.arguments.bptt, trainer.eval_batch_size)
    checked_lanes("test_ids", ids, "eval_batch_size", lanes, trainer.model)
    return lanes


def _new(
    splits: Splits,
    tokenizer: dict[str, Any],
    model: dict[str, Any],
    training: dict[str, Any],
    *,
    show: bool,
) -> tuple[LanguageModel, Tokenizer, TrainingArguments]:
    arguments = TrainingArguments(**({"seed": secrets.randbelow(2**31)} | training))
    run_tokenizer = train_tokenizer(splits, show=show, **({"kind": "char"} | tokenizer))
    torch.manual_seed(arguments.seed)
    return LanguageModel(run_tokenizer.vocab_size, **model), run_tokenizer, arguments


def _describe(
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: dict[str, Encoded],
    arguments: TrainingArguments,
) -> None:
    sizes = ", ".join(f"{name} {len(text.ids):,}" for name, text in texts.items())
    print(
        f"tokens: {sizes}; vocabulary {tokenizer.vocab_size:,} ({tokenizer.kind}); "
        f"parameters {model.num_parameters:,}; batch size {arguments.batch_size}; seed {arguments.seed}",
        file=sys.stderr,
    )


def _report(result: TrainingResult, arguments: TrainingArguments, output: Path) -> None:
    print(
        f"stopped by {result.stop_reason} after step {result.step}, epoch {result.epoch}; "
        f"seed {arguments.seed}"
    )
    if result.best_loss is not None:
        print(
            f"valid loss {result.best_loss:.4f}, perplexity {perplexity(result.best_loss):.2f} "
            f"of the model of step {result.best_step}, the best"
        )
    print(f"model in {output}; try: {shlex.join(['llmkern', 'generate', str(output)])}")


def _line_to_go_on(
    result: TrainingResult,
    arguments: TrainingArguments,
    paths: list[Path],
    output: Path,
    given: dict[str, Any],
) -> str | None:
    """The command that goes on with the run that has stopped; None where there is nothing left to do.

    The run's settings are in its checkpoint: the line holds what is not.
    """
    if result.stop_reason in ("epochs", "patience"):
        return None
    line = ["llmkern", "train", *map(str, paths), "--output", str(output), "--resume"]
    if given["device"] != "auto":
        line += ["--device", given["device"]]
    if result.stop_reason == "max_steps":
        further = 2 * result.step
        if arguments.schedule_steps is not None:
            further = min(further, arguments.schedule_steps)
        if further == result.step:
            return None  # the cosine has ended: its learning rate is 0 from here on
        line += ["--max-steps", str(further)]
    return shlex.join(line)
