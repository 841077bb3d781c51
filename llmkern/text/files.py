# SPDX-License-Identifier: Apache-2.0
"""Text files: strict reading and atomic writing.

A corpus is read as it is, byte for byte, and refused with the exact place of the first fault: text
silently repaired or silently cut is a model silently trained on something else.
"""

import codecs
import os
from pathlib import Path

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


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
        ValueError: The file is empty, holds only white space, or is not UTF-8: the error names the
            byte, its offset from the start of the file, and its line and column, counted from 1.

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
    content = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + len(data) - len(content)
        raise ValueError(f"{where}: {_not_utf8(path, data, offset)}") from error
    if not text or text.isspace():
        found = f"{len(data)} bytes of nothing but white space" if data else "an empty file"
        raise ValueError(f"{where}: expected text in '{path}', got {found}")
    return text


def _not_utf8(path: Path, data: bytes, offset: int) -> str:
    line_start = data.rfind(b"\n", 0, offset) + 1
    line = data.count(b"\n", 0, offset) + 1
    column = len(data[line_start:offset].decode("utf-8-sig")) + 1
    encoding = "UTF-16" if data.startswith(_UTF16_MARKS) else "GB18030"
    return (
        f"expected UTF-8 text in '{path}', got byte 0x{data[offset]:02X} at offset {offset} "
        f"(line {line}, column {column}); convert the file first, for example: "
        f"iconv -f {encoding} -t UTF-8"
    )
