# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and the end of a batch job as a request: the run finishes its step, saves and stops."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from typing_extensions import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """True once SIGINT or SIGTERM has come; use it in a ``with`` statement.

    The second SIGINT is a KeyboardInterrupt, for those who cannot wait. Outside the main thread, where Python
    delivers no signals, nothing is ever requested.
    """

    def __init__(self) -> None:
        self._requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self._requested

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
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
