# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, the end of a batch job and a closed terminal as a request: the run finishes its step, saves and stops."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from typing_extensions import Self

# Ctrl-C, the end of a batch job, and a terminal or connection that closed.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """True once SIGINT, SIGTERM or SIGHUP has come; use it in a ``with`` statement.

    The second SIGINT is a KeyboardInterrupt, for those who cannot wait. Where SIGHUP is ignored it stays so: under
    nohup a run outlives its terminal. Outside the main thread, where Python delivers no signals, nothing is ever
    requested.
    """

    def __init__(self) -> None:
        self._requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self._requested

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            heard = [n for n in _SIGNALS if not (nohup and n == signal.SIGHUP)]
            self._before = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True
