# SPDX-License-Identifier: Apache-2.0
"""The pipeline of each kind of tokenizer, built from the parts of the ``tokenizers`` library.

A kind is its pipeline: model, pre-tokenizer and decoder, all of which the library writes into
tokenizer.json. A file is recognised by comparing these parts with the ones built here, so it needs
no field beyond the library's own, and every program that uses the library can read it.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

from llmkern._optional import require
from llmkern.text.normalization import NormalizationForm
from llmkern.text.segmentation import chinese_words, pieces

Kind = Literal["char", "word", "jieba", "bpe"]
KINDS: tuple[Kind, ...] = get_args(Kind)

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<bos>", "<eos>"
SPECIAL_TOKENS = (PAD, UNK, BOS, EOS)
DEFAULT_SPECIAL_TOKENS: dict[Kind, tuple[str, ...]] = {
    "char": (),
    "word": (UNK, EOS),
    "jieba": (UNK,),
    "bpe": (),
}
BYTES = 256
BPE_VOCAB_SIZE = 8192


def library() -> Any:
    """The ``tokenizers`` package."""
    return require("tokenizers", "builds and runs tokenizers")


def build(
    kind: Kind,
    special_tokens: tuple[str, ...] = (),
    *,
    lowercase: bool = False,
    normalization: NormalizationForm | None = None,
) -> Any:
    """An untrained ``tokenizers.Tokenizer`` of a kind."""
    lib = library()
    backend = lib.Tokenizer(lib.models.BPE() if kind == "bpe" else lib.models.WordLevel({}))
    if kind == "char":
        backend.pre_tokenizer = lib.pre_tokenizers.FixedLength(length=1)
    elif kind == "word":
        backend.pre_tokenizer = lib.pre_tokenizers.WhitespaceSplit()
    elif kind == "bpe":
        backend.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = lib.decoders.ByteLevel()
    if kind in ("char", "jieba"):
        backend.decoder = lib.decoders.Fuse()
    form = [getattr(lib.normalizers, normalization)()] if normalization else []
    steps = form + ([lib.normalizers.Lowercase(), *form] if lowercase else [])
    if kind == "word" and EOS in special_tokens:
        steps.append(lib.normalizers.Replace("\n", f" {EOS} "))
    if steps:
        backend.normalizer = lib.normalizers.Sequence(steps)
    return backend


def train_vocabulary(
    backend: Any,
    texts: Iterable[str | list[str]],
    special_tokens: tuple[str, ...],
    vocab_size: int | None,
    min_frequency: int,
) -> int:
    """Fill the vocabulary of a char, word or jieba backend: special tokens, then by frequency.

    The library's trainer orders by frequency, descending, and then by code point. It is given no
    special tokens: it would cut them out of running text, even out of the middle of a word.

    Returns:
        How many tokens of the texts did not fit into ``vocab_size``.
    """
    lib = library()
    trainer = lib.trainers.WordLevelTrainer(
        vocab_size=2**32, min_frequency=min_frequency, special_tokens=[], show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    counted = backend.get_vocab()
    tokens = [t for t in sorted(counted, key=counted.__getitem__) if t not in special_tokens]
    kept = tokens if vocab_size is None else tokens[: vocab_size - len(special_tokens)]
    vocabulary = {token: id for id, token in enumerate((*special_tokens, *kept))}
    backend.model = lib.models.WordLevel(vocabulary, unk_token=UNK)
    return len(tokens) - len(kept)


def train_bpe(
    backend: Any,
    texts: Iterable[str | list[str]],
    special_tokens: tuple[str, ...],
    vocab_size: int | None,
    min_frequency: int,
) -> None:
    """Fill the vocabulary of a bpe backend: special tokens, the 256 bytes, merges in order."""
    lib = library()
    trainer = lib.trainers.BpeTrainer(
        vocab_size=BPE_VOCAB_SIZE if vocab_size is None else vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)


def cut(normalizer: Any, kind: Kind, text: str) -> Iterator[str | list[str]]:
    """What the library is given for a text: pieces of it, or for jieba lists of words.

    It takes the backend's normalizer, not the backend, which is locked while it trains on these.
    """
    if kind != "jieba":
        yield from pieces(text, characters=kind == "char")
        return
    for piece in pieces(normalized(normalizer, text), characters=False):
        yield chinese_words(piece)


def normalized(normalizer: Any, text: str) -> str:
    """The text as the backend's normalizer, if it has one, leaves it."""
    return normalizer.normalize_str(text) if normalizer else text


def tokens_of(backend: Any, kind: Kind, text: str) -> Iterable[str]:
    """The tokens of a text before the vocabulary is asked; not for bpe."""
    normalizer = backend.normalizer
    if kind == "char":
        return normalized(normalizer, text)
    if kind == "word":
        splits = backend.pre_tokenizer.pre_tokenize_str(normalized(normalizer, text))
        return [word for word, _ in splits]
    return [word for words in cut(normalizer, kind, text) for word in words]


def parse(content: bytes, expected: str) -> tuple[Any, Kind]:
    """A backend and its kind from the content of tokenizer.json.

    Args:
        content: The file.
        expected: How an error begins: what was expected to be a tokenizer.

    Raises:
        ValueError: The content is cut off, damaged, or of no kind.
    """
    try:
        json.loads(content)
    except ValueError as error:  # JSON or UTF-8
        raise ValueError(f"{expected} JSON, got damaged or cut off content: {error}") from error
    try:
        backend = library().Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"{expected} a tokenizer, got: {error}") from error
    pipeline = json.loads(backend.to_str())
    size = backend.get_vocab_size()
    gaps = size == 0 or any(backend.id_to_token(id) is None for id in range(size))
    foreign = [t["content"] for t in pipeline["added_tokens"] if t["content"] not in SPECIAL_TOKENS]
    extras = [key for key in ("truncation", "padding", "post_processor") if pipeline[key]]
    for kind in KINDS:
        if _parts(pipeline) == _parts(json.loads(build(kind).to_str())):
            if gaps or foreign or extras:
                break
            return backend, kind
    parts = [f"{key} {part['type'] if part else 'none'}" for key, part in _named(pipeline)]
    found = ", ".join([*parts, f"V = {size}", *foreign, *extras])
    raise ValueError(
        f"{expected} a tokenizer that llmkern saved (kind {KINDS}), got one of: {found}"
    )


def byte_values() -> dict[str, int]:
    """The byte each character of a byte-level token stands for (GPT-2's table, Radford 2019).

    The printable bytes stand for themselves; the others, ascending, for the characters from 256.
    """
    alphabet = library().pre_tokenizers.ByteLevel.alphabet()
    printable = {character: ord(character) for character in alphabet if ord(character) < BYTES}
    substitutes = sorted(character for character in alphabet if ord(character) >= BYTES)
    others = sorted(set(range(BYTES)) - set(printable.values()))
    return printable | dict(zip(substitutes, others, strict=True))


def _named(pipeline: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(key, pipeline[key]) for key in ("model", "pre_tokenizer", "decoder")]


def _parts(pipeline: dict[str, Any]) -> list[Any]:
    return [pipeline["model"]["type"], pipeline["pre_tokenizer"], pipeline["decoder"]]
