# SPDX-License-Identifier: Apache-2.0
"""Lanes and windows use every token they should, once; splits are found and refused by name."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmkern.text import bptt_windows, contiguous_lanes, corpus_files, language_modeling_splits


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


def test_lanes_in_half_the_memory_give_the_same_windows():
    ids = torch.arange(21)
    wide, narrow = contiguous_lanes(ids, 2), contiguous_lanes(ids.int(), 2)
    assert narrow.dtype == torch.int32
    for (_, *a), (_, *b) in zip(bptt_windows(wide, 3), bptt_windows(narrow, 3), strict=True):
        assert all(torch.equal(x, y) and y.dtype == torch.int64 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("ids", "batch_size", "error", "message"),
    [
        (torch.arange(7), 4, ValueError, r"at least 2 \* batch_size = 8 tokens, got 7"),
        (torch.arange(7), 0, ValueError, "batch_size >= 1, got 0"),
        (torch.zeros(2, 8, dtype=torch.int64), 2, ValueError, r"shape \[N\], got \[2, 8\]"),
        (torch.zeros(8), 2, TypeError, r"int64 or int32 tensor, got torch\.float32"),
        (torch.zeros(8, dtype=torch.int16), 2, TypeError, r"int32 tensor, got torch\.int16"),
        ([1, 2, 3, 4], 2, TypeError, "int64 or int32 tensor, got list"),
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
        (torch.zeros(2, 2), {"bptt": 1}, TypeError, r"int64 or int32 tensor, got torch\.float32"),
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
    folder = make_folder(tmp_path, a_train_txt="a" * 10, b_train_txt="b" * 10)
    message = r"one file \*train\* or \*training\* in '.*', got '.*a.train.txt', '.*b.train.txt'$"
    with pytest.raises(ValueError, match=message):
        language_modeling_splits(folder)
    make_folder(tmp_path, b_valid_txt="c")
    assert language_modeling_splits(folder) == ("b" * 10, "c", None)


def test_folder_without_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected text files in '.*', got none"):
        language_modeling_splits(tmp_path)
    make_folder(tmp_path, test_txt="a", dev_txt="b")
    with pytest.raises(
        FileNotFoundError, match=r"a file to train on in '.*', got '.*dev.txt', '.*test.txt'"
    ):
        language_modeling_splits(tmp_path)


def test_an_error_lists_a_few_files(tmp_path):
    for i in range(300):
        (tmp_path / f"{i:03}-train.txt").write_text("a")
    with pytest.raises(ValueError, match=r"'.*000-train.txt', .* and 295 more$") as error:
        language_modeling_splits(tmp_path)
    assert len(str(error.value)) < 300 + 7 * len(str(tmp_path))


def test_a_split_is_a_whole_word_of_the_name(tmp_path):
    """latest.txt, contested.txt, retrained.txt, devil.txt and value.txt are texts like any other."""
    names = ("contested", "devil", "latest", "retrained", "value")
    folder = make_folder(tmp_path, **{f"{name}_txt": name for name in names})
    files = corpus_files(folder)
    assert [f.stem for f in files.train] == list(names) and not files.valid and not files.test
    splits = language_modeling_splits(folder, valid_fraction=0)
    assert splits == ("\n".join(names), None, None)


def test_the_penn_treebank_archive_as_it_comes(tmp_path):
    for split in ("train", "valid", "test"):
        make_folder(tmp_path, **{f"ptb_{split}_txt": split, f"ptb_char_{split}_txt": "c"})
    (tmp_path / "README").write_text("how it was made")
    assert language_modeling_splits(tmp_path) == ("train", "valid", "test")


def test_any_folder_of_texts_is_one_text_in_name_order(tmp_path):
    folder = make_folder(tmp_path, b_txt="2" * 5 + "\n", a_txt="1" * 5, c_txt="3" * 8, md="no text")
    (folder / ".hidden.txt").write_text("no")
    (folder / "within").mkdir()
    assert language_modeling_splits(folder) == ("11111\n22222\n333333", "33", None)
    make_folder(tmp_path, test_txt="t")
    assert language_modeling_splits(folder)[2] == "t"


def test_a_folder_without_txt_files_is_read_whole(tmp_path):
    (tmp_path / "one.md").write_text("one")
    (tmp_path / "two").write_text("two")
    assert language_modeling_splits(tmp_path, valid_fraction=0).train == "one\ntwo"


def test_a_split_without_a_file_is_held_out(tmp_path):
    folder = make_folder(tmp_path, train_txt="abcdefghij", test_txt="t")
    assert language_modeling_splits(folder) == ("abcdefghi", "j", "t")
    assert language_modeling_splits(folder, valid_fraction=0) == ("abcdefghij", None, "t")


def test_several_paths_are_read_in_their_order_and_none_is_left_out(tmp_path):
    make_folder(tmp_path, b_txt="bb", a_txt="aa", train_txt="tt", valid_txt="vv")
    (tmp_path / "more").mkdir()
    make_folder(tmp_path / "more", y_txt="yy", x_txt="xx")
    paths = [tmp_path / name for name in ("b.txt", "more", "a.txt", "train.txt", "valid.txt")]
    assert language_modeling_splits(*paths) == ("bb\nxx\nyy\naa\ntt", "vv", None)
    with pytest.raises(FileNotFoundError, match=r"a file to train on in '.*', '.*', got '.*valid"):
        language_modeling_splits(paths[-1], paths[-1])


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
