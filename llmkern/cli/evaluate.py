# SPDX-License-Identifier: Apache-2.0
"""llmkern evaluate: how well a model predicts a text."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from llmkern.cli.corpus import checked_device, encode, text_to_evaluate
from llmkern.models import LanguageModel
from llmkern.training import EvaluationResult
from llmkern.training import evaluate as evaluate_model


def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a trained model.")],
    path: Annotated[Path, typer.Argument(help="A text file, or a folder with splits.")],
    split: Annotated[
        str | None,
        typer.Option(
            help="Which split; default: a whole file, a folder's test text, else its validation text.",
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

    Example: llmkern evaluate run ptb/ --split test --batch-size 1
    """
    model = LanguageModel.from_pretrained(run, checked_device(device))
    if model.tokenizer is None:
        raise ValueError(f"expected a tokenizer.json in {run}, found none")
    text, name = text_to_evaluate(path, split)
    encoded = encode(model.tokenizer, text)
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
