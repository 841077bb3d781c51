# SPDX-License-Identifier: Apache-2.0
"""generate(): every setting does what its name says, and a wrong one is named."""

import itertools
import types

import pytest
import tokenizers
import torch
from torch import nn

from llmkern.generation.constraints import Constraints
from llmkern.models import GenerationConfig
from llmkern.text import Tokenizer
from tests.models import toys
from tests.models.toys import Chain, greedy


def test_eos_and_its_earliest_place():
    assert greedy([0], eos_token_id=3, max_new_tokens=9) == [1, 2, 3]
    assert greedy([0], eos_token_id=3, min_new_tokens=2, max_new_tokens=9) == [1, 2, 3]
    # With 3 forbidden the second likeliest, 4, follows 2.
    later = greedy([0], eos_token_id=3, min_new_tokens=4, max_new_tokens=20)
    assert later == [1, 2, 4, 5, 0, 1, 2, 3]
    assert greedy([0], eos_token_id=3, max_new_tokens=2) == [1, 2]


def test_finish_reasons():
    tokenizer = toys.tokenizer(text="abcdef")
    rows = Chain(tokenizer=tokenizer).generate(
        [[0], [3]], do_sample=False, eos_token_id=5, stop_strings="c", max_new_tokens=9,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert rows.finish_reasons == ["stop", "eos"]
    assert rows.texts == ["abc", "def"]
    assert rows.prompt_lengths == [1, 1]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"suppress_tokens": [2]}, [1, 3, 4, 5, 0, 1, 3, 4]),
        ({"bad_words_ids": [[2]]}, [1, 3, 4, 5, 0, 1, 3, 4]),
        ({"bad_words_ids": [[2, 3]]}, [1, 2, 4, 5, 0, 1, 2, 4]),
        ({"bad_words_ids": [[1, 2, 3], [5, 0]]}, [1, 2, 4, 5, 1, 2, 4, 5]),
        ({"no_repeat_ngram_size": 1}, [1, 2, 3, 4, 5]),
        ({"no_repeat_ngram_size": 2}, [1, 2, 3, 4, 5, 0, 2, 4]),
    ],
    ids=str,
)
def test_forbidden_tokens_and_sequences(settings, expected):
    assert greedy([0], max_new_tokens=len(expected), **settings) == expected


def test_bad_words_may_begin_in_the_prompt():
    assert greedy([0, 1], bad_words_ids=[[0, 1, 2]], max_new_tokens=2) == [3, 4]
    assert greedy([1], bad_words_ids=[[0, 1, 2]], max_new_tokens=2) == [2, 3]


def test_repetition_penalty_counts_prompt_and_output():
    # Logits 2 and 1: a penalty of 4 makes 1 < 2 / 4 false for the seen first choice.
    assert greedy([1, 0], repetition_penalty=4.0, max_new_tokens=1) == [2]
    assert greedy([0], repetition_penalty=4.0, max_new_tokens=1) == [1]


def test_presence_and_frequency_penalties_count_the_output_alone():
    assert greedy([1, 0], presence_penalty=1.5, max_new_tokens=1) == [1]
    model = Chain(vocab_size=3)
    assert greedy([0], model, max_new_tokens=4) == [1, 2, 0, 1]
    # From 0: 1 has 2 - 1.5 = 0.5, 2 has 1 - 1.5, 0 has -1.5.
    assert greedy([0], model, presence_penalty=1.5, max_new_tokens=4) == [1, 2, 0, 1]
    # The second visit finds 1 written once, 2 once, 0 once: 0.9 off for each does not change the order;
    # a third visit of 1 costs 1.8, as of 2 and 0.
    out = greedy([0], model, frequency_penalty=0.9, max_new_tokens=6)
    assert out == [1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [({"top_k": 1}, {1}), ({"top_k": 2}, {1, 2}), ({"top_p": 0.4}, {1}), ({"min_p": 0.3}, {1, 2})],
    ids=str,
)
def test_filters_reach_the_sampler(settings, allowed):
    first = Chain().generate([[0]] * 40, seed=list(range(40)), max_new_tokens=1, **settings)[:, 1]
    assert set(first.tolist()) == allowed


def test_low_temperature_is_nearly_greedy_and_high_is_not():
    cold = Chain().generate([[0]] * 40, seed=list(range(40)), max_new_tokens=1, temperature=0.05)
    hot = Chain().generate([[0]] * 40, seed=list(range(40)), max_new_tokens=1, temperature=50.0)
    assert set(cold[:, 1].tolist()) == {1}
    assert len(set(hot[:, 1].tolist())) == 6


def test_stop_strings_may_span_tokens():
    model = toys.talking_model("word")
    model.generate("the cat", max_new_tokens=5)
    chain = Chain(vocab_size=6, tokenizer=toys.tokenizer(text="abcdef"))
    assert greedy([0], chain, stop_strings=["zz", "de"], max_new_tokens=20) == [1, 2, 3, 4]
    # The prompt does not stop what follows it.
    assert greedy([2, 3], chain, stop_strings="cd", max_new_tokens=8) == [4, 5, 0, 1, 2, 3]


def test_stop_strings_may_begin_in_the_prompt():
    chain = Chain(vocab_size=6, tokenizer=toys.tokenizer(text="abcdef"))
    assert greedy([1, 2], chain, stop_strings="bcd", max_new_tokens=8) == [3]
    assert greedy([0, 1, 2], chain, stop_strings="abcdef", max_new_tokens=8) == [3, 4, 5]


STOP_PIECES = ("st", "op", "sto", "pper", "las", "topper", "s", "to", "pped", "at", "a", "p", "o")


@pytest.mark.parametrize("prompt_length", [1, 2])
def test_stop_strings_end_where_transformers_ends(prompt_length):
    """Every text of three tokens, its beginning a prompt: one criterion, the other, the same answer."""
    transformers = pytest.importorskip("transformers")
    words = {piece: i for i, piece in enumerate((*STOP_PIECES, "abcdef"))}  # it needs the last
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    backend.decoder = tokenizers.decoders.Fuse()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    ours = types.SimpleNamespace(
        kind="jieba", visible_forms=lambda ids: [STOP_PIECES[id] for id in ids]
    )
    for stops in (["stop"], ["opp", "sat"], ["p", "tost"]):
        constraints = Constraints(GenerationConfig(stop_strings=stops), ours)
        criterion = transformers.StopStringCriteria(theirs, stops)
        texts = list(itertools.product(range(len(STOP_PIECES)), repeat=3))
        expected = criterion(torch.tensor(texts), None).tolist()
        got = [
            constraints.finish_reason(list(ids[:prompt_length]), list(ids[prompt_length:]))
            for ids in texts
        ]
        assert got == ["stop" if stop else None for stop in expected]
        assert 0 < sum(expected) < len(texts)


def test_tokens_without_text_do_not_hide_a_stop_string():
    tokenizer = Tokenizer.train("ab", kind="char", special_tokens=("<bos>", "<pad>"))
    constraints = Constraints(GenerationConfig(stop_strings="ab"), tokenizer)
    assert constraints.finish_reason([2], [0] * 30 + [3]) == "stop"
    assert constraints.finish_reason([2, 3], [0] * 30) is None


@pytest.mark.parametrize("kind", ["char", "word", "jieba", "bpe"])
def test_an_empty_prompt_has_a_beginning(kind):
    model = toys.talking_model(kind)
    result = model.generate("", max_new_tokens=3, seed=1, return_dict_in_generate=True)
    assert result.sequences[0, 0] == model.tokenizer.start_id
    assert result.prompt_lengths == [1]


def test_unknown_characters_of_a_prompt():
    model = toys.talking_model("char")
    known = model.generate("the cat", max_new_tokens=5, seed=1)
    assert model.generate("tQhe cZat", max_new_tokens=5, seed=1, unknown="drop") == known
    for unknown in (None, "error", "replace"):
        with pytest.raises(ValueError, match=r"got 'Q' \(U\+0051\) at position 1, not among the"):
            model.generate("tQhe cat", unknown=unknown)
    with pytest.raises(ValueError, match=r"unknown to be one of \('error', 'drop', 'replace'\)"):
        model.generate("the", unknown="skip")


def test_unknown_words_of_a_prompt():
    model = toys.talking_model("word")

    def prompt(text, **options):
        result = model.generate(text, max_new_tokens=1, return_dict_in_generate=True, **options)
        return result.sequences[0, :-1].tolist()

    unk = model.tokenizer.unk_id
    the, cat = model.tokenizer.encode("the cat")
    assert prompt("the quark cat") == prompt("the quark cat", unknown="replace") == [the, unk, cat]
    assert prompt("the quark cat", unknown="drop") == [the, cat]
    with pytest.raises(ValueError, match="got 'quark' at position 1, not among the"):
        prompt("the quark cat", unknown="error")


def test_settings_from_a_config_with_changes():
    config = GenerationConfig(max_new_tokens=4, do_sample=False)
    assert Chain().generate([0], config).tolist() == [[0, 1, 2, 3, 4]]
    assert Chain().generate([0], config, max_new_tokens=1).tolist() == [[0, 1]]
    with pytest.raises(TypeError, match="num_beams"):
        Chain().generate([0], num_beams=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "expected max_new_tokens to be an int >= 1, got 0"),
        ({"max_new_tokens": 2.0}, "expected max_new_tokens to be an int >= 1, got 2.0"),
        (
            {"min_new_tokens": 200},
            "expected min_new_tokens to be at most max_new_tokens = 100, got 200",
        ),
        ({"temperature": -0.5}, r"expected temperature in \[0, inf\), got -0.5"),
        ({"temperature": float("nan")}, "expected temperature .* got nan"),
        ({"temperature": float("inf")}, "expected temperature .* got inf"),
        ({"top_k": -1}, "expected top_k to be a whole number >= 0, got -1"),
        ({"top_p": 0.0}, r"expected top_p in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"expected top_p in \(0, 1\], got 1.5"),
        ({"min_p": -0.1}, r"expected min_p in \[0, 1\], got -0.1"),
        ({"typical_p": 0.0}, "expected typical_p"),
        (
            {"repetition_penalty": 0.0},
            r"expected repetition_penalty in \(0, 3.4e38\], got 0.0",
        ),
        ({"num_return_sequences": 0}, "expected num_return_sequences to be an int >= 1, got 0"),
        (
            {"bad_words_ids": [[1], []]},
            "expected bad_words_ids to be sequences of at least one token",
        ),
        (
            {"bad_words_ids": [[1, 99]]},
            r"expected bad_words_ids to be tokens in .* \[0, 6\), got 99",
        ),
        ({"eos_token_id": 6}, r"expected eos_token_id to be tokens in \[0, V\) = \[0, 6\), got 6"),
        ({"suppress_tokens": [-1]}, "expected suppress_tokens .* got -1"),
        ({"stop_strings": ""}, "expected stop_strings to be texts that are not empty"),
        ({"stop_strings": "x"}, "stop_strings need a model with a tokenizer"),
        ({"seed": [1, 2]}, "expected one seed or 1, one for each prompt, got 2"),
        ({"suppress_tokens": range(6)}, "row 0 after 0 new tokens, got all of them forbidden"),
        ({"no_repeat_ngram_size": 1}, "after 5 new tokens, got all of them forbidden"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Chain().generate([0], **settings)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], ValueError, "expected at least one prompt, got none"),
        ([[]], ValueError, "expected a prompt of at least one token, got none in row 0"),
        ([[1], []], ValueError, "got none in row 1"),
        (torch.zeros(0, 2, dtype=torch.int64), ValueError, "at least one prompt, got none"),
        (
            [[1, 2], [3, 6]],
            IndexError,
            r"expected ids in \[0, V\) = \[0, 6\), got 6 in row 1 at position 1",
        ),
        ("text", ValueError, "the model has no tokenizer"),
        (torch.zeros(2), ValueError, "an integer dtype, got .* torch.float32"),
        (torch.zeros(1, 1, 1, dtype=torch.int64), ValueError, r"\[1, 1, 1\]"),
    ],
    ids=str,
)
def test_wrong_prompts_are_named(prompt, error, message):
    with pytest.raises(error, match=message):
        Chain().generate(prompt)


def test_an_unknown_character_is_named():
    model = toys.talking_model()
    with pytest.raises(ValueError, match=r"'Q'.*at position 4"):
        model.generate("the Q")
    known = toys.tokenizer().tokens
    with_unknown = type(model.tokenizer).train(
        [toys.TEXT], kind="char", special_tokens=("<unk>",), vocab_size=len(known)
    )
    model = toys.model(len(known)).eval()
    model.tokenizer = with_unknown
    with pytest.raises(
        ValueError, match=rf"got 'Q' \(U\+0051\) at position 4, not among the {len(known)}"
    ):
        model.generate("the Q")


def test_broken_parameters_are_named():
    model = toys.model()
    nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(ValueError, match="row 0 after 0 new tokens, got NaN logits"):
        model.generate([1])
