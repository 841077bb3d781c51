# SPDX-License-Identifier: Apache-2.0
"""The command and the terminal it runs in: what help calls a flag, and texts that the locale's encoding cannot hold."""

import os
import sys
from typing import Any

from typer.core import TyperCommand, TyperOption


class PlainFlags:
    """For commands whose help shows flags as flags: ``--resume``, not ``--resume <bool>``."""

    def get_params(self, ctx: Any) -> Any:
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if isinstance(param, TyperOption) and param.is_flag:
                param.metavar = ""
        return params


class Command(PlainFlags, TyperCommand):
    """A command of llmkern."""


def replace_what_cannot_be_shown() -> None:
    """A character that the encoding of standard output lacks is shown as "?", and is no error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not so where a program captures the output
            stream.reconfigure(errors="replace")


def as_text(argument: str) -> str:
    """A text from the command line, read as UTF-8 where the locale (C, say) could not decode it.

    Not for paths: those must stay the bytes that the file system knows.
    """
    if argument.isprintable() or not any("\udc80" <= c <= "\udcff" for c in argument):
        return argument
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError as error:
        raise ValueError(
            f"expected an argument in UTF-8 or in the locale's encoding, got {argument!r}"
        ) from error
