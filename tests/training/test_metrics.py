# SPDX-License-Identifier: Apache-2.0
"""evaluate() against the definition, ties and broken logits included; the classification report by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llmkern.training import classification_report, evaluate, metrics, perplexity
from tests.models import toys


@pytest.mark.parametrize("batch_size", [1, 3])
def test_is_the_mean_over_every_token_with_the_state_carried(batch_size):
    model = toys.model().double().eval()
    ids = torch.randint(23, (100,))
    lanes = ids[: 100 // batch_size * batch_size].view(batch_size, -1)
    logits, _ = model(lanes[:, :-1])
    targets = lanes[:, 1:]
    loss = F.cross_entropy(logits.reshape(-1, 23), targets.reshape(-1)).item()
    best = logits.topk(5).indices
    for bptt in (1, 7, 1000):
        result = evaluate(model, ids, batch_size=batch_size, bptt=bptt, characters_per_token=2.0)
        assert result.loss == pytest.approx(loss, rel=1e-12)
        assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-12)
        assert result.bits_per_character == pytest.approx(loss / math.log(2) / 2, rel=1e-12)
        assert result.top1_accuracy == (best[..., 0] == targets).double().mean()
        assert result.top5_accuracy == (best == targets[..., None]).any(-1).double().mean()
        assert result.tokens == targets.numel()
        quick = evaluate(model, ids, batch_size=batch_size, bptt=bptt, accuracy=False)
        assert quick.loss == pytest.approx(loss, rel=1e-12)
        assert (quick.top1_accuracy, quick.top5_accuracy, quick.bits_per_character) == (None,) * 3


def test_a_large_vocabulary_is_read_in_small_pieces(monkeypatch):
    model = toys.model().eval()
    ids = torch.randint(23, (200,))
    expected = evaluate(model, ids, batch_size=2, bptt=50)
    monkeypatch.setattr(metrics, "_MAX_LOGITS", 2 * 23 * 4)
    widths = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda ids, state: (widths.append(ids.shape[1]), forward(ids, state))[1]
    )
    got = evaluate(model, ids, batch_size=2, bptt=50)
    assert max(widths) == 4
    assert got.loss == pytest.approx(expected.loss, rel=1e-6)
    assert got.top5_accuracy == expected.top5_accuracy


def test_twice_the_same_and_without_dropout():
    model = toys.model(dropout=0.5).train()
    ids = torch.randint(23, (100,))
    assert evaluate(model, ids) == evaluate(model, ids)
    assert model.training


def test_evaluation_leaves_the_random_stream_alone():
    model = toys.model(dropout=0.5)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    for accuracy in (True, False):
        evaluate(model, torch.randint(23, (100,), generator=torch.Generator()), accuracy=accuracy)
    assert torch.equal(torch.rand(1), expected)


class Constant(nn.Module):
    """The same logits whatever it reads."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, ids, state):
        return self.logits.expand(*ids.shape, -1), state


def test_equal_logits_rank_by_id():
    ids = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])  # targets 0 .. 6
    result = evaluate(Constant([0.0] * 7), ids, batch_size=1)
    assert result.top1_accuracy == pytest.approx(1 / 7)
    assert result.top5_accuracy == pytest.approx(5 / 7)
    result = evaluate(Constant([0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]), ids, batch_size=1)
    assert result.top1_accuracy == pytest.approx(1 / 7)
    assert result.top5_accuracy == pytest.approx(5 / 7)


def test_a_broken_model_is_not_accurate():
    result = evaluate(Constant([math.nan] * 7), torch.arange(7), batch_size=1)
    assert math.isnan(result.loss)
    assert (result.top1_accuracy, result.top5_accuracy) == (0, 0)


def test_progress_is_told():
    told = []
    evaluate(
        toys.model(),
        torch.randint(23, (50,)),
        batch_size=2,
        bptt=10,
        on_progress=lambda *a: told.append(a),
    )
    assert told == [(10, 24), (20, 24), (24, 24)]


def test_too_short_a_text():
    with pytest.raises(ValueError, match="20 tokens, got 19"):
        evaluate(toys.model(), torch.zeros(19, dtype=torch.int64), batch_size=10)


def test_perplexity_of_a_huge_loss_is_infinite():
    assert perplexity(math.log(120.7)) == pytest.approx(120.7)
    assert perplexity(1e4) == math.inf


def test_classification_report():
    preds = torch.tensor([[0, 0, 1], [1, 2, 2]])
    targets = torch.tensor([[0, 1, 1], [1, 2, 0]])
    report = classification_report(preds, targets, 3)
    assert report["accuracy"] == pytest.approx(4 / 6)
    precision, recall = [1 / 2, 1.0, 1 / 2], [1 / 2, 2 / 3, 1.0]
    f1 = [2 * p * r / (p + r) for p, r in zip(precision, recall, strict=True)]
    for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
        assert [one[name] for one in report["classes"]] == pytest.approx(values)
        assert report[name] == pytest.approx(sum(values) / 3)
    assert [one["support"] for one in report["classes"]] == [2, 3, 1]


@pytest.mark.parametrize(
    ("preds", "targets", "message"),
    [
        ([0, 1], [0], r"of one shape and not empty, got \[2\] and \[1\]"),
        ([], [], "not empty"),
        ([0, 3], [0, 1], r"expected preds in \[0, 3\), got 3"),
        ([0, 1], [0, -1], r"expected targets in \[0, 3\), got -1"),
    ],
)
def test_wrong_classes_are_named(preds, targets, message):
    with pytest.raises(ValueError, match=message):
        classification_report(
            torch.tensor(preds, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64), 3
        )
