# SPDX-License-Identifier: Apache-2.0
"""Stop words and stemming: for classifiers and retrieval on words, not for language models.

Both come from maintained collections: stop words from stopwords-iso, stemmers from Snowball (Porter
1980, 2001). Languages are ISO 639-1 codes in both.
"""

import functools
from collections.abc import Iterable

from llmkern._optional import require

_SNOWBALL_NAMES = {
    "ar": "arabic",
    "ca": "catalan",
    "da": "danish",
    "de": "german",
    "el": "greek",
    "en": "english",
    "es": "spanish",
    "eu": "basque",
    "fi": "finnish",
    "fr": "french",
    "ga": "irish",
    "hi": "hindi",
    "hu": "hungarian",
    "hy": "armenian",
    "id": "indonesian",
    "it": "italian",
    "lt": "lithuanian",
    "ne": "nepali",
    "nl": "dutch",
    "no": "norwegian",
    "pt": "portuguese",
    "ro": "romanian",
    "ru": "russian",
    "sr": "serbian",
    "sv": "swedish",
    "ta": "tamil",
    "tr": "turkish",
    "yi": "yiddish",
}


def remove_stop_words(tokens: Iterable[str], language: str = "en") -> list[str]:
    """Drop the words that carry little meaning ("the", "of"; "的", "了").

    Args:
        tokens: Words, in any case.
        language: ISO 639-1 code, for example ``"en"``, ``"de"`` or ``"zh"``.

    Returns:
        The other words, in order, unchanged.

    Raises:
        ImportError: The package stopwordsiso is not installed.
        TypeError: ``tokens`` is one str.
        ValueError: There is no list for the language.

    Example:
        >>> remove_stop_words(["The", "weather", "is", "fine"])
        ['weather', 'fine']
    """
    words = _words("remove_stop_words", tokens)
    stop_words = _stop_words(language)
    return [word for word in words if word.lower() not in stop_words]


def stem(tokens: Iterable[str], language: str = "en") -> list[str]:
    """Reduce words to their stems with the Snowball stemmer of a language.

    Args:
        tokens: Words in lower case: the Snowball rules look at lower-case endings only.
        language: ISO 639-1 code, for example ``"en"``. Chinese has no endings, hence no stemmer.

    Returns:
        The stem of each word, in order.

    Raises:
        ImportError: The package snowballstemmer is not installed.
        TypeError: ``tokens`` is one str.
        ValueError: There is no stemmer for the language.

    Example:
        >>> stem(["running", "raining", "days"])
        ['run', 'rain', 'day']
    """
    words = _words("stem", tokens)
    snowball = require("snowballstemmer", "stems words")
    if language not in _SNOWBALL_NAMES:
        raise ValueError(
            f"llmkern.text.stem: expected one of {sorted(_SNOWBALL_NAMES)}, got {language!r}"
        )
    return snowball.stemmer(_SNOWBALL_NAMES[language]).stemWords(words)


def _words(where: str, tokens: Iterable[str]) -> list[str]:
    if isinstance(tokens, str):
        raise TypeError(
            f"llmkern.text.{where}: expected a sequence of words, got one str; split it first"
        )
    return list(tokens)


@functools.cache
def _stop_words(language: str) -> frozenset[str]:
    stopwordsiso = require("stopwordsiso", "lists stop words")
    if not stopwordsiso.has_lang(language):
        known = sorted(stopwordsiso.langs())
        raise ValueError(
            f"llmkern.text.remove_stop_words: expected one of {known}, got {language!r}"
        )
    return frozenset(stopwordsiso.stopwords(language))
