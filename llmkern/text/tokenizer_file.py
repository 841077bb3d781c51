# SPDX-License-Identifier: Apache-2.0
"""Reading tokenizer.json, which nobody trusts.

The content is compared, part by part, with what llmkern writes, and the backend is built anew from the vocabulary
and the options found: the library's own reader prints and allocates without bound for an id that is out of its range.
"""

import itertools
import json
from typing import Any, NamedTuple

from llmkern.text.backends import (
    BYTES,
    EOS,
    KINDS,
    SPECIAL_TOKENS,
    START,
    UNK,
    Kind,
    build,
    byte_values,
    library,
    set_start,
)
from llmkern.text.normalization import FORMS

LARGEST = 1 << 28  # bytes; the file of five million words is smaller
_SHOWN = 60
_PARTS = ("model", "pre_tokenizer", "decoder")
_EXTRAS = ("truncation", "padding")


class Parsed(NamedTuple):
    """A backend, its kind, and its beginning, which files of llmkern 0.1 do not name."""

    backend: Any
    kind: Kind
    start_id: int | None


class _ForeignError(Exception):
    """What is wrong with a file."""


def parse(content: bytes, expected: str) -> Parsed:
    """The tokenizer in the content of tokenizer.json.

    Args:
        content: The file.
        expected: How an error begins: what was expected to be a tokenizer.

    Raises:
        ImportError: The library is not installed.
        ValueError: The content is cut off, damaged, or nothing that llmkern saved.
    """
    library()
    if len(content) > LARGEST:
        raise ValueError(
            f"{expected} a tokenizer of at most {LARGEST:,} bytes, got {len(content):,}"
        )
    try:
        pipeline = json.loads(content)
    except (ValueError, RecursionError) as error:  # JSON or UTF-8; lists in lists in lists
        raise ValueError(
            f"{expected} JSON, got damaged or cut off content: {_short(str(error))}"
        ) from error
    try:
        return _rebuilt(pipeline)
    except _ForeignError as error:
        raise ValueError(
            f"{expected} a tokenizer that llmkern saved (kind {KINDS}), got one of: {error}"
        ) from error
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"{expected} a tokenizer, got: {_short(str(error))}") from error


def _rebuilt(pipeline: Any) -> Parsed:
    if not isinstance(pipeline, dict) or not isinstance(pipeline.get("model"), dict):
        raise ValueError("no model")
    vocabulary = _checked_vocabulary(pipeline)
    backend, kind = _like(pipeline)
    lib = library()
    if kind == "bpe":
        merges = _checked_merges(pipeline["model"].get("merges"), vocabulary)
        backend.model = lib.models.BPE(vocabulary, merges)
        _add_special_tokens(backend, pipeline.get("added_tokens"), vocabulary)
        _check_bytes(backend, vocabulary)
    else:
        backend.model = lib.models.WordLevel(vocabulary, unk_token=UNK)
    start = _checked_start(pipeline.get("post_processor"), len(vocabulary))
    if start is not None:
        set_start(backend, start)
    built = json.loads(backend.to_str())
    for key in pipeline:
        if key != "model" and pipeline[key] != built.get(key):
            raise _ForeignError(f"{_described(pipeline)}, another {_short(key)}")
    return Parsed(backend, kind, start)


def _checked_vocabulary(pipeline: dict[str, Any]) -> dict[str, int]:
    """The vocabulary, its ids 0 to V - 1, each once."""
    vocabulary = pipeline["model"].get("vocab")
    if not isinstance(vocabulary, dict):
        raise _ForeignError(_described(pipeline))
    ids = vocabulary.values()
    whole = all(type(id) is int for id in ids)
    if not whole or not vocabulary or sorted(ids) != list(range(len(vocabulary))):
        raise _ForeignError(f"{_described(pipeline)}, ids that are not 0 to V - 1")
    return vocabulary


def _like(pipeline: dict[str, Any]) -> tuple[Any, Kind]:
    """An untrained backend with the parts of the file, and its kind."""
    choices = itertools.product(KINDS, ((), (EOS,)), (True, False), (False, True), (None, *FORMS))
    for kind, specials, capped, lowercase, form in choices:
        backend = build(kind, specials, lowercase=lowercase, normalization=form, capped=capped)
        built = json.loads(backend.to_str())
        model = {k: v for k, v in pipeline["model"].items() if k not in ("vocab", "merges")}
        parts = ("normalizer", "pre_tokenizer", "decoder")
        if (
            model.get("type") == built["model"]["type"]
            and model.items() <= built["model"].items()
            and all(pipeline.get(part) == built[part] for part in parts)
        ):
            return backend, kind
    raise _ForeignError(_described(pipeline))


def _checked_merges(merges: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    if not isinstance(merges, list):
        raise ValueError("no merges")
    for merge in merges:
        if not isinstance(merge, list) or len(merge) != 2 or not all(type(p) is str for p in merge):
            raise ValueError(f"a merge that is no pair of tokens: {_short(repr(merge))}")
        if not {*merge, "".join(merge)} <= vocabulary.keys():
            raise ValueError(
                f"a merge of tokens that are not in the vocabulary: {_short(repr(merge))}"
            )
    return [(left, right) for left, right in merges]


def _add_special_tokens(backend: Any, added: Any, vocabulary: dict[str, int]) -> None:
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ValueError("no added_tokens")
    names = [token.get("content") for token in added]
    for name in names:
        if name not in SPECIAL_TOKENS or name not in vocabulary:
            raise ValueError(f"a special token of others: {_short(str(name))}")
    backend.add_special_tokens(names)


def _check_bytes(backend: Any, vocabulary: dict[str, int]) -> None:
    """Every byte has a token, and every other token consists of bytes."""
    known = byte_values().keys()
    specials = {token.content for token in backend.get_added_tokens_decoder().values()}
    if len(known & vocabulary.keys()) < BYTES:
        raise ValueError("a vocabulary without all 256 bytes")
    for token in vocabulary.keys() - specials:
        if token in SPECIAL_TOKENS or not token or not known >= set(token):
            raise ValueError(f"a token that is not made of bytes: {_short(repr(token))}")


def _checked_start(processor: Any, vocab_size: int) -> int | None:
    if processor is None:
        return None
    start = processor["special_tokens"][START]["ids"][0]
    if type(start) is not int or not 0 <= start < vocab_size:
        raise ValueError(f"a beginning outside [0, {vocab_size}): {_short(repr(start))}")
    return start


def _described(pipeline: dict[str, Any]) -> str:
    """The parts that tell one tokenizer from another, for an error."""
    parts = [f"{name} {_type_of(pipeline.get(name))}" for name in _PARTS]
    vocabulary = pipeline["model"].get("vocab")
    parts.append(f"V = {len(vocabulary) if isinstance(vocabulary, dict) else 'none'}")
    added = pipeline.get("added_tokens")
    for token in added[:5] if isinstance(added, list) else []:
        name = token.get("content") if isinstance(token, dict) else token
        if name not in SPECIAL_TOKENS:
            parts.append(_short(str(name)))
    return ", ".join([*parts, *(name for name in _EXTRAS if pipeline.get(name))])


def _type_of(part: Any) -> str:
    return _short(str(part.get("type"))) if isinstance(part, dict) else "none"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
