# SPDX-License-Identifier: Apache-2.0
"""Too little memory: torch's and the operators' errors as one, which says how many bytes and what to lower."""

import re
from typing import NoReturn

_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory")
_BYTES = re.compile(r"(\d+) bytes")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that there was too little memory; torch raises a bare RuntimeError on the CPU."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


def bytes_asked_for(error: BaseException) -> str:
    """The bytes that an allocation failed on, for people: "4,294,967,296 bytes (4.0 GiB)"; empty if it does not say."""
    found = _BYTES.search(str(error))
    if found is None:
        return ""
    count = int(found[1])
    gibibytes = f" ({count / 2**30:.1f} GiB)" if count >= 2**27 else ""
    return f"{count:,} bytes{gibibytes}"


def reraise_out_of_memory(error: Exception, where: str, **settings: int | None) -> NoReturn:
    """Raises a MemoryError for an error that means too little memory, and every other error as it is.

    Args:
        error: what was raised.
        where: what was being done.
        settings: name -> value, what to lower.
    """
    if not is_out_of_memory(error):
        raise error
    count = bytes_asked_for(error)
    asked = f", which asked for {count} more" if count else ""
    lower = ", ".join(f"{name} (now {value})" for name, value in settings.items())
    raise MemoryError(
        f"{where}{asked}; lower {lower} or the model's size: {str(error) or 'MemoryError'}"
    ) from error
