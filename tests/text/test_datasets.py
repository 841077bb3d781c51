# SPDX-License-Identifier: Apache-2.0
"""Lanes and windows use every token they should, once; splits are found and refused by name."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmkern.text import bptt_windows, contiguous_lanes, language_modeling_splits


@given(st.integers(1, 9), st.integers(2, 30), st.integers(0, 8))
def test_lanes_are_consecutive_stretches(batch_size, length, rest):
    ids = torch.arange(batch_size * length + rest % batch_size)
    lanes = contiguous_lanes(ids, batch_size)
    assert lanes.tolist() == [list(range(b * length, (b + 1) * length)) for b in range(batch_size)]
    assert lanes.is_contiguous() and lanes.data_ptr() == ids.data_ptr()


def test_lanes_of_a_strided_stream():
    ids = torch.arange(20)[::2]
    assert contiguous_lanes(ids, 2).tolist() == [[0, 2, 4, 6, 8], [10, 12, 14, 16, 18]]


@given(st.integers(1, 4), st.integers(2, 40), st.integers(1, 45))
def test_every_target_is_used_once_and_follows_its_input(batch_size, length, bptt):
    lanes = torch.arange(batch_size * length).view(batch_size, length)
    starts, all_inputs, all_targets = zip(*bptt_windows(lanes, bptt), strict=True)
    widths = [inputs.shape[1] for inputs in all_inputs]
    assert torch.equal(torch.cat(all_inputs, 1), lanes[:, :-1])
    assert torch.equal(torch.cat(all_targets, 1), lanes[:, 1:])
    assert list(starts) == [sum(widths[:i]) for i in range(len(widths))]
    assert widths[:-1] == [bptt] * (len(widths) - 1) and 1 <= widths[-1] <= bptt
    assert len(widths) == -(-(length - 1) // bptt)


@given(st.integers(2, 40), st.integers(1, 45), st.data())
def test_windows_resume_where_they_stopped(length, bptt, data):
    lanes = torch.arange(2 * length).view(2, length)
    windows = list(bptt_windows(lanes, bptt))
    done = data.draw(st.integers(0, len(windows)))
    start = windows[done - 1][0] + windows[done - 1][1].shape[1] if done else 0
    resumed = list(bptt_windows(lanes, bptt, start=start))
    assert [w[0] for w in resumed] == [w[0] for w in windows[done:]]
    assert all(
        torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])
        for a, b in zip(resumed, windows[done:], strict=True)
    )


def test_windows_are_views():
    lanes = torch.arange(10).view(2, 5)
    _, inputs, targets = next(bptt_windows(lanes, 3))
    assert inputs.data_ptr() == lanes.data_ptr()
    assert targets.data_ptr() == lanes[:, 1:].data_ptr()


@pytest.mark.parametrize(
    ("ids", "batch_size", "error", "message"),
    [
        (torch.arange(7), 4, ValueError, r"at least 2 \* batch_size = 8 tokens, got 7"),
        (torch.arange(7), 0, ValueError, "batch_size >= 1, got 0"),
        (torch.zeros(2, 8, dtype=torch.int64), 2, ValueError, r"shape \[N\], got \[2, 8\]"),
        (torch.zeros(8), 2, TypeError, r"int64 tensor, got torch\.float32"),
        (torch.zeros(8, dtype=torch.int32), 2, TypeError, r"int64 tensor, got torch\.int32"),
        ([1, 2, 3, 4], 2, TypeError, "int64 tensor, got list"),
    ],
)
def test_lanes_refuse(ids, batch_size, error, message):
    with pytest.raises(error, match=rf"llmkern\.text\.contiguous_lanes: expected .*{message}"):
        contiguous_lanes(ids, batch_size)


@pytest.mark.parametrize(
    ("lanes", "options", "error", "message"),
    [
        (torch.arange(4).view(4, 1), {"bptt": 1}, ValueError, "at least 2 tokens, got 1"),
        (torch.arange(4).view(2, 2), {"bptt": 0}, ValueError, "bptt >= 1, got 0"),
        (torch.arange(4), {"bptt": 1}, ValueError, r"shape \[B, L\], got \[4\]"),
        (torch.zeros(2, 2), {"bptt": 1}, TypeError, r"int64 tensor, got torch\.float32"),
        (torch.arange(4).view(1, 4), {"bptt": 2, "start": 4}, ValueError, r"in \[0, 3\], got 4"),
    ],
)
def test_windows_refuse_at_the_call(lanes, options, error, message):
    """Not at the first ``next``, which may be far away from the mistake."""
    with pytest.raises(error, match=rf"llmkern\.text\.bptt_windows: expected .*{message}"):
        bptt_windows(lanes, **options)


def make_folder(tmp_path, **files):
    for name, text in files.items():
        (tmp_path / name.replace("_", ".")).write_text(text)
    return tmp_path


def test_folder_of_splits(tmp_path):
    folder = make_folder(tmp_path, ptb_train_txt="a b", ptb_valid_txt="c", ptb_test_txt="d", md="x")
    assert language_modeling_splits(folder) == ("a b", "c", "d")


@pytest.mark.parametrize("name", ["val_txt", "dev_tokens", "wiki_VALIDATION_raw"])
def test_folder_without_test_and_other_names(tmp_path, name):
    folder = make_folder(tmp_path, train_txt="a", **{name: "b"})
    assert language_modeling_splits(folder) == ("a", "b", None)


def test_folder_that_is_not_clear(tmp_path):
    folder = make_folder(tmp_path, train_txt="a")
    with pytest.raises(FileNotFoundError, match=r"one file \*valid\* or \*val\* .*\['train.txt'\]"):
        language_modeling_splits(folder)
    make_folder(tmp_path, valid_txt="b", train_json="c")
    message = r"one file \*train\* in '.*', got \['train.json', 'train.txt'\]"
    with pytest.raises(ValueError, match=message):
        language_modeling_splits(folder)


@given(st.integers(20, 400))
def test_single_file_is_cut_without_loss(tmp_path_factory, length):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    text = "".join(chr(0x4E00 + i) for i in range(length))
    path.write_text(text, encoding="utf-8")
    splits = language_modeling_splits(path)
    assert (splits.train + splits.valid, splits.test) == (text, None)
    assert len(splits.train) == int(length * 0.9)
    splits = language_modeling_splits(path, valid_fraction=0.1, test_fraction=0.2)
    assert "".join(splits) == text
    assert abs(len(splits.valid) - length / 10) <= 1 and abs(len(splits.test) - length / 5) <= 1


def test_single_file_without_validation(tmp_path):
    (tmp_path / "text.txt").write_text("abcdefghij")
    path = tmp_path / "text.txt"
    assert language_modeling_splits(path, valid_fraction=0) == ("abcdefghij", None, None)
    splits = language_modeling_splits(path, valid_fraction=0, test_fraction=0.3)
    assert splits == ("abcdefg", None, "hij")


@pytest.mark.parametrize("fractions", [(-0.1, 0.1), (0.5, 0.5), (0.1, -0.1), (1.5, 0)])
def test_single_file_refuses_fractions(tmp_path, fractions):
    (tmp_path / "text.txt").write_text("a" * 100)
    with pytest.raises(ValueError, match=rf"sum below 1, got {fractions[0]} and {fractions[1]}"):
        language_modeling_splits(
            tmp_path / "text.txt", valid_fraction=fractions[0], test_fraction=fractions[1]
        )


def test_single_file_too_short(tmp_path):
    (tmp_path / "text.txt").write_text("a")
    with pytest.raises(
        ValueError, match=r"long enough to split, got 1 characters in '.*text\.txt'"
    ):
        language_modeling_splits(tmp_path / "text.txt")
    with pytest.raises(FileNotFoundError, match=r"expected a text file '.*none'"):
        language_modeling_splits(tmp_path / "none")
