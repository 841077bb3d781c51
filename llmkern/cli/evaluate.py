# SPDX-License-Identifier: Apache-2.0
"""llmkern evaluate: how well a model predicts a text."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from llmkern.cli.corpus import checked_device, encode, text_to_evaluate
from llmkern.cli.data_record import (
    has_changed,
    is_trained_file,
    read_data_record,
    trained_share,
)
from llmkern.models import LanguageModel
from llmkern.text import corpus_files
from llmkern.training import EvaluationResult
from llmkern.training import evaluate as evaluate_model

# Of a run that does not say what it held out: what llmkern train does by itself.
_GUESSED_FRACTION = 0.1


def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a trained model.")],
    path: Annotated[
        list[Path] | None,
        typer.Argument(
            help="A text file or a folder, or several; default: what the run was given.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Which split, cut as the run's own; default: a whole file that is named, else the test text, "
            "else the validation text.",
            metavar="train|valid|test",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Lanes the text is cut into; 1 is exact and slow.")
    ] = 10,
    device: Annotated[
        str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, auto.")
    ] = "auto",
) -> None:
    """Print loss, perplexity, bits per character and accuracy of a model on a text.

    Says so where the model was trained on that text.

    Example: llmkern evaluate run ptb/ --split test --batch-size 1

    Example: llmkern evaluate run --split valid
    """
    model = LanguageModel.from_pretrained(run, checked_device(device))
    if model.tokenizer is None:
        raise ValueError(f"expected a tokenizer.json in {run}, found none")
    text, name, doubt = _chosen_text(run, path or [], split)
    encoded = encode(model.tokenizer, text, name, show=True)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("evaluating", total=None)
        result = evaluate_model(
            model,
            encoded.ids,
            batch_size=batch_size,
            characters_per_token=encoded.characters_per_token,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    Console().print(_table(result, name))
    if doubt:
        print(f"llmkern: {doubt}", file=sys.stderr)


def _chosen_text(run: Path, paths: list[Path], split: str | None) -> tuple[str, str, str]:
    """The text to score, its name, and what speaks against its score, if anything does."""
    record = read_data_record(run)
    if record is None:
        if not paths:
            raise ValueError(
                f"expected a text to score: {run} does not say what it was trained on, got none"
            )
        text, name = text_to_evaluate(paths, split, _GUESSED_FRACTION)
        guessed = split is not None and not corpus_files(*paths).valid
        doubt = f"{run} does not say how its text was split; valid is taken to be the last tenth"
        return text, name, doubt if guessed else ""
    if not paths:
        paths = [Path(path) for path in record["paths"]]
        split = split or next(s for s in ("test", "valid", "train") if s in record["texts"])
    text, name = text_to_evaluate(paths, split, record["valid_fraction"])
    return text, name, _doubt(record, paths, split, text, name)


def _doubt(
    record: dict[str, Any], paths: list[Path], split: str | None, text: str, name: str
) -> str:
    """Whether the model may have been trained on a text, in a sentence; empty if not."""
    share = trained_share(record, text)
    if share == 1:
        return f"{name} is what the model was trained on: this is no measure of other texts"
    if share:
        return f"the first {share:.0%} of {name} is what the model was trained on; --split valid scores the rest"
    if split is None:
        if len(paths) == 1 and paths[0].is_file() and is_trained_file(record, paths[0]):
            return f"{name} is one of the files that the model was trained on"
        return ""
    are_the_runs = [str(path.absolute()) for path in paths] == record["paths"]
    if are_the_runs and has_changed(record, split, text):
        return f"{name} has changed since the run: a part of it may have been trained on"
    return ""


def _table(result: EvaluationResult, name: str) -> Table:
    table = Table(title=name)
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_row("tokens", f"{result.tokens:,}")
    table.add_row("loss (nats)", f"{result.loss:.4f}")
    table.add_row("perplexity", f"{result.perplexity:.2f}")
    table.add_row("bits per character", f"{result.bits_per_character:.4f}")
    table.add_row("top-1 accuracy", f"{result.top1_accuracy:.2%}")
    table.add_row("top-5 accuracy", f"{result.top5_accuracy:.2%}")
    return table
