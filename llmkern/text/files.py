# SPDX-License-Identifier: Apache-2.0
"""Text files: strict reading.

A corpus is read as it is, byte for byte, and refused with the exact place of the first fault: text
silently repaired or silently cut is a model silently trained on something else.
"""

import codecs
import os
from pathlib import Path

from llmkern.text.encodings import conversion_advice, file_format, unmarked_wide_encoding


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a whole UTF-8 text file.

    A leading byte order mark is dropped; nothing else is changed, line ends included: a character
    model sees them.

    Args:
        path: The file.

    Returns:
        Its text, never empty.

    Raises:
        OSError: There is no such file, it is a folder, or it cannot be read; of the subclass that
            the system raised.
        ValueError: The file is empty, holds only white space, is of a format that is no text (an
            archive, a Word document), is not UTF-8, or has a NUL byte, as UTF-16 does. The error
            names the byte, its offset from the start of the file, its line and column, counted from
            1, and the encoding that the file probably has.

    Example:
        >>> read_text("examples/weather_zh.txt")[:2]
        '今天'
    """
    return _read("llmkern.text.read_text", Path(path))


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Read the lines of a UTF-8 text file, without their line ends.

    Lines end at ``\\n`` or ``\\r\\n`` alone. ``str.splitlines`` would also break at form feeds and
    at U+2028, which real corpora hold inside sentences, and parallel files would no longer match
    line by line. Blank lines are kept.

    Args:
        path: The file.

    Returns:
        The lines.

    Raises:
        OSError: As ``read_text``.
        ValueError: As ``read_text``.
    """
    lines = _read("llmkern.text.read_lines", Path(path)).split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _read(where: str, path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise OSError(
            error.errno, f"{where}: expected a text file '{path}', got: {error.strerror}"
        ) from error
    known = file_format(data)
    if known is not None:
        raise ValueError(f"{where}: expected a text file '{path}', got {known[0]}; {known[1]}")
    content = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + len(data) - len(content)
        raise ValueError(
            f"{where}: expected UTF-8 text in '{path}', got {_place(data, offset)}; {conversion_advice(data)}"
        ) from error
    if (offset := data.find(b"\0")) >= 0:
        raise ValueError(
            f"{where}: expected text in '{path}', got {_place(data, offset)}; {_nul_advice(data)}"
        )
    if not text or text.isspace():
        found = f"{len(data)} bytes of nothing but white space" if data else "an empty file"
        raise ValueError(f"{where}: expected text in '{path}', got {found}")
    return text


def _place(data: bytes, offset: int) -> str:
    line_start = data.rfind(b"\n", 0, offset) + 1
    line = data.count(b"\n", 0, offset) + 1
    column = len(data[line_start:offset].decode("utf-8-sig")) + 1
    return f"byte 0x{data[offset]:02X} at offset {offset} (line {line}, column {column})"


def _nul_advice(data: bytes) -> str:
    if unmarked_wide_encoding(data) is not None:
        return conversion_advice(data)
    return "text has no NUL bytes; if it is text all the same, drop them with: tr -d '\\000'"
