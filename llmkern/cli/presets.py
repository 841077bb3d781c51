# SPDX-License-Identifier: Apache-2.0
"""Named settings for ``llmkern train --preset``. Options on the command line go over them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A named configuration: options of the tokenizer, of LanguageModel and of TrainingArguments."""

    tokenizer: dict[str, Any]
    model: dict[str, Any]
    training: dict[str, Any]


PRESETS: dict[str, Preset] = {
    # Zaremba et al. 2014, "small", on Penn Treebank: validation perplexity about 121, test 115. No dropout.
    "zaremba-small": Preset(
        tokenizer={"kind": "word"},
        model={"embedding_dim": 200, "hidden_size": 200, "num_layers": 2, "init_range": 0.1},
        training={
            "batch_size": 20,
            "bptt": 20,
            "epochs": 13,
            "optimizer": "sgd",
            "learning_rate": 1.0,
            "max_grad_norm": 5.0,
            "lr_schedule": "decay",
            "lr_decay": 0.5,
            "lr_decay_after": 4,
            "loss_reduction": "sum_time",
        },
    ),
    # The defaults of Karpathy's char-rnn (2015), with an embedding in place of one-hot input and without its own
    # way to split the text: its losses on tinyshakespeare are near these, not comparable digit by digit.
    "char-rnn": Preset(
        tokenizer={"kind": "char"},
        model={"embedding_dim": 128, "hidden_size": 128, "num_layers": 2, "init_range": 0.08},
        training={
            "batch_size": 50,
            "bptt": 50,
            "epochs": 50,
            "optimizer": "rmsprop",
            "learning_rate": 2e-3,
            "rmsprop_alpha": 0.95,
            "max_grad_norm": None,
            "max_grad_value": 5.0,
            "lr_schedule": "decay",
            "lr_decay": 0.97,
            "lr_decay_after": 10,
        },
    ),
    # Embedding, one LSTM layer, softmax over at most 10,000 characters: the project's founding example.
    "founding": Preset(
        tokenizer={"kind": "char", "vocab_size": 10_000},
        model={"embedding_dim": 256, "hidden_size": 512, "num_layers": 1},
        training={
            "batch_size": 32,
            "bptt": 32,
            "epochs": 20,
            "optimizer": "adam",
            "learning_rate": 2e-3,
            "max_grad_norm": 1.0,
        },
    ),
}
