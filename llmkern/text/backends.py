# SPDX-License-Identifier: Apache-2.0
"""The pipeline of each kind of tokenizer, built from the parts of the ``tokenizers`` library.

A kind is its pipeline: model, pre-tokenizer and decoder, all of which the library writes into
tokenizer.json. A file is recognised by comparing these parts with the ones built here, so it needs
no field beyond the library's own, and every program that uses the library can read it.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

from llmkern._optional import require
from llmkern.text.normalization import NormalizationForm
from llmkern.text.segmentation import (
    ANYWHERE,
    CHINESE_BOUNDARY,
    STARTS_ANEW,
    WORD_BOUNDARY,
    chinese_words,
    last_token_boundary,
    pieces,
)

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
START = "<start>"  # the name of the beginning in tokenizer.json; no token

# Learning merges takes time quadratic in the length of a pre-token: no run is longer than this. The pattern is GPT-2's
# (Radford 2019) otherwise.
_LONGEST_RUN = 64
_RUN = f"{{1,{_LONGEST_RUN}}}"
_BPE_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d"
    rf"| ?\p{{L}}{_RUN}| ?\p{{N}}{_RUN}| ?[^\s\p{{L}}\p{{N}}]{_RUN}|\s{_RUN}(?!\S)|\s{_RUN}"
)
_PATIENCE = 0.1  # seconds between two looks at a thread


def library() -> Any:
    """The ``tokenizers`` package."""
    return require("tokenizers", "builds and runs tokenizers")


def build(
    kind: Kind,
    special_tokens: tuple[str, ...] = (),
    *,
    lowercase: bool = False,
    normalization: NormalizationForm | None = None,
    capped: bool = True,
) -> Any:
    """An untrained ``tokenizers.Tokenizer`` of a kind.

    Args:
        kind: The kind.
        special_tokens: Those it will have.
        lowercase: Lower-case all text.
        normalization: Unicode normalisation form of all text.
        capped: Whether a bpe tokenizer cuts long runs; those of llmkern 0.1 did not.
    """
    lib = library()
    backend = lib.Tokenizer(lib.models.BPE() if kind == "bpe" else lib.models.WordLevel({}))
    if kind == "char":
        backend.pre_tokenizer = lib.pre_tokenizers.FixedLength(length=1)
    elif kind == "word":
        backend.pre_tokenizer = lib.pre_tokenizers.WhitespaceSplit()
    elif kind == "bpe":
        backend.pre_tokenizer = _byte_level(lib, capped)
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


def _byte_level(lib: Any, capped: bool) -> Any:
    if not capped:
        return lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = lib.pre_tokenizers.Split(lib.Regex(_BPE_PATTERN), "isolated")
    to_bytes = lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return lib.pre_tokenizers.Sequence([split, to_bytes])


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
    on_wait: Callable[[], object],
) -> None:
    """Fill the vocabulary of a bpe backend: special tokens, the 256 bytes, merges in order.

    Ctrl-C ends it, and ``on_wait`` is called several times a second, while merges are learned too.
    """
    lib = library()
    trainer = lib.trainers.BpeTrainer(
        vocab_size=BPE_VOCAB_SIZE if vocab_size is None else vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _train_in_thread(backend, texts, trainer, on_wait)


def _train_in_thread(
    backend: Any, texts: Iterable[str | list[str]], trainer: Any, on_wait: Callable[[], object]
) -> None:
    """Train where Ctrl-C ends it: the library hears nothing while it learns merges.

    The caller's thread reads the texts, so that an error or an interruption in them is its own, and
    then waits; when it leaves, the other thread reads no more, and goes with the process at latest.
    """
    feed: queue.Queue[str | list[str] | None] = queue.Queue(maxsize=64)
    left, failure = threading.Event(), []

    def work() -> None:
        try:
            _learn(backend, iter(_taking(feed, left), None), trainer)
        except BaseException as error:  # handed to the caller's thread
            failure.append(error)

    thread = threading.Thread(target=work, name="llmkern-bpe", daemon=True)
    thread.start()
    try:
        for text in texts:
            while thread.is_alive() and not _put(feed, text):
                pass
        while thread.is_alive() and not _put(feed, None):
            pass
        while thread.is_alive():
            thread.join(_PATIENCE)
            on_wait()
    finally:
        left.set()
    if failure:
        raise failure[0]


def _learn(backend: Any, texts: Iterator[str | list[str]], trainer: Any) -> None:
    backend.train_from_iterator(texts, trainer)


def _put(feed: queue.Queue[Any], item: Any) -> bool:
    try:
        feed.put(item, timeout=_PATIENCE)
    except queue.Full:
        return False
    return True


def _taking(feed: queue.Queue[Any], left: threading.Event) -> Callable[[], Any]:
    """Takes items until the one who puts them has left."""

    def take() -> Any:
        while not left.is_set():
            try:
                return feed.get(timeout=_PATIENCE)
            except queue.Empty:
                continue
        raise InterruptedError("the training of the tokenizer was left")

    return take


class Cutter(NamedTuple):
    """Cuts texts into what the library is given: pieces, or for jieba lists of words.

    It holds the parts of a backend, not the backend, which is locked while it trains on the pieces.
    """

    kind: Kind
    normalizer: Any
    pre_tokenizer: Any

    @classmethod
    def of(cls, backend: Any, kind: Kind) -> "Cutter":
        """The cutter for a backend."""
        return cls(kind, backend.normalizer, backend.pre_tokenizer)

    def cut(self, text: str) -> Iterator[tuple[int, str | list[str]]]:
        """The pieces of a text, each with the number of its characters."""
        for piece in self._pieces(text):
            yield len(piece), chinese_words(self._normal(piece)) if self.kind == "jieba" else piece

    def tokens(self, text: str) -> Iterable[str]:
        """The tokens of a text before the vocabulary is asked; not for bpe."""
        if self.kind == "char":
            return self._normal(text)
        if self.kind == "word":
            return [word for word, _ in self.pre_tokenizer.pre_tokenize_str(self._normal(text))]
        return [word for _, words in self.cut(text) for word in words]

    def _pieces(self, text: str) -> Iterator[str]:
        if self.kind == "char":
            return pieces(text, STARTS_ANEW if self.normalizer else ANYWHERE)
        if self.kind == "word":
            return pieces(text, WORD_BOUNDARY)
        if self.kind == "jieba":
            return pieces(text, CHINESE_BOUNDARY, len)
        return pieces(text, WORD_BOUNDARY, self._last_token_boundary)

    def _last_token_boundary(self, text: str) -> int | None:
        return last_token_boundary(self.normalizer, self.pre_tokenizer, text)

    def _normal(self, text: str) -> str:
        return self.normalizer.normalize_str(text) if self.normalizer else text


def newline_token(kind: Kind) -> str:
    """The token of a newline."""
    return {"word": EOS, "bpe": "\u010a"}.get(kind, "\n")


def set_start(backend: Any, id: int) -> None:
    """Keep in the backend, and so in its file, which token a text begins with that has no other beginning.

    It is declared as a special token of a template that does not use it: no encoding changes.
    """
    backend.post_processor = library().processors.TemplateProcessing(
        single="$A", pair="$A $B", special_tokens=[(START, id)]
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
