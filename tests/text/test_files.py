# SPDX-License-Identifier: Apache-2.0
"""Reading: every byte kept, every fault named with its place. Writing: all or nothing."""

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


def test_refuses_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"llmkern\.text\.read_text: .*none\.txt'.*No such"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(IsADirectoryError, match=r"llmkern\.text\.read_lines: .*Is a directory"):
        read_lines(tmp_path)
