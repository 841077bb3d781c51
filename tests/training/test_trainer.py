# SPDX-License-Identifier: Apache-2.0
"""The trainer: learns, reads the text as it should, stops when it should, and leaves the files it promises."""

import hashlib
import json
import math
import signal

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F

from llmkern.models import LanguageModel
from llmkern.training import Trainer, TrainingArguments, evaluate, list_checkpoints, texts
from tests.models import toys

TOKENIZER = toys.tokenizer()
IDS = toys.token_ids(TOKENIZER)
TRAIN, VALID = IDS[:800], IDS[800:]


def trainer(model=None, output_dir=None, valid=VALID, **settings):
    defaults = {
        "batch_size": 8,
        "bptt": 12,
        "epochs": 2,
        "learning_rate": 1e-2,
        "tensorboard": False,
    }
    return Trainer(
        model or toys.model(TOKENIZER.vocab_size),
        TrainingArguments(**(defaults | settings)),
        TRAIN,
        valid,
        output_dir=output_dir,
        tokenizer=TOKENIZER,
        show_progress=False,
    )


def log_of(folder, event):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [entry for line in lines if (entry := json.loads(line))["event"] == event]


def test_learns():
    model = toys.model(TOKENIZER.vocab_size)
    before = evaluate(model, VALID, batch_size=8, accuracy=False).loss
    result = trainer(model, epochs=12).train()
    after = evaluate(model, VALID, batch_size=8, bptt=12, accuracy=False).loss
    assert before > 2.6  # no better than guessing: log 17 = 2.83
    assert after < 1.2
    assert result.history[-1]["valid_loss"] == after
    assert result.best_loss == min(record["valid_loss"] for record in result.history)
    assert result.stop_reason == "epochs"


class Recorder(nn.Module):
    """A model of its own kind, which notes what it is given; its state counts the windows."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(TOKENIZER.vocab_size))
        self.seen = []

    def loss(self, ids, targets, state):
        if self.training:
            self.seen.append((ids.clone(), targets.clone(), state))
        logits = self.bias.expand(*ids.shape, -1).reshape(-1, TOKENIZER.vocab_size)
        count = 0 if state is None else state["windows"] if isinstance(state, dict) else state[0]
        return F.cross_entropy(logits, targets.reshape(-1)), (count + 1, self.bias * 1)


def test_reads_every_lane_in_order_and_carries_the_state():
    model = Recorder()
    trainer(model, valid=None).train()
    lanes = TRAIN.view(8, 100)
    steps = math.ceil(99 / 12)
    assert len(model.seen) == 2 * steps
    for epoch in (model.seen[:steps], model.seen[steps:]):
        assert torch.equal(torch.cat([ids for ids, _, _ in epoch], 1), lanes[:, :-1])
        assert torch.equal(torch.cat([targets for _, targets, _ in epoch], 1), lanes[:, 1:])
        assert epoch[0][2] is None
        assert [state[0] for _, _, state in epoch[1:]] == list(range(1, steps))
        assert not any(state[1].requires_grad for _, _, state in epoch[1:])


def test_trains_any_module_with_a_loss(tmp_path):
    model = Recorder()
    result = trainer(model, tmp_path, epochs=12, learning_rate=0.1).train()
    counts = torch.bincount(TRAIN, minlength=TOKENIZER.vocab_size).double()
    share = counts / counts.sum()
    entropy = -(share * share.clamp(min=1e-9).log()).sum().item()
    assert result.history[-1]["train_loss"] == pytest.approx(entropy, abs=0.05)
    assert not (tmp_path / "model.safetensors").exists()  # it does not know how to save itself
    assert len(list_checkpoints(tmp_path)) == 1


class TorchTwin(LanguageModel):
    """The same model with torch.nn's layers and loss, in the same trainer."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        twin = nn.LSTM(self.lstm.input_size, self.lstm.hidden_size, 2, batch_first=True)
        twin.load_state_dict(self.lstm.state_dict())
        self.lstm = twin

    def loss(self, ids, targets, state=None):
        logits, state = self(ids, state)
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)), state


def test_agrees_with_torchs_layers_in_the_same_trainer():
    def build(kind):
        torch.manual_seed(0)
        model = kind(TOKENIZER.vocab_size, embedding_dim=12, hidden_size=16, num_layers=2)
        return model.double()

    settings = {"optimizer": "sgd", "learning_rate": 1.0, "loss_reduction": "sum_time"}
    ours = trainer(build(LanguageModel), **settings).train()
    theirs = trainer(build(TorchTwin), **settings).train()
    for mine, other in zip(ours.history, theirs.history, strict=True):
        assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-9)
        assert mine["valid_loss"] == pytest.approx(other["valid_loss"], rel=1e-9)


def test_the_run_folder(tmp_path):
    result = trainer(output_dir=tmp_path, tensorboard=True, log_every=4).train()
    names = {path.name for path in tmp_path.iterdir()}
    files = {"config.json", "model.safetensors", "tokenizer.json", "log.jsonl", "tb"}
    assert names == files | {f"checkpoint-{result.step:010d}.pt"}
    loaded = LanguageModel.from_pretrained(tmp_path)
    loss = evaluate(loaded, VALID, batch_size=8, bptt=12, accuracy=False).loss
    assert loss == result.best_loss
    assert loaded.tokenizer.encode("the cat") == TOKENIZER.encode("the cat")


def test_the_log_says_what_happened(tmp_path):
    result = trainer(
        output_dir=tmp_path, tensorboard=True, log_every=4, lr_schedule="decay"
    ).train()
    (start,) = log_of(tmp_path, "start")
    assert start["arguments"]["bptt"] == 12
    assert start["data"]["train_ids"]["length"] == 800
    train = log_of(tmp_path, "train")
    assert [entry["step"] for entry in train] == [4, 8, 12, 16]
    assert all(entry["tokens_per_second"] > 0 and entry["grad_norm"] > 0 for entry in train)
    assert train[-1]["loss"] < train[0]["loss"]
    epochs = log_of(tmp_path, "epoch")
    assert [entry["learning_rate"] for entry in epochs] == [0.01, 0.01 * 0.25]
    assert [entry["valid_loss"] for entry in epochs] == [r["valid_loss"] for r in result.history]
    assert [e["loss"] for e in log_of(tmp_path, "validation")] == [e["valid_loss"] for e in epochs]
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    logged = {e.step: e.value for e in events.Scalars("train/loss")}
    assert logged == pytest.approx({entry["step"]: entry["loss"] for entry in train}, rel=1e-6)


def test_the_best_model_stays(tmp_path):
    """A learning rate that ruins the model after the first epoch."""
    settings = {"optimizer": "sgd", "lr_schedule": "decay", "lr_decay_after": 1}
    good = trainer(output_dir=tmp_path, epochs=1, learning_rate=0.5, **settings)
    first = good.train()
    best = LanguageModel.from_pretrained(tmp_path)
    ruined = trainer(output_dir=tmp_path, epochs=3, learning_rate=0.5, **settings)
    ruined.stepper.learning_rate.after_step = lambda: _set_lr(ruined, 30.0)
    result = ruined.train(resume=True)
    assert result.history[-1]["valid_loss"] > first.best_loss
    assert result.best_loss == first.best_loss
    toys.assert_same_parameters(LanguageModel.from_pretrained(tmp_path), best)


def _set_lr(some_trainer, value):
    for group in some_trainer.stepper.optimizer.param_groups:
        group["lr"] = value


def test_stops_without_gain():
    model = toys.model(TOKENIZER.vocab_size)
    result = trainer(model, epochs=50, patience=2, optimizer="sgd", learning_rate=1e-30).train()
    assert result.stop_reason == "patience"
    assert result.epoch == 3


def test_stops_by_steps_and_by_time(tmp_path):
    result = trainer(output_dir=tmp_path / "a", max_steps=5).train()
    assert (result.stop_reason, result.step, result.epoch) == ("max_steps", 5, 0)
    # A model that can be used, and its validation loss, also before the first epoch's end.
    loaded = LanguageModel.from_pretrained(tmp_path / "a")
    assert evaluate(loaded, VALID, batch_size=8, bptt=12, accuracy=False).loss == result.valid_loss
    result = trainer(output_dir=tmp_path / "b", max_seconds=1e-9).train()
    assert (result.stop_reason, result.step) == ("max_seconds", 0)
    LanguageModel.from_pretrained(tmp_path / "b")


def test_without_validation_the_newest_model_is_saved(tmp_path):
    model = toys.model(TOKENIZER.vocab_size)
    result = trainer(model, tmp_path, valid=None).train()
    assert result.best_loss is None
    toys.assert_same_parameters(LanguageModel.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_stops(tmp_path, number):
    model = toys.model(TOKENIZER.vocab_size)
    loss, calls = model.loss, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(number)
        return loss(*args)

    model.loss = interrupted
    if signal.getsignal(number) == signal.SIG_IGN:  # the tests themselves run under nohup
        signal.signal(number, signal.SIG_DFL)
    before = signal.getsignal(number)
    result = trainer(model, tmp_path).train()
    assert (result.stop_reason, result.step) == ("interrupted", 5)
    assert list_checkpoints(tmp_path)[-1].name == "checkpoint-0000000005.pt"
    assert signal.getsignal(number) is before
    LanguageModel.from_pretrained(tmp_path)


def test_the_second_interrupt_is_at_once(tmp_path):
    model = toys.model(TOKENIZER.vocab_size)

    def impatient(*args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    model.loss = impatient
    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path).train()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    model = toys.model(TOKENIZER.vocab_size)
    loss, calls = model.loss, []

    def broken(*args):
        calls.append(1)
        value, state = loss(*args)
        return (value * math.nan if len(calls) == 8 else value), state

    model.loss = broken
    with pytest.raises(FloatingPointError, match="expected a finite loss, got nan in step 8"):
        trainer(model, tmp_path, save_every_steps=3).train()
    assert list_checkpoints(tmp_path)[-1].name == "checkpoint-0000000006.pt"
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize(
    ("train", "valid", "message"),
    [
        (IDS[:15], VALID, r"expected train_ids of at least 2 \* batch_size = 16 tokens, got 15"),
        (TRAIN, IDS[:7], r"valid_ids of at least 2 \* eval_batch_size = 16 tokens, got 7"),
        (TRAIN, VALID + 20, r"expected valid_ids in \[0, V\) = \[0, \d+\), got \d+: the tokenizer"),
        (TRAIN - 1, VALID, r"expected train_ids in \[0, V\) = \[0, \d+\), got -1"),
    ],
)
def test_texts_that_do_not_fit_are_refused_before_the_first_step(train, valid, message):
    with pytest.raises(ValueError, match=message):
        Trainer(
            toys.model(TOKENIZER.vocab_size), TrainingArguments(batch_size=8, eval_batch_size=8), train,
            valid, show_progress=False,
        )  # fmt: skip


def test_ids_in_half_the_memory_are_the_same_text(monkeypatch):
    monkeypatch.setattr(texts, "_HASHED_AT_ONCE", 100)
    whole = hashlib.sha256(TRAIN.numpy().tobytes()).hexdigest()
    for ids in (TRAIN, TRAIN.int(), TRAIN.repeat_interleave(2)[::2]):
        assert texts.fingerprint(ids) == {"length": len(TRAIN), "sha256": whole}


def test_a_text_of_another_type():
    with pytest.raises(TypeError, match=r"int64 or int32 tensor, got torch\.float32"):
        Trainer(toys.model(TOKENIZER.vocab_size), TrainingArguments(batch_size=8), TRAIN.float())


def test_a_folder_with_another_run_is_not_touched(tmp_path):
    trainer(output_dir=tmp_path, epochs=1).train()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="holds a run; give --resume"):
        trainer(output_dir=tmp_path, epochs=1).train()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="could not make the folder"):
        trainer(output_dir=tmp_path / "file" / "run").train()


def test_the_seed_decides_dropout():
    runs = []
    for seed in (1, 1, 2):
        model = toys.model(TOKENIZER.vocab_size, dropout=0.3)
        trainer(model, epochs=1, seed=seed).train()
        runs.append(model.head.weight.detach())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
