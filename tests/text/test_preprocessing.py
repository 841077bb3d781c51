# SPDX-License-Identifier: Apache-2.0
"""Stop words and stems, in several languages and scripts."""

import pytest
import snowballstemmer

from llmkern.text import remove_stop_words, stem
from llmkern.text.preprocessing import _SNOWBALL_NAMES


def test_stop_words_english():
    words = ["The", "storm", "is", "not", "over", "AND", "rain", "falls"]
    assert remove_stop_words(words) == ["storm", "rain", "falls"]


def test_stop_words_chinese_and_german():
    assert remove_stop_words(["今天", "的", "天气", "和", "昨天"], "zh") == [
        "今天",
        "天气",
        "昨天",
    ]
    assert remove_stop_words(iter(["Der", "Regen", "und", "die", "Sonne"]), "de") == [
        "Regen",
        "Sonne",
    ]


def test_stems():
    words = ["running", "runs", "flies", "happily", "weather"]
    assert stem(words) == ["run", "run", "fli", "happili", "weather"]
    assert stem(("katzen", "häuser"), "de") == ["katz", "haus"]
    assert stem(["погоды"], "ru") == ["погод"]
    assert stem([]) == []


def test_every_listed_language_has_a_stemmer():
    assert set(_SNOWBALL_NAMES.values()) <= set(snowballstemmer.algorithms())


@pytest.mark.parametrize("function", [remove_stop_words, stem])
def test_refuses(function):
    name = rf"llmkern\.text\.{function.__name__}"
    with pytest.raises(ValueError, match=rf"{name}: expected one of \['a.*'en'.*got 'xx'"):
        function(["word"], "xx")
    with pytest.raises(TypeError, match=rf"{name}: expected a sequence of words, got one str"):
        function("some words")


def test_chinese_has_no_stemmer():
    with pytest.raises(ValueError, match="got 'zh'"):
        stem(["天气"], "zh")
