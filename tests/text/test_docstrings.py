# SPDX-License-Identifier: Apache-2.0
"""The examples in the docstrings run and show what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import llmkern.text

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("datasets", "files", "normalization", "preprocessing", "streaming", "tokenizer")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(f"llmkern.text.{name}")
    result = doctest.testmod(module, extraglobs=vars(llmkern.text))
    assert result.attempted > 0
    assert result.failed == 0
