# SPDX-License-Identifier: Apache-2.0
"""Which texts a run was given: written by ``llmkern train``, so that evaluation knows what was trained on."""

import hashlib
import json
from pathlib import Path
from typing import Any

from llmkern.text import Splits
from llmkern.training.run_log import DATA_NAME

FORMAT_VERSION = 1


def data_record(
    path: Path, splits: Splits, valid_fraction: float, tokenizer: dict[str, Any]
) -> dict[str, Any]:
    """What ``data.json`` holds.

    Args:
        path: what was read, a file or a folder.
        splits: what came of it.
        valid_fraction: the share of a single file that was held out.
        tokenizer: the options that the tokenizer was made with.

    Returns:
        "paths", "rule" ("files": a folder's files are the splits; "end of file": the end is held out),
        "valid_fraction", "texts" (split -> characters and SHA-256 of its UTF-8) and "tokenizer".
    """
    return {
        "format_version": FORMAT_VERSION,
        "paths": [str(path.absolute())],
        "rule": "files" if path.is_dir() else "end of file",
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


def has_changed(record: dict[str, Any], split: str, text: str) -> bool:
    """Whether a split of the run's own files is no longer what the run was given."""
    return record["texts"].get(split) != _fingerprint(text)


def _fingerprint(text: str) -> dict[str, Any]:
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    return {"characters": len(text), "sha256": digest}
