# SPDX-License-Identifier: Apache-2.0
"""tokenizer.json: restores everything, is written all or nothing, is refused when not ours."""

import errno
import json
import os
import pickle

import pytest
import tokenizers

from llmkern.text import Tokenizer

TEXT = (
    "It's raining;  it pours.\n\n今天天气非常好，Ａ１ 我们去公园散步。\nÉté cafe\u0301, it pours.\n"
)
OPTIONS = [
    {"kind": "char"},
    {"kind": "char", "special_tokens": ("<unk>", "<bos>"), "vocab_size": 30},
    {"kind": "word"},
    {"kind": "word", "lowercase": True, "normalization": "NFKC", "special_tokens": ("<unk>",)},
    {"kind": "word", "min_frequency": 2, "special_tokens": ("<pad>", "<eos>", "<unk>")},
    {"kind": "jieba"},
    {"kind": "jieba", "lowercase": True, "normalization": "NFC"},
    {"kind": "bpe", "vocab_size": 280},
    {"kind": "bpe", "vocab_size": 290, "special_tokens": ("<eos>",), "lowercase": True},
]
NAMES = ("kind", "tokens", "vocab_size", "pad_id", "unk_id", "bos_id", "eos_id")


def assert_same(got: Tokenizer, expected: Tokenizer) -> None:
    for name in NAMES:
        assert getattr(got, name) == getattr(expected, name), name
    assert got.to_json() == expected.to_json()
    for text in (TEXT, TEXT.upper(), "<eos><unk> <bos>" if expected.unk_id is not None else "It"):
        if expected.kind == "char" and expected.unk_id is None and text is not TEXT:
            continue
        ids = expected.encode(text)
        assert got.encode(text) == ids
        assert got.decode(ids) == expected.decode(ids)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_load_restores_everything(tmp_path, options):
    tokenizer = Tokenizer.train(TEXT, **options)
    file = tokenizer.save(tmp_path / "new" / "folder")
    assert os.listdir(file.parent) == ["tokenizer.json"]
    for copy in (
        Tokenizer.load(file.parent),
        Tokenizer.load(str(file)),
        Tokenizer.from_json(tokenizer.to_json()),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert_same(copy, tokenizer)
    before = file.read_bytes()
    assert Tokenizer.load(file).save(file.parent).read_bytes() == before


@pytest.mark.parametrize("options", [o for o in OPTIONS if o["kind"] != "jieba"], ids=str)
def test_the_file_is_the_librarys_own(tmp_path, options):
    """Any program that uses the library gets the same ids from it."""
    tokenizer = Tokenizer.train(TEXT, **options)
    theirs = tokenizers.Tokenizer.from_file(str(tokenizer.save(tmp_path)))
    assert theirs.encode(TEXT).ids == tokenizer.encode(TEXT)
    if options["kind"] != "word":
        assert theirs.decode(theirs.encode(TEXT).ids) == tokenizer.decode(tokenizer.encode(TEXT))


@pytest.mark.parametrize(
    ("options", "start"),
    [
        (OPTIONS[0], "\n"),
        (OPTIONS[1], "<bos>"),
        (OPTIONS[2], "<eos>"),
        (OPTIONS[3], "it"),
        (OPTIONS[5], "\n"),
        (OPTIONS[7], "Ċ"),
        (OPTIONS[8], "Ċ"),
    ],
    ids=str,
)
def test_files_of_version_0_1_load_as_they_were(options, start):
    """They name no beginning, and their bpe cuts no long runs."""
    content = json.loads(Tokenizer.train(TEXT, **options).to_json())
    content["post_processor"] = None
    if options["kind"] == "bpe":
        byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        content["pre_tokenizer"] = json.loads(byte_level.__getstate__())
    old = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    tokenizer = Tokenizer.from_json(old)
    assert tokenizer.to_json() == old
    assert tokenizer.token(tokenizer.start_id) == start
    if options["kind"] != "jieba":
        text = TEXT + "it" * 100
        assert tokenizer.encode(text) == tokenizers.Tokenizer.from_str(old).encode(text).ids


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch, step):
    old = Tokenizer.train("old", kind="char")
    old.save(tmp_path)

    def full_disk(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full_disk)
    message = r"llmkern\.save: could not write .*tokenizer\.json: No space"
    with pytest.raises(OSError, match=message):
        Tokenizer.train("new", kind="char").save(tmp_path)
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    assert Tokenizer.load(tmp_path).tokens == old.tokens


def test_save_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"llmkern\.save: could not write .*file"):
        Tokenizer.train("a", kind="char").save(tmp_path / "file")


@pytest.mark.parametrize("kind", ["char", "word", "jieba", "bpe"])
def test_cut_off_file_is_refused(tmp_path, kind):
    file = Tokenizer.train(TEXT, kind=kind).save(tmp_path)
    content = file.read_bytes()
    for length in {0, 1, *range(2, len(content) - 2, max(len(content) // 50, 1)), len(content) - 2}:
        file.write_bytes(content[:length])
        message = rf"Tokenizer\.load: expected '{file}' to be JSON, got damaged or cut off content"
        with pytest.raises(ValueError, match=message):
            Tokenizer.load(tmp_path)


def foreign(change) -> str:
    content = json.loads(Tokenizer.train("a b", kind="word").to_json())
    change(content)
    return json.dumps(content)


FOREIGN = {
    "not text": (b"\x80\x04\x95\xff", "JSON, got damaged"),
    "not a tokenizer": (b'{"vocab_size": 5}', r"a tokenizer, got: "),
    "a list": (b"[1, 2]", r"a tokenizer, got: "),
    "WordPiece": (
        tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0}, unk_token="a")).to_str(),
        r"that llmkern saved .* got one of: model WordPiece, pre_tokenizer none, decoder none",
    ),
    "other words": (
        foreign(lambda c: c.update(pre_tokenizer={"type": "Whitespace"})),
        r"model WordLevel, pre_tokenizer Whitespace, decoder none",
    ),
    "no decoder": (
        tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).to_str(),
        r"model WordLevel, pre_tokenizer none, decoder none, V = 1",
    ),
    "no vocabulary": (foreign(lambda c: c["model"].update(vocab={})), "V = 0"),
    "gap": (foreign(lambda c: c["model"].update(vocab={"a": 0, "b": 2})), "V = 2"),
    "cuts texts short": (
        foreign(
            lambda c: c.update(
                truncation={
                    "direction": "Right",
                    "max_length": 8,
                    "strategy": "LongestFirst",
                    "stride": 0,
                }
            )
        ),
        "V = 4, truncation",
    ),
    "other special tokens": (
        foreign(
            lambda c: c.update(
                added_tokens=[
                    {
                        "id": 4,
                        "content": "[MASK]",
                        "single_word": False,
                        "lstrip": False,
                        "rstrip": False,
                        "normalized": False,
                        "special": True,
                    }
                ]
            )
        ),
        r"V = 4, \[MASK\]",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_file_is_refused(tmp_path, name):
    content, message = FOREIGN[name]
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"Tokenizer\.load: expected '{file}' to be .*{message}"):
        Tokenizer.load(tmp_path)


def test_missing_file(tmp_path):
    message = r"Tokenizer\.load: expected a tokenizer in '.*tokenizer\.json', got: No such file"
    with pytest.raises(FileNotFoundError, match=message):
        Tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'.*elsewhere', got: No such file"):
        Tokenizer.load(tmp_path / "elsewhere")
