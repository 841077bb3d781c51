# SPDX-License-Identifier: Apache-2.0
"""What a file that is no UTF-8 text probably is, and the command that makes text of it.

A file format shows itself by its first bytes, UTF-16 by its NULs. Between the older encodings of one script there is
only a guess: each decodes the others' files to some characters, but to rare ones. The guess counts how many of the
characters are common in the language, and says that it is a guess.
"""

import codecs
import re
from typing import NamedTuple

SAMPLE_LENGTH = 1 << 18

_FORMATS = (
    (b"\x1f\x8b", "a gzip archive", "gunzip"),
    (b"BZh", "a bzip2 archive", "bunzip2"),
    (b"\xfd7zXZ\x00", "an xz archive", "unxz"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x"),
    (b"Rar!\x1a\x07", "a RAR archive", "unrar x"),
    (b"%PDF-", "a PDF document", "pdftotext"),
    (b"{\\rtf", "an RTF document", "libreoffice --convert-to txt:Text"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", "libreoffice --convert-to txt:Text"),
    (b"\x89PNG\r\n", "a PNG image", ""),
    (b"\xff\xd8\xff", "a JPEG image", ""),
    (b"SQLite format 3\x00", "an SQLite database", ""),
    (b"PAR1", "a Parquet table", ""),
    (b"\x7fELF", "a program", ""),
)  # fmt: skip
_ZIP = b"PK\x03\x04"
_ZIPPED = (
    (b"word/", "a Word document (.docx)"),
    (b"xl/", "an Excel workbook (.xlsx)"),
    (b"ppt/", "a PowerPoint presentation (.pptx)"),
    (b"opendocument", "an OpenDocument file"),
    (b"epub+zip", "an EPUB book"),
)
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
# In text of a Western language, a NUL stands beside every letter of UTF-16; in Chinese, beside white space and digits.
_WIDE = (
    ("UTF-32LE", "utf-32-le"),
    ("UTF-32BE", "utf-32-be"),
    ("UTF-16LE", "utf-16-le"),
    ("UTF-16BE", "utf-16-be"),
)

# The most frequent characters of running text, simplified and traditional.
_CHINESE_BOTH = set(
    "的一是不了在人有我他中上大到地子出而要可也你得下自之年好看天今后然没起作心用里所都很生能多日同面文成小本道方三行十"
    "家公海美老高四女月山水風无口手去只家走些法意正全理平主外以和其此因已氣明更向相知者此她先最事力但如分定位身新"
)  # fmt: skip
_SIMPLIFIED = _CHINESE_BOTH | set(
    "这个们来为国说时会对于过发着样还经现点动进种见长问关从开气间头实学话让给将么两风飞云岁万书电车东马门听语"
)
_TRADITIONAL = _CHINESE_BOTH | set(
    "這個們來為國說時會對於過發著樣還經現點動進種見長問關從開氣間頭實學話讓給將麼兩風飛雲歲萬書電車東馬門聽語後裡沒無"
)
_PUNCTUATION = set("。，、；：？！「」『』“”《》（）\u3000")
_KANA = {chr(code) for code in range(0x3041, 0x30FD)}
_KOREAN = set("이다는을의에가고하를지도기사로한은나대자리어그시서인라있것들수보아해게일정만니면")
_CYRILLIC = set("оеаинтсрвлкмОЕАИНТСРВЛКМ")
_GREEK = set("αοιετσνηυρπκμςάέήίόύώ")
_WESTERN = set("àáâãäåæçèéêëìíîïñòóôõöøùúûüýßœÄÖÜÉ«»–—‘’“”„…°·¿¡€\xa0")


class _Candidate(NamedTuple):
    name: str  # as iconv calls it
    codec: str
    common: set[str]
    share: float  # of the characters beyond ASCII that are common, where the guess is right
    isolated: bool | None = (
        None  # whether the bytes beyond ASCII stand alone between letters; None: either way
    )


_CANDIDATES = (
    _Candidate("GB18030", "gb18030", _SIMPLIFIED | _PUNCTUATION, 0.25),
    _Candidate("BIG5", "big5hkscs", _TRADITIONAL | _PUNCTUATION, 0.25),
    _Candidate("SHIFT_JIS", "cp932", _KANA | _PUNCTUATION, 0.5),
    _Candidate("EUC-JP", "euc_jp", _KANA | _PUNCTUATION, 0.5),
    _Candidate("EUC-KR", "cp949", _KOREAN, 0.35),
    _Candidate("WINDOWS-1251", "cp1251", _CYRILLIC, 0.55, isolated=False),
    _Candidate("KOI8-R", "koi8_r", _CYRILLIC, 0.55, isolated=False),
    _Candidate("ISO-8859-7", "iso8859_7", _GREEK, 0.6, isolated=False),
    _Candidate("LATIN1", "latin_1", _WESTERN, 0.75, isolated=True),
    _Candidate("WINDOWS-1252", "cp1252", _WESTERN, 0.75, isolated=True),
)
_RUN = re.compile(rb"[\x80-\xff]+")
_LONGEST_ISOLATED = 1.7  # the mean run of bytes beyond ASCII in a Western text
_CLEAR = 1.5  # a guess is one where its score is so many times that of the next


def file_format(data: bytes) -> tuple[str, str] | None:
    """What a file is, and what to do about it, if its first bytes are those of a format that is no text."""
    if data.startswith(_ZIP):
        return _zip_format(data)
    for magic, what, command in _FORMATS:
        if data.startswith(magic):
            return (
                what,
                f"make a text file of it first, with: {command}" if command else "give a text file",
            )
    return None


def unmarked_wide_encoding(data: bytes) -> str | None:
    """UTF-16LE, UTF-32BE and so forth, if the NULs of a file are those of such a text."""
    best = max(_WIDE, key=lambda wide: _plausible(data, wide[1]))
    return best[0] if _plausible(data, best[1]) > 0.9 else None


def conversion_advice(data: bytes) -> str:
    """What to do with a file that is not UTF-8, as the end of a sentence."""
    for mark, name in _MARKS:
        if data.startswith(mark):
            return f"this is {name}; {_convert(name)}"
    if b"\0" in data[:SAMPLE_LENGTH]:
        wide = unmarked_wide_encoding(data)
        if wide is None:
            return "it holds NUL bytes too: this is no text file"
        return f"this is {wide} without a byte order mark; {_convert(wide)}"
    if _is_damaged_utf8(data):
        return (
            "the rest is UTF-8, so a few bytes are damaged; mend them, or drop them with: "
            "iconv -c -f UTF-8 -t UTF-8"
        )
    guesses = _guesses(data[:SAMPLE_LENGTH])
    if not guesses:
        return "its encoding is not clear from its bytes: find it out, then convert with: iconv -f ENCODING -t UTF-8"
    if len(guesses) == 1:
        return f"by its characters this is probably {guesses[0]}; {_convert(guesses[0])}"
    return (
        f"by its characters this may be {' or '.join(guesses)}; look at the result of both, for example: "
        f"iconv -f {guesses[0]} -t UTF-8"
    )


def _zip_format(data: bytes) -> tuple[str, str]:
    for part, what in _ZIPPED:
        if part in data:
            return what, "save it as plain text first (encoding UTF-8)"
    return "a zip archive", "make a text file of it first, with: unzip"


def _convert(encoding: str) -> str:
    return f"convert the file first, for example: iconv -f {encoding} -t UTF-8"


def _decoded(data: bytes, codec: str) -> str:
    """The text, U+FFFD for what is none; a last character that is cut off is left out."""
    return codecs.getincrementaldecoder(codec)(errors="replace").decode(data)


def _plausible(data: bytes, codec: str) -> float:
    """The share of characters that texts in use consist of: letters, digits, white space, punctuation."""
    text = _decoded(data[:SAMPLE_LENGTH], codec)
    if not text:
        return 0.0
    known = sum(c in "\n\r\t" or (c.isprintable() and _in_use(ord(c))) for c in text)
    return known / len(text)


def _in_use(code: int) -> bool:
    return code < 0x600 or 0x2000 <= code < 0x2070 or 0x3000 <= code < 0x3100 or 0x4E00 <= code < 0xA000 or (
        0xAC00 <= code < 0xD7A4 or 0xFF00 <= code < 0xFFF0
    )  # fmt: skip


def _is_damaged_utf8(data: bytes) -> bool:
    """Whether far more characters beyond ASCII are whole than broken."""
    text = data[:SAMPLE_LENGTH].decode("utf-8-sig", errors="replace")
    beyond = sum(not c.isascii() for c in text)
    broken = text.count("\ufffd")
    return beyond > 10 * broken


def _guesses(data: bytes) -> list[str]:
    """The encodings that the bytes speak for, the likeliest first; more than one where they do not tell them apart."""
    scores: dict[str, float] = {}
    runs = [len(run) for run in _RUN.findall(data)]
    isolated = sum(runs) / max(1, len(runs)) < _LONGEST_ISOLATED
    for candidate in _CANDIDATES:
        if candidate.isolated not in (None, isolated):
            continue
        text = _decoded(data, candidate.codec)
        beyond = [c for c in text if not c.isascii()]
        if beyond:
            share = sum(c in candidate.common for c in beyond) / len(beyond)
            scores[candidate.name] = share / candidate.share
    fitting = sorted(
        (name for name in scores if scores[name] >= 1), key=scores.__getitem__, reverse=True
    )
    if fitting[:2] == [
        "LATIN1",
        "WINDOWS-1252",
    ]:  # the same bytes but for 0x80 to 0x9F, which the first does not use
        return fitting[:1]
    return [name for name in fitting if scores[name] * _CLEAR > scores[fitting[0]]][:2]
