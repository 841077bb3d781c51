# SPDX-License-Identifier: Apache-2.0
"""The learning rate of every step, and one step against the same step written out with torch."""

import pytest
import torch

from llmkern.training import TrainingArguments
from llmkern.training.optimization import LearningRate
from llmkern.training.stepping import Stepper
from tests.conftest import assert_close
from tests.models import toys


def rates(steps, steps_per_epoch=3, valid_losses=None, **settings):
    """The learning rate of each step."""
    arguments = TrainingArguments(learning_rate=2.0, **settings)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 2.0)
    schedule = LearningRate(optimizer, arguments, steps_per_epoch, total_steps=steps)
    found = []
    for step in range(1, steps + 1):
        found.append(schedule.value)
        optimizer.step()
        schedule.after_step()
        if step % steps_per_epoch == 0 and valid_losses:
            schedule.after_epoch(valid_losses.pop(0))
    return found


def test_constant():
    assert rates(4) == [2.0] * 4


def test_decay_sets_in_after_so_many_epochs():
    found = rates(12, lr_schedule="decay", lr_decay=0.5, lr_decay_after=2)
    assert found == [2.0] * 6 + [1.0] * 3 + [0.5] * 3


def test_decay_begins_at_the_starting_value():
    assert rates(9, lr_schedule="decay") == [2.0] * 3 + [0.5] * 3 + [0.125] * 3


def test_plateau_divides_when_the_loss_has_not_improved():
    found = rates(15, lr_schedule="plateau", lr_decay=0.25, valid_losses=[5.0, 5.0, 4.0, 4.5, 3.0])
    assert found == [2.0] * 6 + [0.5] * 6 + [0.125] * 3


def test_cosine_warms_up_and_goes_to_zero():
    found = rates(10, lr_schedule="cosine", warmup_steps=4)
    assert found[:4] == [0.5, 1.0, 1.5, 2.0]
    expected = [2.0, 2 * (0.5 + 0.25 * 3**0.5), 1.5, 1.0, 0.5, 2 * (0.5 - 0.25 * 3**0.5)]
    assert found[4:] == pytest.approx(expected)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.5, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, alpha=0.9, momentum=0.5, weight_decay=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("reduction", ["mean", "sum_time"])
def test_steps_are_those_of_a_plain_loop(name, reduction):
    arguments = TrainingArguments(
        optimizer=name,
        learning_rate=0.1,
        weight_decay=0.01,
        **({"momentum": 0.5} if name in ("sgd", "rmsprop") else {}),
        **({"rmsprop_alpha": 0.9} if name == "rmsprop" else {}),
        max_grad_norm=0.5,
        max_grad_value=0.2,
        loss_reduction=reduction,
    )
    ours, theirs = toys.model().double(), toys.model().double()
    stepper = Stepper(ours, arguments, 10, 10)
    optimizer = OPTIMIZERS[name](theirs.parameters())
    ids = torch.randint(23, (4, 13))
    state = None
    for number, start in enumerate((0, 5, 10), 1):
        stop = min(start + 5, 12)
        inputs, targets = ids[:, start:stop], ids[:, start + 1 : stop + 1]
        got, norm = stepper.step(inputs, targets, number)
        optimizer.zero_grad()
        loss, state = theirs.loss(inputs, targets, state)
        (loss * (stop - start) if reduction == "sum_time" else loss).backward()
        state = (state[0].detach(), state[1].detach())
        torch.nn.utils.clip_grad_value_(theirs.parameters(), 0.2)
        expected_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        assert got == pytest.approx(loss.item(), rel=1e-12)
        assert norm == pytest.approx(expected_norm.item(), rel=1e-9)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(mine, other, 1e-9)


def test_the_norm_is_clipped_only_when_asked():
    ids = torch.randint(23, (4, 6))
    changes = []
    for limit in (None, 1e-3):
        model = toys.model()
        before = [p.detach().clone() for p in model.parameters()]
        arguments = TrainingArguments(optimizer="sgd", learning_rate=1.0, max_grad_norm=limit)
        _, norm = Stepper(model, arguments, 1, 1).step(ids[:, :-1], ids[:, 1:], 1)
        moved = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
        changes.append((torch.cat([m.reshape(-1) for m in moved]).norm().item(), norm))
    assert changes[0][0] == pytest.approx(changes[0][1], rel=1e-4)
    assert changes[1][0] == pytest.approx(1e-3, rel=1e-2)
    assert changes[0][1] == pytest.approx(changes[1][1])


def test_nothing_is_updated_when_the_loss_is_not_finite():
    model = toys.model()
    stepper = Stepper(model, TrainingArguments(learning_rate=0.5), 1, 1)
    ids = torch.randint(23, (4, 6))
    stepper.step(ids[:, :-1], ids[:, 1:], 1)
    torch.nn.init.constant_(model.head.bias[3:4].detach(), float("inf"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        FloatingPointError, match=r"expected a finite loss, got (nan|inf) in step 2; .*now 0\.5"
    ):
        stepper.step(ids[:, :-1], ids[:, 1:], 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_nothing_is_updated_when_the_gradient_is_not_finite():
    class Explosive(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2))

        def loss(self, ids, targets, state):
            return torch.sqrt(self.weight).sum(), None  # 0, with an infinite slope

    model = Explosive()
    with pytest.raises(FloatingPointError, match="finite gradient's norm, got inf in step 4"):
        Stepper(model, TrainingArguments(), 1, 1).step(torch.ones(1, 1), torch.ones(1, 1), 4)
    assert model.weight.tolist() == [0, 0]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: tried to allocate 9123456 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_says_what_to_lower(error, monkeypatch):
    model = toys.model()

    def loss(*args):
        raise error

    monkeypatch.setattr(model, "loss", loss)
    stepper = Stepper(model, TrainingArguments(batch_size=64, bptt=70), 1, 1)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(
        MemoryError, match=r"lower batch_size \(now 64\), bptt \(now 70\)"
    ) as caught:
        stepper.step(ids, ids, 3)
    asked = ", which asked for 9,123,456 bytes more" if "9123456" in str(error) else ""
    assert f"out of memory in step 3{asked}; lower" in str(caught.value)


def test_other_errors_are_passed_on(monkeypatch):
    model = toys.model()
    stepper = Stepper(model, TrainingArguments(), 1, 1)
    with pytest.raises(IndexError):
        stepper.step(torch.tensor([[99]]), torch.tensor([[1]]), 1)
