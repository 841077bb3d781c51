# SPDX-License-Identifier: Apache-2.0
"""A tokenizer.json that nobody trusts is refused by one ValueError that names the file, whatever it holds."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkern.text import Tokenizer, tokenizer_file

TEXT = "the cat sat,\nthe dog 今天天气 saw\n"
OPTIONS = [
    {"kind": "char", "special_tokens": ("<unk>", "<bos>")},
    {"kind": "word", "lowercase": True, "normalization": "NFKC"},
    {"kind": "jieba", "normalization": "NFC"},
    {"kind": "bpe", "vocab_size": 270, "special_tokens": ("<pad>", "<eos>")},
]
FILES = [Tokenizer.train(TEXT, **options).to_json() for options in OPTIONS]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30, 400_000_000])
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["", "a", "<unk>", "<eos>", "BPE", "WordLevel", "\ud800", "x" * 500, "WordPiece"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=6,
)  # fmt: skip


def paths(part, before=()):
    """The path of every value in a JSON value; of long lists and objects, the first ones."""
    yield before
    if isinstance(part, dict | list):
        items = part.items() if isinstance(part, dict) else enumerate(part)
        for key, value in list(items)[:12]:
            yield from paths(value, (*before, key))


def changed(content, path, value, delete):
    """The content with the value at a path replaced or left out."""
    if not path:
        return value
    content = copy.deepcopy(content)
    part = content
    for key in path[:-1]:
        part = part[key]
    if delete:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return content


def works_or_is_refused(text: str) -> None:
    try:
        tokenizer = Tokenizer.from_json(text)
    except ValueError as error:
        message = str(error)
        assert message.startswith("llmkern.text.Tokenizer.from_json: expected the text to be ")
        assert len(message) < 900
        return
    assert tokenizer.decode(tokenizer.encode("the <unk>", "drop")) is not None
    assert 0 <= tokenizer.start_id < tokenizer.vocab_size
    assert Tokenizer.from_json(tokenizer.to_json()).tokens == tokenizer.tokens


@given(st.sampled_from(FILES), st.data())
@settings(deadline=None, max_examples=150)
def test_any_value_in_any_place(file, data):
    content = json.loads(file)
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(paths(content))))
        content = changed(content, path, data.draw(JSON), data.draw(st.booleans()))
    works_or_is_refused(json.dumps(content))


@given(st.sampled_from(FILES), st.data())
@settings(deadline=None)
def test_any_text_in_any_place(file, data):
    begin = data.draw(st.integers(0, len(file)))
    end = begin + data.draw(st.integers(0, 20))
    works_or_is_refused(file[:begin] + data.draw(st.text(max_size=20)) + file[end:])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("model") / "tokenizer.json"


@given(file=st.sampled_from(FILES), position=st.integers(0), bit=st.integers(0, 7))
@settings(deadline=None)
def test_any_bit_flipped(path, file, position, bit):
    content = bytearray(file.encode())
    content[position % len(content)] ^= 1 << bit
    path.write_bytes(content)
    try:
        Tokenizer.load(path)
    except ValueError as error:
        assert str(error).startswith(f"llmkern.text.Tokenizer.load: expected '{path}' to be ")


def with_vocabulary(**ids) -> str:
    content = json.loads(FILES[1])
    content["model"]["vocab"] = ids
    return json.dumps(content)


@pytest.mark.parametrize("id", [2, 400_000_000, 2**31, 2**32, 2**64, -1, 1.0, True, "1", None])
def test_an_id_out_of_range_costs_nothing(id, capfd):
    """The library printed 4.3 GB and took 1.7 GB for an id of 4e8, and aborted for 2^31."""
    text = with_vocabulary(**{"<unk>": 0, "a": id})
    assert len(text) < 1200
    with pytest.raises(ValueError, match=r"V = 2, ids that are not 0 to V - 1"):
        Tokenizer.from_json(text)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("id", [2, 400_000_000, 2**31])
def test_an_added_token_out_of_range_costs_nothing(id, capfd):
    content = json.loads(FILES[3])
    content["added_tokens"][0]["id"] = id
    with pytest.raises(ValueError, match="another added_tokens"):
        Tokenizer.from_json(json.dumps(content))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "JSON, got damaged or cut off content"),
        ("[" * 100_000 + "]" * 100_000, "JSON, got damaged or cut off content: maximum recursion"),
        ('{"model": ' * 50_000 + "1" + "}" * 50_000, "maximum recursion"),
        ("9" * 10_000, "JSON, got damaged or cut off content"),
        ("NaN", "a tokenizer, got: no model"),
    ],
)
def test_deep_and_huge_json(text, message):
    with pytest.raises(ValueError, match=f"expected the text to be .*{message}"):
        Tokenizer.from_json(text)


def test_a_huge_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_file, "LARGEST", 100)
    with pytest.raises(ValueError, match=r"a tokenizer of at most 100 bytes, got "):
        Tokenizer.from_json(FILES[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"]["vocab"].pop("Ċ"), "ids that are not 0 to V - 1"),
        (lambda c: c["model"]["merges"].append(["q", "zz"]), "not in the vocabulary"),
        (lambda c: c["model"]["merges"].append(["q"]), "no pair of tokens"),
        (lambda c: c["model"].update(merges="q z"), "no merges"),
        (lambda c: c["model"].update(dropout=0.5), "got one of: model BPE"),
        (lambda c: c["model"]["vocab"].update({"天": 270}), "not made of bytes: '天'"),
        (lambda c: c["model"]["vocab"].update({"": 270}), "not made of bytes: ''"),
        (lambda c: c.update(added_tokens=[]), "not made of bytes: '<"),
        (lambda c: c.update(post_processor={"type": "ByteLevel"}), "'special_tokens'"),
        (lambda c: c["post_processor"]["special_tokens"]["<start>"].update(ids=[999]), "outside"),
        (lambda c: c["post_processor"].update(single=[]), "another post_processor"),
        (lambda c: c.update(normalizer={"type": "StripAccents"}), "got one of: model BPE"),
    ],
)
def test_what_would_change_the_tokens_is_refused(change, message):
    content = json.loads(FILES[3])
    change(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_json(json.dumps(content))
