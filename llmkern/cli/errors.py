# SPDX-License-Identifier: Apache-2.0
"""One line on standard error instead of a traceback, for every command alike.

Exit codes: 0 done; 1 it failed (disk full, out of memory, training diverged); 2 the command line or what it names is
wrong (an option, a path, a corrupt file); 130 interrupted.
"""

import sys
from contextlib import suppress
from typing import Any

import typer
from typer.core import TyperGroup

from llmkern.cli.terminal import PlainFlags
from llmkern.training.memory import bytes_asked_for, is_out_of_memory

_WRONG_PATH = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
_WRONG_INPUT = (ValueError, TypeError, IndexError, *_WRONG_PATH)
_FAILED = (OSError, MemoryError, FloatingPointError, ImportError, RuntimeError)
_INTERRUPTED = 130


# What to lower where a command runs out of memory outside the trainer, which says so itself.
_TO_LOWER = {
    "train": "--batch-size, --bptt, --hidden-size or --vocab-size",
    "evaluate": "--batch-size",
    "generate": "--num-return-sequences",
}


class CommandGroup(PlainFlags, TyperGroup):
    """The commands, with errors shown as one line."""

    _running = ""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        found = super().resolve_command(ctx, args)
        self._running = found[0] or ""
        return found

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except (KeyboardInterrupt, typer.Abort):
            code = _fail("interrupted", _INTERRUPTED)
        except _WRONG_INPUT as error:
            code = _fail(_message(error), 2)
        except _FAILED as error:
            code = _fail(self._failure(error), 1)
        except Exception as error:
            # The command-line parser's own errors; their class moved between versions of typer.
            if not hasattr(error, "format_message"):
                raise
            code = _usage_error(error)
        sys.exit(code if isinstance(code, int) else 0)

    def _failure(self, error: Exception) -> str:
        """The message, with what to lower where there was too little memory."""
        message = _message(error)
        if not is_out_of_memory(error) or (isinstance(error, MemoryError) and error.args):
            return message  # the trainer's own says it all
        count = bytes_asked_for(error)
        asked = f", {count} more were asked for" if count else ""
        lower = _TO_LOWER.get(self._running)
        return f"out of memory{asked}{f'; lower {lower}' if lower else ''}: {message}"


def _usage_error(error: Any) -> int:
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message)
        return 0
    context = getattr(error, "ctx", None)
    command = "llmkern" if context is None else context.command_path
    return _fail(f"{message.rstrip('.')}; see: {command} --help", int(error.exit_code))


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        return error.strerror
    return str(error) or type(error).__name__


def _fail(message: str, code: int) -> int:
    """Prints the message, whatever it holds, as one line."""
    with suppress(OSError):  # a terminal that has closed
        print(f"llmkern: error: {' '.join(message.split())}", file=sys.stderr)
    return code
