# SPDX-License-Identifier: Apache-2.0
"""The published counts of real corpora, and the demonstration corpus of the project."""

import tarfile
from pathlib import Path

import pytest

from llmkern.text import Tokenizer, language_modeling_splits, read_lines, read_text

DEMO = Path(__file__).resolve().parents[2] / "examples" / "weather_zh.txt"


def test_penn_treebank(data_dir):
    """10,000 words, 929,589 / 73,760 / 82,430 tokens, <unk> and <eos> included (Mikolov 2010)."""
    splits = language_modeling_splits(data_dir / "ptb")
    tokenizer = Tokenizer.train(splits.train, kind="word")
    assert tokenizer.vocab_size == 10_000
    assert tokenizer.tokens[:4] == ("<unk>", "<eos>", "the", "N")
    for text, count in zip(splits, (929_589, 73_760, 82_430), strict=True):
        ids = tokenizer.encode(text)
        assert len(ids) == count
        assert ids.count(tokenizer.unk_id) == text.split().count("<unk>")
        assert ids.count(tokenizer.eos_id) == text.count("\n")
        assert tokenizer.decode(ids).split() == text.split()


def test_tiny_shakespeare(data_dir):
    """65 symbols, 1,115,394 characters; nanoGPT trains on 1,003,854 and validates on 111,540."""
    text = read_text(data_dir / "tinyshakespeare" / "input.txt")
    tokenizer = Tokenizer.train(text, kind="char")
    assert tokenizer.vocab_size == 65
    ids = tokenizer.encode(text)
    assert len(ids) == 1_115_394
    assert tokenizer.decode(ids) == text
    splits = language_modeling_splits(data_dir / "tinyshakespeare" / "input.txt")
    assert (len(splits.train), len(splits.valid)) == (1_003_854, 111_540)


def test_wikitext_2(data_dir):
    """33,278 words and 2,088,628 / 217,646 / 245,569 tokens (Merity 2016)."""
    texts = {}
    with tarfile.open(data_dir / "wikitext-2.tar.xz") as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                texts[Path(member.name).stem] = file.read().decode()
    tokenizer = Tokenizer.train(texts["train"], kind="word")
    assert tokenizer.vocab_size == 33_278
    counts = [len(tokenizer.encode(texts[split])) for split in ("train", "valid", "test")]
    assert counts == [2_088_628, 217_646, 245_569]


def test_tang_poems(data_dir):
    text = read_text(data_dir / "poetry_hzy46" / "poetry.txt")
    tokenizer = Tokenizer.train(text, kind="char")
    assert (tokenizer.vocab_size, len(tokenizer.encode(text))) == (5_387, 942_681)


def test_demonstration_corpus():
    """Chinese sentences, none twice, many of which begin as the documented prompts do."""
    lines = read_lines(DEMO)
    assert len(lines) >= 400 and len(set(lines)) == len(lines)
    assert 10_000 <= sum(map(len, lines)) <= 14_000
    assert sum(line.startswith("今天天气") for line in lines) >= 50
    for line in lines:
        assert line == line.strip() and line[-1] in "。！？”", line
        others = [
            c for c in line if not "\u4e00" <= c <= "\u9fff" and c not in "，。！？：；、“”《》"
        ]
        assert not others, (line, others)


@pytest.mark.parametrize("kind", ["char", "jieba", "word", "bpe"])
def test_demonstration_corpus_round_trip(kind):
    text = read_text(DEMO)
    tokenizer = Tokenizer.train(text, kind=kind)
    assert tokenizer.decode(tokenizer.encode(text)) == text
