# SPDX-License-Identifier: Apache-2.0
"""The ``llmkern`` command: one file a subcommand, registered here.

To add one, write llmkern/cli/<name>.py with a function <name> and add the module to COMMANDS.
"""

from collections.abc import Callable
from typing import Annotated

try:
    import typer
except ImportError as error:
    raise SystemExit(
        f"llmkern: the command line needs the package typer ({error}); run: pip install 'llmkern[text]'"
    ) from error

import llmkern
from llmkern.cli import bench, check, evaluate, generate, info, train
from llmkern.cli.errors import CommandGroup
from llmkern.cli.terminal import Command, replace_what_cannot_be_shown

COMMANDS: dict[str, Callable[..., None]] = {
    "train": train.train,
    "evaluate": evaluate.evaluate,
    "generate": generate.generate,
    "info": info.info,
    "check": check.check,
    "bench": bench.bench,
}

app = typer.Typer(
    name="llmkern",
    cls=CommandGroup,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in COMMANDS.items():
    app.command(_name, cls=Command)(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"llmkern {llmkern.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Train recurrent language models on your own text, and let them write."""


def main() -> None:
    """Runs the command with the arguments of the process."""
    replace_what_cannot_be_shown()
    app(prog_name="llmkern")


__all__ = ["app", "main"]
