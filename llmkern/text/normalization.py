# SPDX-License-Identifier: Apache-2.0
"""Unicode normalisation of a text, on the standard library alone."""

import unicodedata
from typing import Literal

NormalizationForm = Literal["NFC", "NFD", "NFKC", "NFKD"]
FORMS: tuple[NormalizationForm, ...] = ("NFC", "NFD", "NFKC", "NFKD")


def check_form(where: str, form: str | None) -> None:
    """Raise a ValueError, in the name of ``where``, if ``form`` is no normalisation form."""
    if form is not None and form not in FORMS:
        raise ValueError(f"llmkern.text.{where}: expected one of {FORMS} or None, got {form!r}")


def normalize(
    text: str,
    *,
    form: NormalizationForm | None = "NFKC",
    lowercase: bool = False,
    collapse_whitespace: bool = False,
) -> str:
    """Bring a text into one normal form, so that what looks the same is the same.

    Args:
        text: Any text.
        form: Unicode normalisation form (Unicode Standard Annex #15). ``"NFKC"`` also turns
            full-width letters and digits, frequent in Chinese and Japanese text, into plain ones.
            ``None`` leaves the characters as they are.
        lowercase: Lower-case the text. The form is applied again afterwards, because a lower-case
            letter may decompose.
        collapse_whitespace: Within each line make every run of white space one space, and trim both
            ends. Line breaks are kept; ``\\r\\n`` becomes ``\\n``.

    Returns:
        The normalised text.

    Raises:
        TypeError: ``text`` is not a str.
        ValueError: ``form`` is unknown.

    Example:
        >>> normalize("Ｗｅａｔｈｅｒ　２０２５", lowercase=True)
        'weather 2025'
    """
    if not isinstance(text, str):
        raise TypeError(f"llmkern.text.normalize: expected a str, got {type(text).__name__}")
    check_form("normalize", form)
    if form is not None:
        text = unicodedata.normalize(form, text)
    if lowercase:
        text = text.lower()
        if form is not None:
            text = unicodedata.normalize(form, text)
    if collapse_whitespace:
        text = "\n".join(" ".join(line.split()) for line in text.split("\n"))
    return text
