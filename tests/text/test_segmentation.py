# SPDX-License-Identifier: Apache-2.0
"""Pieces do not show in the result; Chinese words are jieba's, quietly and reproducibly."""

import subprocess
import sys

import jieba
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkern.text import segmentation
from llmkern.text.segmentation import chinese_words, pieces

TEXTS = st.text(st.sampled_from("ab .'\n\r\t\u3000天气e\u0301\u1100\u1161\u0345é😀"), max_size=60)


@pytest.fixture(scope="module", autouse=True)
def _short_pieces():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation, "PIECE_LENGTH", 3)
        yield


BOUNDARIES = (segmentation.ANYWHERE, segmentation.STARTS_ANEW, segmentation.WORD_BOUNDARY)


@given(TEXTS, st.sampled_from((*BOUNDARIES, segmentation.CHINESE_BOUNDARY)), st.booleans())
def test_pieces_join_to_the_text(text, boundary, always):
    cut = list(pieces(text, boundary, len if always else None))
    assert "".join(cut) == text
    assert all(cut)


def test_pieces_are_cut_where_nothing_joins():
    anywhere, anew, word = BOUNDARIES
    assert list(pieces("abcde fg h\n\nijk", word)) == ["abcde", " fg", " h\n\nijk"]
    assert list(pieces("abcde\u0301天气", anew)) == ["abc", "de\u0301", "天气"]
    assert list(pieces("abcde\u0301天气", anywhere)) == ["abc", "de\u0301", "天气"]
    assert list(pieces("今天，天气好。\n明天", segmentation.CHINESE_BOUNDARY)) == [
        *("今天，天气好", "。\n明天")
    ]


def test_a_stretch_without_a_boundary_is_cut_where_asked():
    word = segmentation.WORD_BOUNDARY
    assert list(pieces("a" * 14, word)) == ["a" * 14]
    assert list(pieces("a" * 14, word, len)) == ["a" * 6, "a" * 6, "aa"]
    seen = []
    assert list(pieces("a" * 14, word, lambda text: seen.append(len(text)))) == ["a" * 14]
    assert seen == [6, 12, 14]


def test_words_are_jiebas():
    assert chinese_words("我们下午去公园散步，\n明天下雨。") == [
        *("我们", "下午", "去", "公园", "散步", "，", "\n", "明天", "下雨", "。")
    ]


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("今天天气非常好，\r\n\t 3.5%")))
def test_words_join_to_the_text(text):
    assert "".join(chinese_words(text)) == text


def test_the_programs_own_dictionary_changes_nothing():
    before = chinese_words("冰雹雷暴区")
    jieba.add_word("冰雹雷暴区")
    try:
        assert jieba.lcut("冰雹雷暴区") == ["冰雹雷暴区"]
        assert chinese_words("冰雹雷暴区") == before != ["冰雹雷暴区"]
    finally:
        jieba.del_word("冰雹雷暴区")


def test_lazy_and_quiet():
    """Nothing optional is imported before it is used, and jieba then neither prints nor warns."""
    program = (
        "import sys, warnings, llmkern.text\n"
        "optional = {'tokenizers', 'jieba', 'stopwordsiso', 'snowballstemmer'}\n"
        "assert not optional & set(sys.modules), optional & set(sys.modules)\n"
        "warnings.simplefilter('error')\n"
        "tokenizer = llmkern.text.Tokenizer.train('今天天气好', kind='jieba')\n"
        "print(tokenizer.decode(tokenizer.encode('天气')))\n"
    )
    run = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", program], capture_output=True, encoding="utf-8"
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "<unk>\n", "")
