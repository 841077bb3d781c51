# SPDX-License-Identifier: Apache-2.0
"""Small models and texts for the tests of models, training and the command line."""

import torch
from torch import nn

from llmkern.generation.loop import GenerationMixin
from llmkern.models import LanguageModel
from llmkern.text import Tokenizer

TEXT = "the cat sat on the mat.\nthe dog sat on the log.\na cat and a dog met in the fog.\n" * 12


def tokenizer(kind: str = "char", text: str = TEXT) -> Tokenizer:
    return Tokenizer.train([text], kind=kind)


def token_ids(of: Tokenizer, text: str = TEXT) -> torch.Tensor:
    return torch.tensor(of.encode(text))


def model(vocab_size: int = 23, seed: int = 0, **options) -> LanguageModel:
    """A model of a few thousand parameters, large enough to be far from uniform."""
    torch.manual_seed(seed)
    sizes = {"embedding_dim": 12, "hidden_size": 16, "num_layers": 2, "init_range": 0.6}
    return LanguageModel(vocab_size, **(sizes | options))


def talking_model(kind: str = "char", **options) -> LanguageModel:
    """A model with a tokenizer, in evaluation mode."""
    its_tokenizer = tokenizer(kind)
    talker = model(its_tokenizer.vocab_size, **options).eval()
    talker.tokenizer = its_tokenizer
    return talker


def assert_same_parameters(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """Equal to the bit."""
    mine, theirs = a.state_dict(), b.state_dict()
    assert list(mine) == list(theirs)
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


class Chain(GenerationMixin, nn.Module):
    """Token v is followed by v + 1 with logit 2, by v + 2 with logit 1, by others with 0; counts what it has read."""

    def __init__(self, vocab_size=6, tokenizer=None):
        super().__init__()
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.head = nn.Identity()
        self.read = 0

    def initial_state(self, batch_size):
        return (torch.zeros(1, batch_size, 1),)

    def hidden_states(self, ids, state):
        self.read += ids.numel()
        logits = torch.zeros(*ids.shape, self.vocab_size)
        for jump, logit in ((1, 2.0), (2, 1.0)):
            logits.scatter_(2, ((ids + jump) % self.vocab_size)[..., None], logit)
        return logits, state


def greedy(prompt, model=None, **settings):
    model = model or Chain()
    out = model.generate(prompt, do_sample=False, return_dict_in_generate=True, **settings)
    return out.new_tokens[0]
