# SPDX-License-Identifier: Apache-2.0
"""llmkern train: a text in, a run folder with a trained model out."""

import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from llmkern.cli.corpus import Encoded, checked_device, encode, train_tokenizer
from llmkern.cli.presets import PRESETS
from llmkern.cli.run_folder import resumed
from llmkern.models import LanguageModel
from llmkern.text import Splits, Tokenizer, language_modeling_splits
from llmkern.text.backends import KINDS
from llmkern.training import Trainer, TrainingArguments, TrainingResult, evaluate, perplexity
from llmkern.training.arguments import LOSS_REDUCTIONS, OPTIMIZERS, PRECISIONS, SCHEDULES
from llmkern.training.run_folder import check_folder

_TOKENIZER_OPTIONS = ("vocab_size", "min_frequency", "lowercase")
_MODEL_OPTIONS = (
    *("embedding_dim", "hidden_size", "num_layers", "dropout", "tie_weights", "init_range"),
)
_TRAINING_OPTIONS = tuple(field.name for field in fields(TrainingArguments))


def _option(panel: str, text: str, *names: str, choices: Iterable[str] = ()) -> Any:
    metavar = "|".join(choices) or None
    return typer.Option(
        *names, help=text, metavar=metavar, rich_help_panel=panel, show_default=False
    )


def train(
    path: Annotated[
        Path,
        typer.Argument(help="A text file, or a folder with *train*, *valid* and *test* files."),
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
        float,
        typer.Option(help="The end of a single file that is held out for validation; 0: none."),
    ] = 0.1,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    tokenizer: Annotated[
        str | None, _option("Tokenizer", "What a token is; default: char.", choices=KINDS)
    ] = None,
    vocab_size: Annotated[int | None, _option("Tokenizer", "At most so many tokens.")] = None,
    min_frequency: Annotated[
        int | None, _option("Tokenizer", "Leave out tokens rarer than this; default: 1.")
    ] = None,
    lowercase: Annotated[bool | None, _option("Tokenizer", "Lower-case the text.")] = None,
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
    max_steps: Annotated[int | None, _option("Training", "Stop after so many steps.")] = None,
    max_seconds: Annotated[float | None, _option("Training", "Stop after so long.")] = None,
    batch_size: Annotated[
        int | None, _option("Training", "Lanes read side by side; default: 32.")
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
        int | None, _option("Training", "Epochs before decay sets in; default: 0.")
    ] = None,
    warmup_steps: Annotated[int | None, _option("Training", "Of cosine; default: 0.")] = None,
    loss_reduction: Annotated[
        str | None,
        _option("Training", "sum_time is Zaremba's loss; default: mean.", choices=LOSS_REDUCTIONS),
    ] = None,
    precision: Annotated[
        str | None,
        _option("Training", "bf16 needs CUDA; default: float32.", choices=PRECISIONS),
    ] = None,
    patience: Annotated[
        int | None, _option("Training", "Stop after so many epochs without gain.")
    ] = None,
    seed: Annotated[
        int | None, _option("Training", "Of parameters and dropout; default: 0.")
    ] = None,
    eval_batch_size: Annotated[
        int | None, _option("Run", "Lanes in validation; default: the batch size.")
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
    splits = language_modeling_splits(path, valid_fraction=valid_fraction)
    if resume:
        model, words, arguments = resumed(output, *options)
    else:
        model, words, arguments = _new(splits, *options)
    texts = {name: encode(words, text) for name, text in splits._asdict().items() if text}
    if not quiet:
        _describe(model, words, texts)
    trainer = Trainer(
        model.to(torch_device),
        arguments,
        texts["train"].ids,
        texts["valid"].ids if "valid" in texts else None,
        output_dir=output,
        tokenizer=words,
        show_progress=not quiet,
    )
    result = trainer.train(resume=resume, overwrite=overwrite)
    _report(result, output, path)
    if result.stop_reason == "interrupted":
        raise typer.Exit(130)
    if "test" in texts:
        best = LanguageModel.from_pretrained(output, torch_device)
        test = evaluate(best, texts["test"].ids, batch_size=trainer.eval_batch_size, accuracy=False)
        print(f"test loss {test.loss:.4f}, perplexity {test.perplexity:.2f}")


def _options(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What the command line says about tokenizer, model and training, over what its preset says."""
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
    tokenizer, model, training = parts
    if "tokenizer" in given:
        tokenizer["kind"] = given["tokenizer"]
    for name in ("max_grad_norm", "max_grad_value"):
        if training.get(name) == 0:
            training[name] = None
    return tokenizer, model, training


def _new(
    splits: Splits, tokenizer: dict[str, Any], model: dict[str, Any], training: dict[str, Any]
) -> tuple[LanguageModel, Tokenizer, TrainingArguments]:
    arguments = TrainingArguments(**training)
    words = train_tokenizer(splits, **({"kind": "char"} | tokenizer))
    torch.manual_seed(arguments.seed)
    return LanguageModel(words.vocab_size, **model), words, arguments


def _describe(model: LanguageModel, tokenizer: Tokenizer, texts: dict[str, Encoded]) -> None:
    sizes = ", ".join(f"{name} {len(text.ids):,}" for name, text in texts.items())
    print(
        f"tokens: {sizes}; vocabulary {tokenizer.vocab_size:,} ({tokenizer.kind}); "
        f"parameters {model.num_parameters:,}",
        file=sys.stderr,
    )


def _report(result: TrainingResult, output: Path, path: Path) -> None:
    loss = result.valid_loss if result.best_loss is None else result.best_loss
    print(f"stopped by {result.stop_reason} after step {result.step}, epoch {result.epoch}")
    if loss is not None:
        print(f"valid loss {loss:.4f}, perplexity {perplexity(loss):.2f}")
    print(f"model in {output}; try: llmkern generate {output}")
    if result.stop_reason != "epochs":
        print(f"to go on: llmkern train {path} --output {output} --resume")
