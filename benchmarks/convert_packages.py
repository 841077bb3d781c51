# SPDX-License-Identifier: Apache-2.0
"""llmkern.convert on models of other people's packages: same outputs, same losses, time of a training step.

    pip install stanza transformers "gluonts[torch]"
    python benchmarks/convert_packages.py [--rounds 15] [--only PACKAGE] [--save NAME]

Models have the sizes that their packages give them, or the published ones, and random parameters; inputs are random.
Each is trained twice from the same parameters and seeds: as it is, and converted after its optimizer was made. Their
first steps are compared, the later ones timed in turn. Results go to results/local, with --save NAME to results too.
"""

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkern
from llmkern.benchmark import write_document
from llmkern.benchmark.machine import command, machine_facts, software_facts
from llmkern.benchmark.timing import Spread

RESULTS = Path(__file__).parent / "results"
STEPS = 10
# Ten times more makes Encodec unstable: differences in the last bit grow tenfold a step.
LEARNING_RATE = 1e-4

Function = Callable[[nn.Module], Tensor]


class Subject(NamedTuple):
    """A model: what it makes of a fixed batch when it does not train, and the loss it trains on."""

    model: nn.Module
    outputs: Function
    loss: Function


def characters() -> Subject:
    """Stanza's character language model (Akbik et al. 2018) as stanza trains it, on shorter batches."""
    from stanza.models.common.char_model import CharacterLanguageModel
    from stanza.models.common.vocab import CharVocab

    letters = [chr(code) for code in range(32, 127)]
    options = {"char_emb_dim": 100, "char_hidden_dim": 1024, "char_num_layers": 1}
    options |= {"char_dropout": 0.05, "char_unit_dropout": 1e-5, "char_rec_dropout": 0.0}
    model = CharacterLanguageModel(options, {"char": CharVocab([letters])})
    B, T = 32, 100
    ids = torch.randint(4, len(letters), (B, T + 1))

    def logits(model: nn.Module) -> Tensor:
        return model(ids[:, :-1], [T] * B)[2]

    return Subject(
        model, logits, lambda m: F.cross_entropy(logits(m).flatten(0, 1), ids[:, 1:].flatten())
    )


def tokenizer() -> Subject:
    """Stanza's tokenizer: two bidirectional LSTMs over packed sequences, with stanza's own options."""
    from stanza.models.tokenization.model import Tokenizer

    options = {"feat_dim": 5, "rnn_layers": 1, "conv_res": None, "use_mwt": False}
    options |= {"hierarchical": True, "hier_invtemp": 0.5, "tok_noise": 0.02}
    V, B, T = 200, 32, 100
    model = Tokenizer(options, V, 32, 64, dropout=0.33, feat_dropout=0.05)
    ids, features = torch.randint(1, V, (B, T)), torch.randint(2, (B, T, 5)).float()
    lengths = torch.randint(20, T + 1, (B,)).sort(descending=True).values
    lengths[0] = T
    labels = torch.randint(3, (B, T)).masked_fill(torch.arange(T) >= lengths[:, None], -1)

    def scores(model: nn.Module) -> Tensor:
        return model(ids, features, lengths.tolist())

    return Subject(
        model,
        scores,
        lambda m: F.cross_entropy(scores(m).flatten(0, 1), labels.flatten(), ignore_index=-1),
    )


def codec(samples: int = 24_000) -> Subject:
    """Encodec at 24 kHz (Defossez et al. 2022): encoder and decoder, each with two LSTM layers among convolutions."""
    from transformers import EncodecConfig, EncodecModel

    sound = torch.randn(4, 1, samples) * 0.1

    def decoded(model: nn.Module) -> Tensor:
        return model.decoder(model.encoder(sound))

    return Subject(EncodecModel(EncodecConfig()), decoded, lambda m: F.l1_loss(decoded(m), sound))


def forecaster() -> Subject:
    """GluonTS's DeepAR (Salinas et al. 2017) with its own sizes, for hourly series."""
    from gluonts.torch.model.deepar.module import DeepARModel

    B, past, future = 32, 240, 24
    model = DeepARModel("h", past, future, num_feat_dynamic_real=5, cardinality=[300])
    length = model.past_length
    series = 10 + torch.randn(B, length + future).cumsum(1)
    time_features = torch.randn(B, length + future, 5)
    inputs = {
        "feat_static_cat": torch.randint(300, (B, 1)),
        "feat_static_real": torch.randn(B, 1),
        "past_time_feat": time_features[:, :length],
        "past_target": series[:, :length],
        "past_observed_values": torch.ones(B, length),
        "future_time_feat": time_features[:, length:],
        "future_target": series[:, length:],
    }
    return Subject(
        model,
        lambda m: m.unroll_lagged_rnn(**inputs)[2],
        lambda m: m.loss(**inputs, future_observed_values=torch.ones(B, future)).mean(),
    )


SUBJECTS: dict[str, tuple[str, Callable[[], Subject]]] = {
    "character language model": ("stanza", characters),
    "tokenizer": ("stanza", tokenizer),
    "Encodec 24 kHz": ("transformers", codec),
    "DeepAR": ("gluonts", forecaster),
}


class Training:
    """A model, its optimizer and its loss. Both models of a pair draw the same random numbers."""

    def __init__(self, model: nn.Module, loss: Function) -> None:
        self.model, self.loss, self.steps = model, loss, 0
        self.optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)

    def step(self) -> float:
        torch.manual_seed(self.steps)
        self.steps += 1
        self.optimizer.zero_grad()
        loss = self.loss(self.model)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


class Pair:
    """The same model as it came and converted, and how far they are apart before and during training.

    Args:
        make: of ``SUBJECTS``.
    """

    def __init__(self, make: Callable[[], Subject]) -> None:
        torch.manual_seed(0)
        subject = make()
        self.before = Training(subject.model, subject.loss)
        self.after = Training(copy.deepcopy(subject.model), subject.loss)
        self.report = llmkern.convert(self.after.model)
        expected, got = (_evaluated(t.model, subject.outputs) for t in (self.before, self.after))
        self.output_difference = _difference(got, expected)
        self.losses = [[t.step() for _ in range(STEPS)] for t in (self.before, self.after)]
        self.loss_difference = max(abs(b - a) / abs(a) for a, b in zip(*self.losses, strict=True))

    def time(self, rounds: int) -> tuple[list[float], list[float]]:
        """Seconds of a step before and after, taken in turn."""
        samples: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for training, seconds in zip((self.before, self.after), samples, strict=True):
                start = time.perf_counter()
                training.step()
                seconds.append(time.perf_counter() - start)
        return samples


def _evaluated(model: nn.Module, outputs: Function) -> Tensor:
    model.eval()
    with torch.no_grad():
        result = outputs(model)
    model.train()
    return result


def _difference(got: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest value."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


def measured(package: str, title: str, pair: Pair, rounds: int) -> dict[str, Any]:
    """A result as JSON values."""
    before, after = pair.time(rounds)
    times = {
        name: {
            "median_ms": Spread.of(samples).median * 1e3,
            "iqr_ms": Spread.of(samples).iqr * 1e3,
            "samples_ms": [float(f"{sample * 1e3:.5g}") for sample in samples],
        }
        for name, samples in (("before", before), ("after", after))
    }
    speedup = Spread.of([a / b for a, b in zip(before, after, strict=True)])
    return {
        "package": package,
        "version": version(package),
        "model": title,
        "converted": [layer.name for layer in pair.report.converted],
        "left": {layer.name: layer.reason for layer in pair.report.left},
        "output_difference": pair.output_difference,
        "loss_difference": pair.loss_difference,
        "losses": dict(zip(("before", "after"), pair.losses, strict=True)),
        **times,
        "speedup": speedup.median,
        "speedup_iqr": speedup.iqr,
    }


HEADER = ("package", "model", "layers", "outputs", "losses", "before ms", "after ms", "speed-up")


def row(result: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{result['package']} {result['version']}",
        result["model"],
        str(len(result["converted"])),
        f"{result['output_difference']:.0e}",
        f"{result['loss_difference']:.0e}",
        f"{result['before']['median_ms']:.1f}",
        f"{result['after']['median_ms']:.1f}",
        f"{result['speedup']:.2f}x",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each model")
    parser.add_argument("--only", metavar="PACKAGE", help="the models of one package")
    parser.add_argument("--save", metavar="NAME", help="also write NAME.json, to be committed")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the packages' own
    date, results = datetime.now(timezone.utc), []
    print(" | ".join(HEADER))
    for title, (package, make) in SUBJECTS.items():
        if options.only not in (None, package):
            continue
        if find_spec(package) is None:
            print(f"{package} | {title} | not installed")
            continue
        results.append(measured(package, title, Pair(make), options.rounds))
        print(" | ".join(row(results[-1])))
    document = {
        "command": command(),
        "date": date.isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "machine": machine_facts(),
        "software": software_facts(),
        "protocol": {"compared_steps": STEPS, "rounds": options.rounds},
        "results": results,
    }
    names = [f"local/convert-{date:%Y-%m-%d-%H%M%S}", *([options.save] if options.save else [])]
    for name in names:
        write_document(RESULTS / f"{name}.json", document)
        print(f"results: {RESULTS.name}/{name}.json")


if __name__ == "__main__":
    main()
