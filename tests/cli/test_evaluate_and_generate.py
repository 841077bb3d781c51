# SPDX-License-Identifier: Apache-2.0
"""llmkern evaluate and llmkern generate say what the library says."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch

from llmkern.models import LanguageModel
from llmkern.training import evaluate
from tests.cli.conftest import SMALL
from tests.models import toys


def value(table, metric):
    (line,) = (line for line in table.splitlines() if metric in line)
    return line.strip("│ ").split("│")[1].strip()


@pytest.mark.parametrize("kind", ["char", "word"])
def test_evaluate_prints_the_librarys_numbers(llmkern, kind):
    llmkern("train", "text.txt", "--output", "run", "--tokenizer", kind, *SMALL, "--batch-size", 4)
    done = llmkern("evaluate", "run", "text.txt", "--batch-size", 3)
    assert done.exit_code == 0
    model = LanguageModel.from_pretrained("run")
    ids = torch.tensor(model.tokenizer.encode(toys.TEXT))
    expected = evaluate(model, ids, batch_size=3)
    bits = expected.loss / math.log(2) * len(ids) / len(toys.TEXT)
    assert value(done.stdout, "tokens") == f"{expected.tokens:,}"
    assert value(done.stdout, "loss (nats)") == f"{expected.loss:.4f}"
    assert value(done.stdout, "perplexity") == f"{expected.perplexity:.2f}"
    assert value(done.stdout, "bits per character") == f"{bits:.4f}"
    assert value(done.stdout, "top-1 accuracy") == f"{expected.top1_accuracy:.2%}"
    assert value(done.stdout, "top-5 accuracy") == f"{expected.top5_accuracy:.2%}"


def test_evaluate_chooses_the_split(trained):
    Path("corpus").mkdir()
    for split, copies in (("train", 1), ("valid", 2), ("test", 3)):
        Path(f"corpus/{split}.txt").write_text(toys.TEXT[:300] * copies)
    for options, tokens in (([], 890), (["--split", "valid"], 590), (["--split", "train"], 290)):
        done = trained("evaluate", "run", "corpus", *options)
        assert value(done.stdout, "tokens") == str(tokens), done.output
    Path("corpus/test.txt").unlink()
    assert value(trained("evaluate", "run", "corpus").stdout, "tokens") == "590"


def test_evaluate_scores_the_text_that_the_run_held_out(llmkern):
    llmkern("train", "text.txt", "--output", "run", *SMALL, "--valid-fraction", 0.2)
    held_out = toys.TEXT[int(len(toys.TEXT) * 0.8) :]
    record = json.loads(Path("run/data.json").read_text())
    assert record["paths"] == [str(Path("text.txt").absolute())]
    assert (record["held_out"], record["valid_fraction"]) == ("end of text", 0.2)
    digest = hashlib.sha256(toys.TEXT.encode()).hexdigest()
    assert record["files"]["train"] == [{"path": record["paths"][0], "sha256": digest}]
    assert record["texts"]["valid"] == {
        "characters": len(held_out),
        "sha256": hashlib.sha256(held_out.encode()).hexdigest(),
    }
    for command in (["text.txt", "--split", "valid"], ["--split", "valid"], []):
        done = llmkern("evaluate", "run", *command, "--batch-size", 1)
        assert value(done.stdout, "tokens") == str(len(held_out) - 1)
        assert done.stderr == ""


def test_evaluate_says_when_a_text_was_trained_on(llmkern):
    llmkern("train", "text.txt", "--output", "run", *SMALL, "--valid-fraction", 0.25)
    done = llmkern("evaluate", "run", "text.txt")
    assert (
        "the first 75% of text.txt is what the model was trained on; --split valid" in done.stderr
    )
    done = llmkern("evaluate", "run", "--split", "train")
    assert "text.txt (train) is what the model was trained on" in done.stderr
    Path("copy.txt").write_text(toys.TEXT[: int(len(toys.TEXT) * 0.75)])
    assert (
        "copy.txt is what the model was trained on" in llmkern("evaluate", "run", "copy.txt").stderr
    )
    Path("other.txt").write_text(toys.TEXT[::-1])
    assert llmkern("evaluate", "run", "other.txt").stderr == ""
    Path("text.txt").write_text(toys.TEXT[:-100])
    done = llmkern("evaluate", "run", "--split", "valid")
    assert "text.txt (valid) has changed since the run" in done.stderr


def test_evaluate_knows_the_files_of_a_folder(llmkern):
    Path("corpus").mkdir()
    for name in ("a", "b", "c"):
        Path(f"corpus/{name}.txt").write_text(toys.TEXT.replace("cat", name))
    done = llmkern("train", "corpus", "text.txt", "--output", "run", *SMALL)
    assert done.exit_code == 0, done.output
    whole = "".join(Path(f"corpus/{name}.txt").read_text() for name in "abc") + toys.TEXT
    done = llmkern("evaluate", "run", "--batch-size", 1)
    assert value(done.stdout, "tokens") == str(len(whole) - int(len(whole) * 0.9) - 1)
    assert done.stderr == ""
    Path("copy.txt").write_bytes(Path("corpus/b.txt").read_bytes())
    done = llmkern("evaluate", "run", "copy.txt")
    assert "copy.txt is one of the files that the model was trained on" in done.stderr
    again = llmkern("train", "corpus", "text.txt", "--output", "run", "--resume", "--quiet")
    assert again.exit_code == 0, again.output


def test_evaluate_without_the_runs_record(trained, fails):
    Path("run/data.json").unlink()
    done = trained("evaluate", "run", "text.txt", "--split", "valid", "--batch-size", 1)
    assert value(done.stdout, "tokens") == "95"
    assert "run does not say how its text was split; valid is taken to be the last" in done.stderr
    assert "expected a text to score: run does not say what it was" in fails(2, "evaluate", "run")
    for broken in ("{", "[]", '{"format_version": 9}', "[" * 100_000):
        Path("run/data.json").write_text(broken)
        assert "run/data.json does not describe the texts" in fails(
            2, "evaluate", "run", "text.txt"
        )


def test_generate_prints_the_seed_it_draws(trained):
    options = ("--prompt", "the cat", "--max-new-tokens", 30)
    first, second = (trained("generate", "run", *options) for _ in range(2))
    assert first.stdout != second.stdout
    seed = first.stderr.removeprefix("llmkern: seed ").strip()
    again = trained("generate", "run", *options, "--seed", seed)
    assert (again.stdout, again.stderr) == (first.stdout, "")
    assert trained("generate", "run", *options, "--temperature", 0).stderr == ""


def test_generate_continues_the_prompt_by_the_seed(trained):
    options = ("--prompt", "the cat", "--max-new-tokens", 30, "--temperature", 0.8, "--seed")
    texts = [trained("generate", "run", *options, seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("the cat")
    assert len(texts[0]) == 7 + 30 + 1
    expected = LanguageModel.from_pretrained("run").generate(
        "the cat", max_new_tokens=30, temperature=0.8, seed=1
    )
    assert texts[0] == expected + "\n"


def test_generate_passes_its_options_on(trained):
    model = LanguageModel.from_pretrained("run")
    settings = {
        "max_new_tokens": 25,
        "min_new_tokens": 2,
        "temperature": 1.3,
        "top_k": 9,
        "top_p": 0.9,
        "min_p": 0.01,
        "typical_p": 0.95,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "no_repeat_ngram_size": 4,
        "seed": 5,
    }
    words = [w for name, v in settings.items() for w in (f"--{name.replace('_', '-')}", v)]
    done = trained("generate", "run", "--prompt", "a dog", *words)
    assert done.stdout == model.generate("a dog", **settings) + "\n"
    done = trained("generate", "run", "--prompt", "a dog", *words, "--num-return-sequences", 2)
    first, second = model.generate("a dog", **settings, num_return_sequences=2)
    assert done.stdout == f"--- 1\n{first}\n--- 2\n{second}\n"


def test_generate_stops_at_a_text(trained):
    done = trained("generate", "run", "--prompt", "the", "--seed", 1, "--stop", "a", "--stop", "o")
    continuation = done.stdout.removeprefix("the").rstrip("\n")
    assert continuation[-1] in "ao"
    assert not set(continuation[:-1]) & set("ao")


def test_unknown_words_are_said_and_never_written(llmkern):
    Path("text.txt").write_text(toys.TEXT.replace("cat", "<unk>"))
    llmkern(
        "train", "text.txt", "--output", "run", "--tokenizer", "word", *SMALL, "--batch-size", 4
    )
    options = ("--prompt", "the zebra", "--seed", 1, "--max-new-tokens", 300)
    done = llmkern("generate", "run", *options)
    assert "does not know zebra and reads <unk>" in done.stderr
    assert done.stdout.count("<unk>") == 1  # the prompt's
    assert llmkern("generate", "run", *options, "--allow-unk").stdout.count("<unk>") > 1


@pytest.mark.parametrize("kind", ["char", "word", "jieba", "bpe"])
def test_the_printed_hint_works_without_a_prompt(llmkern, kind):
    options = ["--vocab-size", "300"] if kind == "bpe" else []
    train = ("train", "text.txt", "--output", "run", "--tokenizer", kind, *options, *SMALL)
    done = llmkern(*train, "--max-steps", "2", "--batch-size", "2")
    hint = next(line for line in done.stdout.splitlines() if "try: " in line).split("try: ")[1]
    assert hint == "llmkern generate run"
    done = llmkern(*hint.split()[1:], "--max-new-tokens", "5")
    assert done.exit_code == 0, done.output


def test_unknown_characters_of_a_prompt(trained):
    options = ("generate", "run", "--max-new-tokens", "5", "--seed", "1")
    known = trained(*options, "--prompt", "the cat")
    assert trained(*options, "--prompt", "tQhe cat", "--unknown", "drop").stdout == known.stdout
    done = trained(*options, "--prompt", "tQhe cat", "--unknown", "replace")
    assert done.exit_code == 2 and "got 'Q' (U+0051) at position 1" in done.stderr
    done = trained(*options, "--prompt", "the", "--unknown", "skip")
    assert done.exit_code == 2 and "unknown to be one of" in done.stderr


def test_a_token_for_unknown_characters(llmkern):
    Path("other.txt").write_text(toys.TEXT + "Ω")
    train = ("train", "text.txt", "--output", "run", *SMALL)
    assert llmkern(*train).exit_code == 0
    done = llmkern("evaluate", "run", "other.txt")
    assert done.exit_code == 2
    assert f"got 'Ω' (U+03A9) at position {len(toys.TEXT)}; " in done.stderr
    assert "--unk" in done.stderr
    Path("text.txt").write_text(toys.TEXT + "Ω")  # in the validation text alone
    assert llmkern(*train, "--unk", "--overwrite").exit_code == 0
    tokenizer = LanguageModel.from_pretrained("run").tokenizer
    assert tokenizer.unk_id == 0 and "Ω" not in tokenizer.tokens
    assert llmkern("evaluate", "run", "other.txt").exit_code == 0
    options = ("generate", "run", "--max-new-tokens", "5", "--seed", "1", "--prompt", "aΩ")
    assert "(U+03A9) at position 1" in llmkern(*options).stderr
    assert llmkern(*options, "--unknown", "replace").stdout.startswith("a<unk>")
    done = llmkern("train", "text.txt", "--output", "bpe", "--tokenizer", "bpe", "--unk", *SMALL)
    assert done.exit_code == 2 and "no '<unk>' for bpe, which knows every text" in done.stderr
