# SPDX-License-Identifier: Apache-2.0
"""One line on standard error instead of a traceback, for every command alike.

Exit codes: 0 done; 1 it failed (disk full, out of memory, training diverged); 2 the command line or what it names is
wrong (an option, a path, a corrupt file); 130 interrupted.
"""

import sys
from typing import Any

import typer
from typer.core import TyperGroup

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


class CommandGroup(TyperGroup):
    """The commands, with errors shown as one line."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except (KeyboardInterrupt, typer.Abort):
            code = _fail("interrupted", _INTERRUPTED)
        except _WRONG_INPUT as error:
            code = _fail(_message(error), 2)
        except _FAILED as error:
            code = _fail(_message(error), 1)
        except Exception as error:
            # The command-line parser's own errors; their class moved between versions of typer.
            if not hasattr(error, "format_message"):
                raise
            code = _usage_error(error)
        sys.exit(code if isinstance(code, int) else 0)


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
    print(f"llmkern: error: {' '.join(message.split())}", file=sys.stderr)
    return code
