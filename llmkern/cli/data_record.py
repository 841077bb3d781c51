# SPDX-License-Identifier: Apache-2.0
"""Which texts a run was given: written by ``llmkern train``, so that evaluation knows what was trained on."""

import hashlib
import json
from pathlib import Path
from typing import Any

from llmkern.text import Splits, corpus_files
from llmkern.training.run_log import DATA_NAME

FORMAT_VERSION = 1


def data_record(
    paths: list[Path], splits: Splits, valid_fraction: float, tokenizer: dict[str, Any]
) -> dict[str, Any]:
    """What ``data.json`` holds.

    Args:
        paths: the files and folders that were read.
        splits: what came of them.
        valid_fraction: the share of the training text that was held out, where no file was the validation text.
        tokenizer: the options that the tokenizer was made with.

    Returns:
        "paths"; "files" (split -> path and SHA-256 of each file); "held_out" ("files" or "end of text") and
        "valid_fraction"; "texts" (split -> characters and SHA-256 of its UTF-8); "tokenizer".
    """
    files = corpus_files(*paths)
    return {
        "format_version": FORMAT_VERSION,
        "paths": [str(path.absolute()) for path in paths],
        "files": {split: [_described(f) for f in part] for split, part in files._asdict().items()},
        "held_out": "files" if files.valid else "end of text",
        "valid_fraction": valid_fraction,
        "texts": {name: _fingerprint(text) for name, text in splits._asdict().items() if text},
        "tokenizer": tokenizer,
    }


def read_data_record(run: Path) -> dict[str, Any] | None:
    """The record of a run; None for a folder without one, a model that something else saved.

    Raises:
        ValueError: the file is not such a record.
    """
    path = run / DATA_NAME
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_bytes())
        if record["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {record['format_version']}")
        _ = [Path(path) for path in record["paths"]], float(record["valid_fraction"])
        _ = [(int(text["characters"]), text["sha256"]) for text in record["texts"].values()]
        _ = [file["sha256"] for file in record["files"]["train"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} does not describe the texts of a run, or is corrupt: {error!r}"
        ) from error
    return record  # type: ignore[no-any-return]


def trained_share(record: dict[str, Any], text: str) -> float:
    """How much of a text is the run's training text, in [0, 1], where it begins with that."""
    trained = record["texts"]["train"]
    count = trained["characters"]
    if len(text) < count or _fingerprint(text[:count]) != trained:
        return 0.0
    return count / len(text)


def is_trained_file(record: dict[str, Any], path: Path) -> bool:
    """Whether a file is one of those that the training text was made of, under whatever name."""
    return _file_digest(path) in [file["sha256"] for file in record["files"]["train"]]


def has_changed(record: dict[str, Any], split: str, text: str) -> bool:
    """Whether a split of the run's own files is no longer what the run was given."""
    return record["texts"].get(split) != _fingerprint(text)


def _fingerprint(text: str) -> dict[str, Any]:
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    return {"characters": len(text), "sha256": digest}


def _described(path: Path) -> dict[str, str]:
    return {"path": str(path.absolute()), "sha256": _file_digest(path)}


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
