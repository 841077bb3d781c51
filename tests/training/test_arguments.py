# SPDX-License-Identifier: Apache-2.0
"""TrainingArguments: every setting is checked when it is made, and compared when a run is resumed."""

import dataclasses

import pytest

from llmkern.training import TrainingArguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "expected batch_size to be an int >= 1, got 0"),
        ({"bptt": 2.5}, "expected bptt to be an int >= 1, got 2.5"),
        ({"epochs": True}, "expected epochs to be an int >= 1, got True"),
        ({"max_steps": 0}, "expected max_steps to be an int >= 1, got 0"),
        ({"max_seconds": 0}, "expected max_seconds to be a finite number > 0, got 0"),
        ({"optimizer": "lion"}, "one of sgd, adam, adamw, rmsprop, got 'lion'"),
        ({"learning_rate": 0}, "expected learning_rate to be a finite number > 0, got 0"),
        ({"learning_rate": float("nan")}, "expected learning_rate .* got nan"),
        ({"learning_rate": None}, "expected learning_rate .* got None"),
        ({"momentum": 1.0}, r"expected momentum to be a number in \[0, 1\), got 1.0"),
        ({"weight_decay": -1}, "expected weight_decay to be a finite number >= 0, got -1"),
        ({"rmsprop_alpha": 1.5}, r"expected rmsprop_alpha to be a number in \[0, 1\), got 1.5"),
        ({"max_grad_norm": 0.0}, "expected max_grad_norm to be a finite number > 0, got 0.0"),
        ({"max_grad_value": -1.0}, "expected max_grad_value to be a finite number > 0, got -1.0"),
        ({"lr_schedule": "step"}, "one of constant, decay, plateau, cosine, got 'step'"),
        ({"lr_decay": 1.1}, r"expected lr_decay to be a number in \(0, 1\], got 1.1"),
        ({"warmup_steps": -1}, "expected warmup_steps to be an int >= 0, got -1"),
        ({"loss_reduction": "sum"}, "one of mean, sum_time, got 'sum'"),
        ({"seed": -1}, "expected seed to be an int >= 0, got -1"),
        ({"eval_batch_size": 0}, "expected eval_batch_size to be an int >= 1, got 0"),
        ({"keep": 0}, "expected keep to be an int >= 1, got 0"),
        ({"patience": 0}, "expected patience to be an int >= 1, got 0"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"momentum": 0.9},
            "momentum beside optimizer sgd or rmsprop alone, got momentum=0.9 beside",
        ),
        (
            {"rmsprop_alpha": 0.9, "optimizer": "sgd"},
            "rmsprop_alpha beside optimizer rmsprop alone",
        ),
        ({"lr_decay": 0.5}, "lr_decay beside lr_schedule decay or plateau alone, got lr_decay=0.5"),
        ({"lr_decay_after": 3, "lr_schedule": "plateau"}, "beside lr_schedule decay alone"),
        ({"warmup_steps": 3, "lr_schedule": "decay"}, "where it has no effect"),
        ({"schedule_steps": 9}, "schedule_steps beside lr_schedule cosine alone"),
    ],
    ids=str,
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(**settings)


def test_limits_and_logs_may_change_the_rest_may_not():
    first = TrainingArguments()
    later = dataclasses.replace(first, epochs=99, max_steps=5, log_every=1, keep=7, patience=3)
    assert later.changes(first) == {}
    other = dataclasses.replace(later, bptt=7, learning_rate=0.5)
    assert other.changes(first) == {"bptt": (7, 35), "learning_rate": (0.5, 2e-3)}
