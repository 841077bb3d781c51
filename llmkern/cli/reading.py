# SPDX-License-Identifier: Apache-2.0
"""How much of a text is read: a bar in a terminal, elsewhere a line after a second and then every ten."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

_FIRST_LINE, _NEXT_LINE = 1.0, 10.0  # seconds


@contextmanager
def reading(what: str, characters: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """Shows the progress of what is done inside.

    Args:
        what: its name, such as "learning the tokenizer".
        characters: how many there are to read.
        show: False shows nothing.

    Yields:
        A function that takes the number of characters read so far. Work goes on after the last one: it may be called
        again and again with the same number.
    """
    if not show:
        yield lambda done: None
    elif not sys.stderr.isatty():
        yield _Lines(what, characters).tell
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        console = Console(stderr=True)
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
            task = progress.add_task(what, total=characters)

            def tell(done: int) -> None:
                # Without a total the bar pulses: something is at work, nobody knows for how long.
                total = characters if done < characters else None
                progress.update(task, completed=done, total=total)

            yield tell


class _Lines:
    def __init__(self, what: str, characters: int) -> None:
        self._what, self._characters = what, characters
        self._start = time.monotonic()
        self._next = self._start + _FIRST_LINE

    def tell(self, done: int) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _NEXT_LINE
        share = min(1.0, done / max(1, self._characters))
        print(
            f"{self._what}: {share:.0%} of {self._characters:,} characters after {now - self._start:.0f} s",
            file=sys.stderr,
            flush=True,
        )
