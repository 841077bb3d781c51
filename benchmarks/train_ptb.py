# SPDX-License-Identifier: Apache-2.0
"""Zaremba's small model on the Penn Treebank words: llmkern's layers and torch.nn's, same trainer, same seed.

    python benchmarks/train_ptb.py FOLDER [--epochs 1] [--seed 0]

FOLDER holds ptb.train.txt and ptb.valid.txt. Both models start from the same parameters and see the same data, so their
first losses agree to the last bits. Then they part: with learning rate 1 a nudge of 1e-7 to one parameter changes the
loss by 1e-2 within 40 steps. Compare final perplexities over seeds, not digit by digit.
"""

import argparse
import math
import time

import torch

from llmkern.benchmark.training import TorchLanguageModel
from llmkern.cli.presets import PRESETS
from llmkern.models import LanguageModel
from llmkern.text import Tokenizer, language_modeling_splits
from llmkern.training import Trainer, TrainingArguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="the corpus")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    preset = PRESETS["zaremba-small"]
    splits = language_modeling_splits(options.folder)
    tokenizer = Tokenizer.train(splits.train, kind="word")
    train, valid = (torch.tensor(tokenizer.encode(text)) for text in (splits.train, splits.valid))
    settings = {**preset.training, "epochs": options.epochs, "seed": options.seed}

    torch.manual_seed(options.seed)
    ours = LanguageModel(tokenizer.vocab_size, **preset.model)
    peer = TorchLanguageModel(tokenizer.vocab_size, 200, 2)
    peer.load_state_dict(ours.state_dict())
    for name, model in (("llmkern", ours), ("torch.nn", peer)):
        began = time.monotonic()
        trainer = Trainer(model, TrainingArguments(**settings), train, valid)
        perplexities = [math.exp(epoch["valid_loss"]) for epoch in trainer.train().history]
        print(name, [round(p, 2) for p in perplexities], f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
