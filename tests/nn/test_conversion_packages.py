# SPDX-License-Identifier: Apache-2.0
"""Models of other people's packages, where those are installed, before and after convert()."""

import functools

import pytest

import llmkern
from benchmarks.convert_packages import SUBJECTS, Pair

# The packages' own warnings are for their authors.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]

LAYERS = {
    "character language model": ["char_emb", "charlstm.lstm"],
    "tokenizer": ["embeddings", "rnn", "rnn2"],
    "Encodec 24 kHz": ["encoder.layers.13.lstm", "decoder.layers.1.lstm"],
    "DeepAR": ["embedder._embedders.0", "rnn"],
}


@pytest.mark.parametrize("title", SUBJECTS)
def test_outputs_and_losses_stay(title):
    package, make = SUBJECTS[title]
    pytest.importorskip(package)
    # Its convolutions, which stay torch's, take 50 seconds for a second of sound; 3200 samples are 10 steps of LSTMs.
    pair = Pair(functools.partial(make, 3200) if title == "Encodec 24 kHz" else make)
    assert pair.report.left == ()
    assert [layer.name for layer in pair.report.converted] == LAYERS[title]
    assert pair.output_difference < 1e-5
    assert pair.loss_difference < 1e-5
    before, after = pair.losses
    assert after[-1] < after[0] and len(set(after)) == len(after), "it does not train"
    assert llmkern.revert(pair.after.model).converted != ()
    assert all(
        type(a) is type(b)
        for a, b in zip(pair.before.model.modules(), pair.after.model.modules(), strict=True)
    )
    assert abs(pair.after.step() - pair.before.step()) < 1e-5 * abs(before[-1])
