# SPDX-License-Identifier: Apache-2.0
"""The ``llmkern`` command: one file a subcommand, registered here.

To add one, write llmkern/cli/<name>.py with a function <name> and add the module to COMMANDS.
"""

from collections.abc import Callable

try:
    import typer
except ImportError as error:
    raise SystemExit(
        f"llmkern: the command line needs the package typer ({error}); run: pip install 'llmkern[text]'"
    ) from error

from llmkern.cli import bench, check, evaluate, generate, info, train
from llmkern.cli.errors import CommandGroup

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
    help="Train recurrent language models on your own text, and let them write.",
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main() -> None:
    """Runs the command with the arguments of the process."""
    app(prog_name="llmkern")


__all__ = ["app", "main"]
