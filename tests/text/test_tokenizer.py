# SPDX-License-Identifier: Apache-2.0
"""Tokenizer: vocabulary order, the meaning of each kind, what is refused and how."""

import _thread
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkern.text import Tokenizer, backends, segmentation

CHINESE = "今天天气非常好，我们去公园散步。\n明天下雨，我们在家看书。\n今天的晚饭非常好吃。\n"
ENGLISH = "It's raining; it rains  and pours.\n\nThe   old man is snoring.\n"
MIXED = ENGLISH + CHINESE
KINDS = ("char", "word", "jieba", "bpe")
UNICODE = st.text(st.characters(codec="utf-8"))


def by_frequency(counts: Counter) -> tuple[str, ...]:
    return tuple(sorted(counts, key=lambda token: (-counts[token], token)))


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1))
def test_char_vocabulary_is_by_frequency_then_code_point(texts):
    counts = Counter("".join(texts))
    assert Tokenizer.train(texts, kind="char").tokens == by_frequency(counts)
    special = Tokenizer.train(texts, kind="char", special_tokens=("<eos>", "<unk>"))
    assert special.tokens == ("<eos>", "<unk>", *by_frequency(counts))


WORDS = st.text(st.sampled_from("ab天 \t\r\n"), min_size=1, max_size=40).filter(str.strip)


@given(WORDS)
def test_word_against_a_plain_implementation(text):
    tokenizer = Tokenizer.train([text, "<unk> <eos> <unk>\n"], kind="word")
    assert tokenizer.tokens == ("<unk>", "<eos>", *by_frequency(Counter(text.split())))
    lines = [line.split() for line in text.split("\n")]
    expected = [word for line in lines for word in (*line, "<eos>")][:-1]
    assert [tokenizer.token(id) for id in tokenizer.encode(text)] == expected
    assert tokenizer.decode(tokenizer.encode(text)) == "\n".join(map(" ".join, lines))


@given(UNICODE)
def test_char_round_trip(text):
    tokenizer = Tokenizer.train(text + "x", kind="char")
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.train(MIXED, kind="bpe", vocab_size=300, special_tokens=("<pad>", "<eos>"))


@given(text=UNICODE | st.text(st.sampled_from(MIXED + "<eos>")))
def test_bpe_round_trip(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


def test_bpe_vocabulary(bpe):
    assert bpe.tokens[:3] == ("<pad>", "<eos>", "!")
    assert (bpe.pad_id, bpe.eos_id, bpe.unk_id, bpe.vocab_size) == (0, 1, None, 300)
    assert len(bpe.encode(MIXED)) < 0.6 * len(MIXED.encode())
    assert Tokenizer.train("ab", kind="bpe").vocab_size == 257


@given(st.text(st.sampled_from(MIXED)))
def test_jieba_round_trip_of_known_words(text):
    tokenizer = Tokenizer.train([text, "今天"], kind="jieba")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.tokens[0] == "<unk>"


def test_jieba_words():
    tokenizer = Tokenizer.train(CHINESE, kind="jieba")
    assert [tokenizer.token(id) for id in tokenizer.encode("我们明天去公园\n")] == [
        *("我们", "明天", "去", "公园", "\n")
    ]
    assert tokenizer.decode(tokenizer.encode("我们明天去北京")) == "我们明天去<unk>"
    assert tokenizer.tokens[1:3] == ("\n", "。")


PIECES = st.text(st.sampled_from("ab .'\n\r\t\u3000天气e\u0301\u1100\u1161Ａﬁ\u0345é"), max_size=80)


@given(PIECES, st.sampled_from(("char", "word", "bpe")), st.sampled_from((None, "NFC", "NFKC")))
def test_pieces_give_the_ids_of_the_whole_text(text, kind, normalization):
    tokenizer = Tokenizer.train(
        text + " x", kind=kind, normalization=normalization, lowercase=normalization is not None
    )
    whole = tokenizer.backend.encode(text).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation, "PIECE_LENGTH", 2)
        assert tokenizer.encode(text) == whole


LONG_RUNS = st.lists(
    st.tuples(st.sampled_from("a天1.! \n\u3042\u0301éÉ\x1c'"), st.integers(1, 150)), max_size=8
).map(lambda runs: "".join(character * count for character, count in runs))


@given(LONG_RUNS, st.booleans(), st.sampled_from((None, "NFC", "NFKC")))
@settings(deadline=None)
def test_bpe_pieces_of_long_runs_give_the_ids_of_the_whole_text(text, lowercase, normalization):
    tokenizer = Tokenizer.train(
        text + "x", kind="bpe", normalization=normalization, lowercase=lowercase, vocab_size=280
    )
    whole = tokenizer.backend.encode(text).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation, "PIECE_LENGTH", 20)
        assert tokenizer.encode(text) == whole
        again = Tokenizer.train(
            text + "x", kind="bpe", normalization=normalization, lowercase=lowercase, vocab_size=280
        )
    assert again.tokens == tokenizer.tokens
    if normalization is None and not lowercase:
        assert tokenizer.decode(whole) == text


@pytest.mark.parametrize("text", ["x" * 300, "天" * 300, "7" * 300, "!" * 300, " " * 300 + "a"])
def test_no_run_of_bpe_is_longer_than_64_characters(text):
    """Learning merges takes time quadratic in the length of a run: a megabyte of letters took minutes."""
    tokenizer = Tokenizer.train("a", kind="bpe")
    runs = [span for _, span in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]
    assert max(end - start for start, end in runs) <= 65
    assert "".join(text[start:end] for start, end in runs) == text
    assert len(runs) in (5, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_long_text_without_white_space_is_encoded_in_pieces(kind, monkeypatch):
    """One encoding of a megabyte takes half a gigabyte."""
    monkeypatch.setattr(segmentation, "PIECE_LENGTH", 50)
    text = "今天天气非常好" * 200
    tokenizer = Tokenizer.train(text, kind=kind)
    done = []
    ids = tokenizer.encode_array(text, done.append)
    assert ids.dtype == np.int32 and ids.tolist() == tokenizer.encode(text)
    assert done[-1] == len(text) and (kind == "word" or len(done) > 1)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_progress_is_told_from_the_first_piece(kind, monkeypatch):
    monkeypatch.setattr(segmentation, "PIECE_LENGTH", 10)
    text = "今天天气非常好，\n" * 50
    for texts in (text, [text[:200], text[200:]]):
        done = []
        tokenizer = Tokenizer.train(texts, kind=kind, on_progress=done.append)
        assert done == sorted(done) and 0 < done[0] < 50 and done[-1] == len(text)
    done = []
    tokenizer.encode_array(text, done.append)
    assert done == sorted(done) and 0 < done[0] <= len(text) / 2 and done[-1] == len(text)


def test_ctrl_c_ends_the_learning_of_merges(monkeypatch):
    """The library hears nothing while it learns: the thread that waits for it must."""
    learning, over = threading.Event(), threading.Event()

    def learn(backend, texts, trainer):
        list(texts)
        learning.set()
        over.wait(60)

    def interrupt():
        learning.wait(60)
        _thread.interrupt_main()

    monkeypatch.setattr(backends, "_learn", learn)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # workers of a parallel run ignore it
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            Tokenizer.train("some text", kind="bpe")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not over.is_set()
    over.set()


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_ends_the_reading_of_texts(kind):
    def texts():
        yield "some text"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tokenizer.train(texts(), kind=kind)


def test_an_error_of_the_library_while_it_learns_comes_through(monkeypatch):
    def fail(backend, texts, trainer):
        raise MemoryError("too many merges")

    monkeypatch.setattr(backends, "_learn", fail)
    with pytest.raises(MemoryError, match="too many merges"):
        Tokenizer.train(["some text"] * 1000, kind="bpe")


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_a_corpus_takes_at_most_ten_bytes_a_character(kind, monkeypatch):
    """The text itself, of one to four bytes a character, comes on top."""
    monkeypatch.setattr(segmentation, "PIECE_LENGTH", 512)
    text = "a b c d e\n" * (1 << 15)
    tokenizer = Tokenizer.train(
        text[: 1 << 12], kind=kind, vocab_size=300 if kind == "bpe" else None
    )
    tracemalloc.start()
    try:
        ids = tokenizer.encode_array(text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ids.nbytes < peak <= 6 * len(text)


@pytest.mark.parametrize("kind", KINDS)
def test_normalization_and_case(kind):
    options = {"kind": kind, "normalization": "NFKC", "lowercase": True}
    tokenizer = Tokenizer.train("Ｎｏ １ café", **options)
    assert tokenizer.decode(tokenizer.encode("ＮＯ １ cafe\u0301")) == "no 1 café"
    plain = Tokenizer.train("No 1 café no", kind=kind)
    assert plain.decode(plain.encode("No 1 café")) == "No 1 café"


def test_lowercase_is_normal_again():
    """J with a caron exists only as two code points; its lower case is one."""
    tokenizer = Tokenizer.train("J\u030c", kind="char", normalization="NFC", lowercase=True)
    assert tokenizer.tokens == ("\u01f0",)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens(kind):
    """They lead the vocabulary, in the order given, and leave no trace in the text."""
    names = ("<bos>", "<eos>", "<pad>") if kind == "bpe" else ("<bos>", "<eos>", "<pad>", "<unk>")
    tokenizer = Tokenizer.train("a b", kind=kind, special_tokens=names)
    assert tokenizer.tokens[: len(names)] == names
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id)
    assert ids == (0, 1, 2, None if kind == "bpe" else 3)
    text = tokenizer.encode("a b")
    newline = "\n" if kind == "word" else ""
    assert tokenizer.decode([0, *text, 2, 1, 2]) == "a b" + newline


@pytest.mark.parametrize("kind", ["char", "jieba", "bpe"])
def test_text_never_becomes_a_special_token(kind):
    text = "<eos> <pad>a"
    tokenizer = Tokenizer.train(text, kind=kind, special_tokens=("<pad>", "<eos>"))
    assert not {tokenizer.eos_id, tokenizer.pad_id} & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_word_without_special_tokens():
    tokenizer = Tokenizer.train("a\nb a", kind="word", special_tokens=())
    assert tokenizer.tokens == ("a", "b")
    assert tokenizer.encode("a\nb\n") == [0, 1]


def test_word_special_tokens_in_the_text_are_themselves():
    tokenizer = Tokenizer.train("the <unk> of <unk>\n", kind="word")
    assert tokenizer.encode("a <unk> x<unk> <eos>") == [0, 0, 0, 1]


@pytest.mark.parametrize("kind", ["char", "word", "jieba"])
def test_vocabulary_limits(kind):
    text = "a a a b b c "
    tokenizer = Tokenizer.train(text, kind=kind, vocab_size=4, special_tokens=("<unk>",))
    space = () if kind == "word" else (" ",)
    assert tokenizer.tokens == (("<unk>", *space, "a", "b", "c")[:4])
    tokenizer = Tokenizer.train(text, kind=kind, min_frequency=3, special_tokens=("<unk>",))
    assert tokenizer.tokens == ("<unk>", *space, "a")


def test_unknown_tokens_are_refused_dropped_or_replaced():
    for kind, text, unknown in (
        ("char", "aXc", "X"),
        ("word", "a X c", "X"),
        ("jieba", "aXc", None),
    ):
        known = "a c" if kind == "word" else "ac" if kind == "char" else "a.c"
        with_unk = Tokenizer.train(known, kind=kind, special_tokens=("<unk>",))
        without = Tokenizer.train(known, kind=kind, special_tokens=())
        if unknown is None:
            continue
        assert with_unk.encode(text, "drop") == with_unk.encode(known)
        assert without.encode(text, "drop") == without.encode(known)
        assert with_unk.encode(text, "replace") == with_unk.encode(text)
        for tokenizer, way in ((with_unk, "error"), (without, "replace"), (without, None)):
            with pytest.raises(ValueError, match=r"Tokenizer\.encode: .*got 'X'.* at position 1; "):
                tokenizer.encode(text, way)
    with pytest.raises(ValueError, match=r"unknown to be one of \('error', .*got 'skip'"):
        with_unk.encode("a", "skip")
    bpe = Tokenizer.train("a", kind="bpe")
    assert bpe.decode(bpe.encode("天", "drop")) == "天"


@pytest.mark.parametrize(
    ("kind", "text", "special_tokens", "start"),
    [
        ("char", "b\na", None, "\n"),
        ("char", "ba", None, "b"),
        ("char", "b\na", ("<bos>", "<eos>"), "<bos>"),
        ("char", "ba", ("<eos>",), "<eos>"),
        ("word", "the cat\nsat", None, "<eos>"),
        ("word", "the cat", (), "the"),
        ("jieba", "今天\n天气", None, "\n"),
        ("jieba", "今天天气", None, "今天天气"),
        ("bpe", "今天\n天气", None, "Ċ"),
        ("bpe", "th", None, "th"),
        ("bpe", "今天", ("<bos>",), "<bos>"),
        ("bpe", "今天", ("<eos>",), "<eos>"),
    ],
)
def test_there_is_always_a_beginning(kind, text, special_tokens, start):
    tokenizer = Tokenizer.train([text], kind=kind, special_tokens=special_tokens)
    assert tokenizer.token(tokenizer.start_id) == start
    assert Tokenizer.from_json(tokenizer.to_json()).start_id == tokenizer.start_id


def test_unknown_with_unk():
    tokenizer = Tokenizer.train("abc", kind="char", special_tokens=("<unk>",))
    assert tokenizer.encode("aXc") == [1, 0, 3]
    assert tokenizer.decode([1, 0, 3]) == "a<unk>c"


@pytest.mark.parametrize(
    ("kind", "text", "found"),
    [
        ("char", "fine €!", r"'€' \(U\+20AC\) at position 5"),
        ("char", "x" * 20_000 + "\n天", r"'天' \(U\+5929\) at position 20001"),
        ("word", "fine weather\n today", "'today' at position 2"),
        ("jieba", "fine weather 今天", "'今天' at position 4"),
    ],
)
def test_unknown_without_unk_is_refused_with_its_position(kind, text, found):
    tokenizer = Tokenizer.train(
        "fine weather\n xx" + "x" * 20_000 + "!", kind=kind, special_tokens=()
    )
    with pytest.raises(
        ValueError, match=rf"Tokenizer\.encode: expected tokens .* got {found}; train"
    ):
        tokenizer.encode(text)


def test_texts_are_one_corpus_however_divided():
    whole = Tokenizer.train(MIXED, kind="bpe", vocab_size=280)
    lines = Tokenizer.train(MIXED.splitlines(keepends=True), kind="word")
    assert lines.tokens == Tokenizer.train(iter([MIXED]), kind="word").tokens
    assert whole.tokens == Tokenizer.train([MIXED], kind="bpe", vocab_size=280).tokens


def test_training_is_the_same_in_another_process():
    """With other hash seeds and without the library's threads."""
    program = (
        "import sys, llmkern.text as t\n"
        "for kind in ('char', 'word', 'jieba', 'bpe'):\n"
        "    print(t.Tokenizer.train(sys.argv[1], kind=kind).to_json(), end='')\n"
    )
    run = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", program, MIXED],
        env={"PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    here = [Tokenizer.train(MIXED, kind=kind).to_json() for kind in KINDS]
    assert run.stdout == "".join(here)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "character"}, ValueError, "kind to be one of .*'bpe'.*got 'character'"),
        ({"kind": "char", "vocab_size": 2}, ValueError, "vocab_size >= 3, .*got vocab_size 2"),
        ({"kind": "word", "vocab_size": 2}, ValueError, "vocab_size >= 3, got 2"),
        ({"kind": "bpe", "vocab_size": 255}, ValueError, "vocab_size >= 256, got 255"),
        ({"kind": "word", "min_frequency": 0}, ValueError, "min_frequency >= 1, got 0"),
        ({"kind": "char", "min_frequency": 2}, ValueError, "'<unk>' among special_tokens .*2"),
        ({"kind": "word", "min_frequency": 9}, ValueError, "at least 9 times, got none"),
        ({"kind": "bpe", "special_tokens": ["<unk>"]}, ValueError, "no '<unk>' for bpe"),
        ({"kind": "char", "special_tokens": ["<s>"]}, ValueError, r"ones of .*got \('<s>',\)"),
        ({"kind": "char", "special_tokens": ["<eos>", "<eos>"]}, ValueError, "different ones"),
        ({"kind": "char", "normalization": "nfc"}, ValueError, r"one of \('NFC'.*got 'nfc'"),
        ({"kind": "char", "texts": []}, ValueError, "at least 1 times, got none"),
        ({"kind": "word", "texts": [" \t "]}, ValueError, "at least 1 times, got none"),
        ({"kind": "char", "texts": ["a", b"b"]}, TypeError, "text as a str, got bytes"),
        ({"kind": "jieba", "texts": ["a", 5]}, TypeError, "text as a str, got int"),
        ({"kind": "bpe", "texts": ["a\ud800"]}, ValueError, r"surrogate U\+D800 at position 1"),
    ],
)
def test_train_refuses(options, error, message):
    with pytest.raises(error, match=rf"llmkern\.text\.Tokenizer\.train: expected .*{message}"):
        Tokenizer.train(
            **{"texts": ["a", "b c"], **options}
            if "texts" in options
            else {"texts": ["abc"] if options["kind"] != "word" else ["a b"], **options}
        )


def test_an_error_of_the_callers_iterator_comes_through():
    def texts():
        yield "some text"
        raise KeyError("row 7")

    with pytest.raises(KeyError, match="row 7"):
        Tokenizer.train(texts(), kind="char")


def test_encode_and_decode_refuse():
    tokenizer = Tokenizer.train("abc", kind="char")
    with pytest.raises(TypeError, match=r"Tokenizer\.encode: expected text as a str, got list"):
        tokenizer.encode(["a"])
    with pytest.raises(ValueError, match=r"Tokenizer\.encode: .*surrogate U\+DFFF at position 2"):
        tokenizer.encode("ab\udfff")
    with pytest.raises(IndexError, match=r"decode: expected ids in \[0, 3\), got 3 at position 1"):
        tokenizer.decode([0, 3])
    with pytest.raises(IndexError, match=r"got -1 at position 0"):
        tokenizer.decode(torch.tensor([-1, 0]))
    with pytest.raises(IndexError, match=r"Tokenizer\.token: expected ids in \[0, 3\), got 5"):
        tokenizer.token(5)
    for ids in ([0.5], torch.zeros(2), torch.zeros(2, 2, dtype=torch.int64), ["a"], 3):
        with pytest.raises(TypeError, match=r"Tokenizer\.decode: expected integers, got: "):
            tokenizer.decode(ids)


def test_decode_takes_lists_tensors_and_iterators():
    tokenizer = Tokenizer.train("abc", kind="char")
    forms = ([2, 1, 0], torch.tensor([2, 1, 0]), iter((2, 1, 0)), list(torch.tensor([2, 1, 0])))
    assert [tokenizer.decode(ids) for ids in forms] == ["cba"] * 4


def test_empty_text():
    for kind in KINDS:
        tokenizer = Tokenizer.train("a", kind=kind)
        assert tokenizer.encode("") == []
        assert tokenizer.decode([]) == ""


def test_look_up_and_repr():
    tokenizer = Tokenizer.train("to be or not to be", kind="word")
    assert (tokenizer.id("not"), tokenizer.token(4), tokenizer.id("question")) == (4, "not", None)
    assert repr(tokenizer) == "Tokenizer(kind='word', vocab_size=6, unk_id=0, eos_id=1)"
    assert isinstance(tokenizer.backend, tokenizers.Tokenizer)


@pytest.mark.parametrize(
    ("package", "kind"), [("tokenizers", "char"), ("tokenizers", "bpe"), ("jieba", "jieba")]
)
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, package, kind):
    segmentation._segmenter.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"llmkern: expected the package '{package}' .*pip install 'llmkern\[text\]'"
    with pytest.raises(ImportError, match=message):
        Tokenizer.train("text", kind=kind)
