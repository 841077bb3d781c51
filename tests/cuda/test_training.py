# SPDX-License-Identifier: Apache-2.0
"""Training and generating on a GPU: the CPU's losses, bf16, the same bits again, checkpoints that change devices."""

from pathlib import Path

import pytest
import torch

import llmkern
from llmkern.models import LanguageModel
from llmkern.training import Trainer, TrainingArguments, TrainingResult
from tests.models import toys

from .promises import assert_same_bits

pytestmark = pytest.mark.cuda

WORDS = toys.tokenizer()
IDS = toys.token_ids(WORDS)


def trainer(
    device: torch.device | str, folder: Path | None = None, dropout: float = 0.0, **settings
) -> Trainer:
    model = toys.model(WORDS.vocab_size, dropout=dropout).to(device)
    defaults = {"batch_size": 8, "bptt": 12, "epochs": 3, "tensorboard": False, "seed": 5}
    arguments = TrainingArguments(**(defaults | settings))
    return Trainer(model, arguments, IDS[:800], IDS[800:], output_dir=folder, show_progress=False)


def losses(result: TrainingResult) -> list[float]:
    return [epoch[name] for epoch in result.history for name in ("train_loss", "valid_loss")]


@pytest.mark.sanitize
def test_one_step(device):
    result = trainer(device, max_steps=1, epochs=1).train()
    assert result.step == 1 and result.valid_loss < 10


def test_losses_are_those_of_the_cpu(device):
    """To rounding: the framework multiplies in another order on a GPU, and training amplifies that."""
    on_cpu, on_gpu = (losses(trainer(d).train()) for d in ("cpu", device))
    assert len(on_gpu) == 6 and on_gpu[-1] < on_gpu[1]
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


def test_bf16_learns_as_float32_does(device):
    wide = trainer(device, epochs=8)
    narrow = trainer(device, epochs=8, precision="bf16")
    expected, got = losses(wide.train()), losses(narrow.train())
    assert got != expected, "bf16 changed nothing"
    assert got == pytest.approx(expected, rel=0.03)
    assert got[-1] < 0.8 * got[1]
    assert {p.dtype for p in narrow.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_same_bits_on_every_run(device, precision):
    runs = [trainer(device, dropout=0.3, precision=precision) for _ in range(2)]
    first, second = (losses(run.train()) for run in runs)
    assert first == second
    assert_same_bits(*([*run.model.state_dict().values()] for run in runs))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_resumed_on_the_gpu_is_never_stopped(device, tmp_path, precision):
    options = {"dropout": 0.3, "precision": precision}
    whole = trainer(device, tmp_path / "whole", **options)
    expected = losses(whole.train())
    trainer(device, tmp_path / "parts", max_steps=11, **options).train()
    resumed = trainer(device, tmp_path / "parts", **options)
    assert losses(resumed.train(resume=True)) == expected
    assert_same_bits(*([*run.model.state_dict().values()] for run in (resumed, whole)))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_checkpoint_goes_to_the_cpu_and_back(device, tmp_path, optimizer):
    expected = losses(trainer("cpu", optimizer=optimizer).train())
    for place, steps in ((device, 7), ("cpu", 15), (device, None)):
        run = trainer(place, tmp_path, optimizer=optimizer, max_steps=steps)
        result = run.train(resume=steps != 7)
        assert {p.device.type for p in run.model.parameters()} == {torch.device(place).type}
    assert losses(result) == pytest.approx(expected, rel=1e-3)


def test_a_saved_model_generates_the_same_text_on_both(device, tmp_path):
    trainer(device, tmp_path, epochs=4).train()
    texts = []
    for place in ("cpu", device):
        model = LanguageModel.from_pretrained(tmp_path, device=place).eval()
        prompt = IDS[:20].unsqueeze(0).to(place)
        ids = model.generate(prompt, max_new_tokens=60, do_sample=True, top_p=0.9, seed=7)
        texts.append(torch.as_tensor(ids).cpu())
    assert torch.equal(*texts)


def test_an_id_out_of_range_stops_training_with_its_value(device):
    model = toys.model(10).to(device)
    ids = torch.randint(10, (4, 9), device=device)
    ids[2, 5] = 99
    model.loss(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    with pytest.raises(IndexError, match=r"\[0, 10\).*got 99"):
        llmkern.ops.raise_deferred_errors()
    loss, _ = model.loss(ids[:1, :-1].contiguous(), ids[:1, 1:].contiguous())
    assert torch.isfinite(loss)
