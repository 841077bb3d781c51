# SPDX-License-Identifier: Apache-2.0
"""normalize: what each option does to characters that look alike, and that it settles."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkern.text import normalize

FORMS = ("NFC", "NFD", "NFKC", "NFKD", None)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("NFC", "é ﬁ Ａ １ ｶﾞ 가"),
        ("NFD", "e\u0301 ﬁ Ａ １ ｶﾞ \u1100\u1161"),
        ("NFKC", "é fi A 1 ガ 가"),
        ("NFKD", "e\u0301 fi A 1 カ\u3099 \u1100\u1161"),
        (None, "e\u0301 ﬁ Ａ １ ｶﾞ 가"),
    ],
)
def test_forms(form, expected):
    assert normalize("e\u0301 ﬁ Ａ １ ｶﾞ 가", form=form) == expected


def test_default_is_nfkc_and_nothing_else():
    assert normalize("Ｎｏ．１　天气 \r\n\tＯＫ ") == "No.1 天气 \r\n\tOK "


def test_lowercase_is_normal_again():
    """J with a caron exists only as two code points; its lower case is one."""
    assert normalize("J\u030c", form="NFC") == "J\u030c"
    assert normalize("J\u030c", form="NFC", lowercase=True) == "\u01f0"


def test_collapse_whitespace_keeps_line_breaks():
    text = "  fine\t\tweather \u3000today\r\n\n now\u2028then  \n"
    assert normalize(text, collapse_whitespace=True) == "fine weather today\n\nnow then\n"


@given(st.text(), st.sampled_from(FORMS), st.booleans(), st.booleans())
def test_idempotent(text, form, lowercase, collapse):
    options = {"form": form, "lowercase": lowercase, "collapse_whitespace": collapse}
    once = normalize(text, **options)
    assert normalize(once, **options) == once


def test_refuses_other_forms_and_types():
    with pytest.raises(ValueError, match=r"llmkern\.text\.normalize: expected one of .*got 'nfc'"):
        normalize("text", form="nfc")
    with pytest.raises(TypeError, match=r"llmkern\.text\.normalize: expected a str, got bytes"):
        normalize(b"text")
