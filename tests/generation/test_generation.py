# SPDX-License-Identifier: Apache-2.0
"""generate(): a row's tokens are its own, the seed decides them, and it is fed and shown token by token."""

import pytest
import torch

from llmkern import ops
from llmkern.models import TextStreamer
from tests.models import toys
from tests.models.toys import Chain, greedy

PROMPTS = [[3], [5, 1, 7, 2, 9], [4, 4], [5, 1, 7, 2, 9, 8, 8, 1, 0, 2, 2, 11, 12], [1, 2]]


def test_greedy_takes_the_likeliest():
    assert greedy([0], max_new_tokens=7) == [1, 2, 3, 4, 5, 0, 1]
    assert Chain().generate([[0]], temperature=0, max_new_tokens=3).tolist() == [[0, 1, 2, 3]]


def test_the_prompt_is_read_once_and_each_token_once():
    model = Chain()
    model.generate([0, 1, 2], max_new_tokens=5)
    assert model.read == 3 + 4


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.9, "top_p": 0.95}, {"do_sample": False}], ids=str
)
@pytest.mark.parametrize("layers", [1, 2])
def test_a_row_is_the_same_alone_and_in_any_batch(sampling, layers):
    model = toys.model(num_layers=layers, hidden_size=33).eval()
    seeds = [10, 11, 12, 13, 14]
    settings = sampling | {
        "max_new_tokens": 30,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.1,
    }
    settings |= {"eos_token_id": 6, "return_dict_in_generate": True}
    alone = [model.generate(p, seed=s, **settings) for p, s in zip(PROMPTS, seeds, strict=True)]
    together = model.generate(PROMPTS, seed=seeds, **settings)
    assert together.new_tokens == [row.new_tokens[0] for row in alone]
    assert together.finish_reasons == [row.finish_reasons[0] for row in alone]
    assert len({tuple(row) for row in together.new_tokens}) == len(PROMPTS)
    order = [3, 0, 4, 1, 2]
    shuffled = model.generate(
        [PROMPTS[i] for i in order], seed=[seeds[i] for i in order], **settings
    )
    assert shuffled.new_tokens == [together.new_tokens[i] for i in order]


def test_a_rows_logits_are_the_same_bits_alone_and_in_any_batch(monkeypatch):
    """A draw hides a last bit that differs nearly always, and so the test above would."""
    model = toys.model(vocab_size=523, hidden_size=131).eval()
    sample, seen = ops.sample, []

    def spy(logits, **settings):
        seen.append(logits.clone())
        return sample(logits, **settings)

    monkeypatch.setattr(ops, "sample", spy)
    model.generate(PROMPTS, seed=1, max_new_tokens=6)
    together = torch.stack(seen, 1)
    for row, prompt in enumerate(PROMPTS):
        seen.clear()
        model.generate(prompt, seed=1, max_new_tokens=6)
        assert torch.equal(together[row], torch.cat(seen))


def test_threads_change_nothing(on_threads):
    model = toys.model(vocab_size=1000, hidden_size=64).eval()

    def write():
        return model.generate(PROMPTS, seed=3, max_new_tokens=20)

    assert torch.equal(on_threads(1, write), on_threads(2, write))


def test_the_seed_decides():
    model = toys.talking_model()
    text = model.generate("the cat", seed=1, max_new_tokens=40)
    assert text.startswith("the cat")
    assert len(text) == 47
    assert model.generate("the cat", seed=1, max_new_tokens=40) == text
    assert model.generate("the cat", seed=2, max_new_tokens=40) != text


def test_without_a_seed_torchs_generator_decides():
    model = toys.talking_model()
    torch.manual_seed(5)
    first, second = (model.generate("a", max_new_tokens=40) for _ in range(2))
    assert first != second
    torch.manual_seed(5)
    assert model.generate("a", max_new_tokens=40) == first


def test_sequence_j_of_a_prompt_uses_seed_plus_j():
    model = toys.talking_model()
    texts = model.generate(["the ", "a d"], seed=7, num_return_sequences=3, max_new_tokens=20)
    again = [
        model.generate(prompt, seed=7 + j, max_new_tokens=20)
        for prompt in ("the ", "a d")
        for j in range(3)
    ]
    assert texts == again
    assert len(set(texts)) == 6


def test_what_goes_in_decides_what_comes_out():
    model = toys.talking_model()
    assert isinstance(model.generate("the", max_new_tokens=2), str)
    assert isinstance(model.generate("the", max_new_tokens=2, num_return_sequences=2), list)
    assert isinstance(model.generate(["the"], max_new_tokens=2), list)
    assert model.generate([1, 2], max_new_tokens=2).shape == (1, 4)
    assert model.generate(torch.tensor([1, 2]), max_new_tokens=2).shape == (1, 4)
    ids = model.generate(torch.tensor([[1, 2], [3, 4]]), max_new_tokens=2)
    assert ids.shape == (2, 4)
    assert ids[:, :2].tolist() == [[1, 2], [3, 4]]
    # Usable in training afterwards: no inference tensor.
    model.loss(ids[:, :-1], ids[:, 1:])[0].backward()


def test_generation_leaves_the_mode_alone():
    model = toys.model(dropout=0.5).train()
    ids = [model.generate([1, 2], seed=1, max_new_tokens=10) for _ in range(2)]
    assert torch.equal(*ids)  # no dropout meanwhile
    assert model.training


def test_shorter_rows_are_filled_up():
    rows = Chain().generate([[0], [2, 3]], do_sample=False, eos_token_id=5, max_new_tokens=9)
    assert rows.tolist() == [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5, -1, -1]]
    rows = Chain().generate([[0], [3]], do_sample=False, eos_token_id=[5, 9 % 6], pad_token_id=0)
    assert rows.tolist() == [[0, 1, 2, 3], [3, 4, 5, 0]]


def test_an_empty_prompt_starts_like_a_new_line():
    model = toys.talking_model()
    assert model.generate("", seed=1, max_new_tokens=5) == model.generate(
        "\n", seed=1, max_new_tokens=5
    )
    words = toys.talking_model("word")
    assert words.generate("", seed=1, max_new_tokens=5) == words.generate(
        "\n", seed=1, max_new_tokens=5
    )
    assert greedy([[]], bos_token_id=2, max_new_tokens=2) == [3, 4]


def test_the_streamer_sees_every_token_once():
    class Recorder:
        def __init__(self):
            self.values = []

        def put(self, value):
            self.values.append(value.tolist())

        def end(self):
            self.values.append("end")

    recorder = Recorder()
    Chain().generate([0, 1], do_sample=False, max_new_tokens=3, streamer=recorder)
    assert recorder.values == [[[0, 1]], [2], [3], [4], "end"]


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_streamed_text_is_the_returned_text(kind, capsys):
    model = toys.talking_model(kind)
    pieces = []
    for skip_prompt in (False, True):
        streamer = TextStreamer(model.tokenizer, skip_prompt, pieces.append)
        text = model.generate("the cat", seed=2, max_new_tokens=20, streamer=streamer)
        assert len(pieces) > 3
        assert "".join(pieces) == (text.removeprefix("the cat") if skip_prompt else text)
        pieces.clear()
    model.generate("the", seed=2, max_new_tokens=20, streamer=TextStreamer(model.tokenizer))
    assert capsys.readouterr().out == model.generate("the", seed=2, max_new_tokens=20)


def test_one_streamer_is_for_one_row():
    with pytest.raises(ValueError, match="expected one row for a streamer, got 2"):
        Chain().generate([[0], [1]], streamer=TextStreamer(toys.tokenizer()))
