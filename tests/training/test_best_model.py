# SPDX-License-Identifier: Apache-2.0
"""The model that is kept is the best that was validated: at an epoch's end, every N steps, and at a stop."""

import math

import pytest
import torch

from llmkern.models import LanguageModel
from llmkern.training import Trainer, TrainingArguments, evaluate, load_checkpoint
from llmkern.training.state import TrainingState
from tests.models import toys
from tests.training.test_resume import assert_same_run, stop_after
from tests.training.test_trainer import TOKENIZER, VALID, log_of, trainer

EPOCH = 9  # steps


def loss_of(folder):
    return evaluate(
        LanguageModel.from_pretrained(folder), VALID, batch_size=8, bptt=12, accuracy=False
    ).loss


def ruin(some_trainer, after):
    """A learning rate from that step on that makes the model worse."""
    step = some_trainer.stepper.step

    def ruined(inputs, targets, number):
        if number > after:
            some_trainer.stepper.optimizer.param_groups[0]["lr"] = 30.0
        return step(inputs, targets, number)

    some_trainer.stepper.step = ruined
    return some_trainer


def test_a_stop_in_mid_epoch_keeps_a_better_model(tmp_path):
    result = trainer(output_dir=tmp_path, epochs=9, max_steps=EPOCH + 6).train()
    assert result.valid_loss < result.history[0]["valid_loss"]
    assert (result.best_loss, result.best_step) == (result.valid_loss, EPOCH + 6)
    assert loss_of(tmp_path) == result.best_loss
    assert load_checkpoint(tmp_path)["state"]["best_loss"] == result.best_loss


def test_a_stop_in_mid_epoch_keeps_no_worse_model(tmp_path):
    run = ruin(trainer(output_dir=tmp_path, epochs=9, max_steps=EPOCH + 6), after=EPOCH)
    result = run.train()
    assert result.valid_loss > result.history[0]["valid_loss"]
    assert (result.best_loss, result.best_step) == (result.history[0]["valid_loss"], EPOCH)
    assert loss_of(tmp_path) == result.best_loss


def test_the_best_model_of_a_stop_outlives_the_next_epoch(tmp_path):
    first = trainer(output_dir=tmp_path, epochs=2, max_steps=EPOCH + 6).train()
    again = ruin(trainer(output_dir=tmp_path, epochs=2), after=EPOCH + 6).train(resume=True)
    assert again.valid_loss > first.best_loss
    assert (again.best_loss, again.best_step) == (first.best_loss, EPOCH + 6)
    assert loss_of(tmp_path) == first.best_loss


def test_validation_every_so_many_steps(tmp_path):
    plain = toys.model(TOKENIZER.vocab_size)
    trainer(plain, tmp_path / "plain", epochs=2).train()
    model = toys.model(TOKENIZER.vocab_size)
    result = trainer(model, tmp_path / "often", epochs=2, eval_every_steps=3).train()
    validations = log_of(tmp_path / "often", "validation")
    assert [entry["step"] for entry in validations] == [
        3,
        6,
        9,
        12,
        15,
        18,
    ]  # an end is one, not two
    assert result.best_loss == min(entry["loss"] for entry in validations)
    toys.assert_same_parameters(plain, model)


def test_the_best_of_all_validations_is_kept(tmp_path):
    run = ruin(trainer(output_dir=tmp_path, epochs=2, eval_every_steps=3), after=12)
    result = run.train()
    validations = {entry["step"]: entry["loss"] for entry in log_of(tmp_path, "validation")}
    assert result.best_step == 12 == min(validations, key=validations.__getitem__)
    assert result.best_loss == validations[12] < min(validations[9], validations[18])
    assert loss_of(tmp_path) == validations[12]


def test_validation_in_mid_epoch_is_resumed_to_the_bit(tmp_path):
    trainer(output_dir=tmp_path / "whole", eval_every_steps=2, seed=3).train()
    first = trainer(output_dir=tmp_path / "parts", eval_every_steps=2, seed=3)
    stop_after(first, 5)
    first.train()
    trainer(output_dir=tmp_path / "parts", eval_every_steps=2, seed=3).train(resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_patience_does_not_depend_on_where_a_run_was_stopped():
    """A good validation at a stop in mid-epoch must not make the next epoch look like one without gain."""
    state = TrainingState()
    waited = []
    for losses in ([3.0], [2.0, 2.5], [2.4], [2.6]):  # of an epoch, the last one at its end
        state.add(3.0, tokens=10, learning_rate=0.1, position=5)
        for loss in losses:
            state.validated(loss)
        state.end_epoch(losses[-1])
        waited.append(state.epochs_without_gain)
    assert waited == [0, 0, 0, 1]
    assert (state.best_loss, state.best_step) == (2.0, 2)


def test_without_a_validation_text_a_stop_keeps_the_newest(tmp_path):
    model = toys.model(TOKENIZER.vocab_size)
    trainer(model, tmp_path, valid=None, epochs=9, max_steps=EPOCH + 2).train()
    toys.assert_same_parameters(LanguageModel.from_pretrained(tmp_path), model)


def test_a_validation_loss_that_is_no_number_stops_the_run(tmp_path):
    model = toys.model(TOKENIZER.vocab_size)
    loss = model.loss

    def broken(ids, targets, state):
        value, state = loss(ids, targets, state)
        steps = len(log_of(tmp_path, "epoch"))
        return (value if model.training or not steps else value * math.nan), state

    model.loss = broken
    with pytest.raises(
        FloatingPointError,
        match="expected a validation loss that is a number, got nan after step 18",
    ):
        trainer(model, tmp_path, epochs=3).train()
    assert load_checkpoint(tmp_path)["state"]["step"] == EPOCH
    kept = LanguageModel.from_pretrained(tmp_path)
    assert all(parameter.isfinite().all() for parameter in kept.parameters())


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"lr_schedule": "plateau"}, "lr_schedule 'plateau'"),
        ({"patience": 3}, "patience 3"),
        ({"eval_every_steps": 5}, "eval_every_steps 5"),
    ],
    ids=str,
)
def test_settings_that_need_a_validation_text_say_so(settings, name):
    with pytest.raises(ValueError, match=f"expected a validation text for {name}, .* got None"):
        trainer(valid=None, **settings)


def test_too_little_memory_in_validation_says_what_to_lower(tmp_path):
    model = toys.model(TOKENIZER.vocab_size)
    loss = model.loss

    def greedy(*args):
        if not model.training:
            raise RuntimeError("can't allocate memory: you tried to allocate 4294967296 bytes")
        return loss(*args)

    model.loss = greedy
    message = r"validation after step 9, which asked for 4,294,967,296 bytes \(4\.0 GiB\) more; lower eval_batch_size"
    with pytest.raises(MemoryError, match=message):
        trainer(model, tmp_path).train()


@pytest.mark.parametrize(
    ("tokens", "batch_size"), [(40, 1), (800, 3), (4_800, 20), (1_000_000, 32)]
)
def test_batch_sizes_fit_the_text(tokens, batch_size):
    """By themselves: an epoch has 20 steps where the text has them."""
    ids = torch.arange(tokens) % TOKENIZER.vocab_size
    run = Trainer(
        toys.model(TOKENIZER.vocab_size),
        TrainingArguments(bptt=12),
        ids,
        ids[:20],
        show_progress=False,
    )
    assert run.arguments.batch_size == batch_size
    assert run.arguments.eval_batch_size == 1
    assert run.steps_per_epoch >= min(20, tokens // 12)
