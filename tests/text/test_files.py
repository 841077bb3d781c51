# SPDX-License-Identifier: Apache-2.0
"""Reading: every byte kept, every fault named with its place. Writing: all or nothing."""

import bz2
import gzip
import io
import lzma
import zipfile
from pathlib import Path

import pytest

from llmkern.text import read_lines, read_text

BOM = b"\xef\xbb\xbf"


@pytest.fixture
def write(tmp_path):
    """``write(data)`` is the path of a file with these bytes."""

    def make(data: bytes):
        path = tmp_path / "corpus.txt"
        path.write_bytes(data)
        return path

    return make


def test_text_is_kept_as_it_is(write):
    text = "\u4eca\u5929\r\n\tfine \u2028 \x0c\r weather\n\n"
    assert read_text(write(text.encode())) == text


def test_one_byte_order_mark_is_dropped(write):
    assert read_text(write(BOM + "天".encode())) == "天"
    assert read_text(write(BOM + BOM + b"a")) == "\ufeffa"


def test_lines_end_at_newlines_alone(write):
    data = "one\r\ntwo\u2028still two\x0cand\x85here\n\nfour\rfour".encode()
    assert read_lines(write(data)) == ["one", "two\u2028still two\x0cand\x85here", "", "four\rfour"]
    assert read_lines(write(data + b"\n"))[-1] == "four\rfour"
    assert read_lines(write(b"a\n\n")) == ["a", ""]


@pytest.mark.parametrize("reader", [read_text, read_lines])
@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "an empty file"),
        (b" \n\t\r\n", "5 bytes of nothing but white space"),
        (BOM, "3 bytes of nothing but white space"),
        ("\u3000".encode(), "3 bytes of nothing but white space"),
    ],
)
def test_refuses_no_text(write, reader, data, found):
    with pytest.raises(
        ValueError, match=rf"llmkern\.text\.{reader.__name__}: expected text.*{found}"
    ):
        reader(write(data))


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"\xff", r"byte 0xFF at offset 0 \(line 1, column 1\)"),
        ("天气\n今天".encode() + b"\x80!\n", r"byte 0x80 at offset 13 \(line 2, column 3\)"),
        (BOM + "天".encode() + b"\xc0", r"byte 0xC0 at offset 6 \(line 1, column 2\)"),
        (BOM + b"ab\ncd\xe5\xa4", r"byte 0xE5 at offset 8 \(line 2, column 3\)"),
        ("今天".encode("gb18030"), r"byte 0xBD at offset 0 .*iconv -f GB18030 -t UTF-8"),
        ("fine".encode("utf-16"), r"byte 0xFF at offset 0 .*iconv -f UTF-16 -t UTF-8"),
        (b"a\xed\xa0\x80", r"byte 0xED at offset 1 \(line 1, column 2\)"),
    ],
)
def test_invalid_utf8_is_named_with_its_place(write, data, place):
    with pytest.raises(ValueError, match=rf"expected UTF-8 text in '.*corpus\.txt', got {place}"):
        read_text(write(data))


CHINESE = "今天天气非常好，我们去公园散步。\n明天下雨，我们在家看书。\n"
TRADITIONAL = "今天天氣非常好，我們去公園散步。\n明天可能會下雨，我們在家裡看書。\n"
WESTERN = "Größe und Übung: die Straße führt nach Köln.\nL'élève était très fatigué.\n"
ENGLISH = "It is a fine day.\n"


@pytest.mark.parametrize(
    ("text", "codec", "advice"),
    [
        (CHINESE, "gb18030", "probably GB18030; .*iconv -f GB18030 -t UTF-8"),
        (CHINESE, "gbk", "probably GB18030; "),
        (TRADITIONAL, "big5", "probably BIG5; .*iconv -f BIG5 -t UTF-8"),
        (TRADITIONAL, "gb18030", "probably GB18030; "),
        (WESTERN, "latin-1", "probably LATIN1; .*iconv -f LATIN1 -t UTF-8"),
        ("a café\n", "latin-1", "probably LATIN1; "),
        ("“So” – l’été\n", "cp1252", "probably WINDOWS-1252; .*iconv -f WINDOWS-1252"),
        ("今日は天気がとても良いので、公園を散歩しました。\n", "shift_jis", "probably SHIFT_JIS; "),
        ("今日は天気がとても良いので、公園を散歩しました。\n", "euc_jp", "probably EUC-JP; "),
        ("오늘은 날씨가 매우 좋아서 공원을 산책했습니다.\n", "euc_kr", "probably EUC-KR; "),
        ("Все счастливые семьи похожи друг на друга\n", "cp1251", "probably WINDOWS-1251; "),
        ("Все счастливые семьи похожи друг на друга\n", "koi8_r", "probably KOI8-R; "),
        (CHINESE, "utf-16-le", "UTF-16LE without a byte order mark; .*iconv -f UTF-16LE -t UTF-8"),
        (CHINESE, "utf-16-be", "UTF-16BE without a byte order mark; "),
        (WESTERN, "utf-16-le", "UTF-16LE without a byte order mark; "),
        (ENGLISH, "utf-16-le", "byte 0x00 at offset 1 .*UTF-16LE without .*iconv -f UTF-16LE"),
        (ENGLISH, "utf-16-be", "byte 0x00 at offset 0 .*UTF-16BE without "),
        (ENGLISH, "utf-32-le", "byte 0x00 at offset 1 .*UTF-32LE without "),
        (ENGLISH, "utf-32", "this is UTF-32; .*iconv -f UTF-32 "),
        (ENGLISH, "utf-16", "this is UTF-16; .*iconv -f UTF-16 "),
    ],
)
def test_each_encoding_gets_its_own_advice(write, text, codec, advice):
    with pytest.raises(ValueError, match=rf"llmkern\.text\.read_text: expected .*{advice}"):
        read_text(write(text.encode(codec)))


@pytest.mark.parametrize("codec", ["gb18030", "utf-16-le", "utf-16-be"])
def test_real_corpora_are_recognised(write, codec):
    text = read_text(Path(__file__).resolve().parents[2] / "examples" / "weather_zh.txt")
    name = {"gb18030": "GB18030", "utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE"}[codec]
    with pytest.raises(ValueError, match=rf"iconv -f {name} -t UTF-8"):
        read_text(write(text.encode(codec)))


@pytest.mark.parametrize(
    ("data", "advice"),
    [
        (b"\xff\x80\xfe\x81", "its encoding is not clear from its bytes: find it out"),
        (CHINESE.encode() + b"\x80", "the rest is UTF-8, .* damaged; .*iconv -c -f UTF-8 -t UTF-8"),
        (CHINESE.encode()[:-2], "the rest is UTF-8, "),
        (bytes(range(256)) * 9, "this is no text file"),
        (b"fine\n" * 9 + b"\0", r"byte 0x00 at offset 45 \(line 10, column 1\); .*tr -d '\\000'"),
    ],
)
def test_where_there_is_no_guess_none_is_made(write, data, advice):
    with pytest.raises(ValueError, match=advice):
        read_text(write(data))


def zipped(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "text")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "advice"),
    [
        (gzip.compress(b"text", mtime=0), "a gzip archive; .*gunzip"),
        (bz2.compress(b"text"), "a bzip2 archive; .*bunzip2"),
        (lzma.compress(b"text"), "an xz archive; .*unxz"),
        (zipped("word/document.xml"), r"a Word document \(.docx\); save it as plain text"),
        (zipped("xl/workbook.xml"), r"an Excel workbook \(.xlsx\); "),
        (zipped("corpus.txt"), "a zip archive; .*unzip"),
        (b"%PDF-1.4\n", "a PDF document; .*pdftotext"),
        (b"{\\rtf1 text}", "an RTF document"),
        (b"\x89PNG\r\n\x1a\n", "a PNG image; give a text file"),
    ],
)
def test_what_is_no_text_is_called_by_its_name(write, data, advice):
    message = rf"llmkern\.text\.read_text: expected a text file '.*', got {advice}"
    with pytest.raises(ValueError, match=message):
        read_text(write(data))


def test_refuses_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"llmkern\.text\.read_text: .*none\.txt'.*No such"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(IsADirectoryError, match=r"llmkern\.text\.read_lines: .*Is a directory"):
        read_lines(tmp_path)
