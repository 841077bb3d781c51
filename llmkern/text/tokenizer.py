# SPDX-License-Identifier: Apache-2.0
"""Tokenizer: text to ids and back, over the ``tokenizers`` library, in one self-contained file."""

import itertools
import operator
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from llmkern._files import write_files
from llmkern.text import backends
from llmkern.text._checks import check_options, check_text
from llmkern.text.backends import BOS, EOS, PAD, SPECIAL_TOKENS, UNK, Cutter, Kind
from llmkern.text.normalization import NormalizationForm
from llmkern.text.streaming import StreamDecoder
from llmkern.text.tokenizer_file import LARGEST, parse

Unknown = Literal["error", "drop", "replace"]
UNKNOWN: tuple[Unknown, ...] = get_args(Unknown)
FILE_NAME = "tokenizer.json"
_PIECES_A_BATCH = 8
_BEGINNING = 200


class Tokenizer:
    """Turns text into token ids and back; made by ``Tokenizer.train`` or ``Tokenizer.load``.

    =========  =======================================  ==============  ============================
    kind       a token is                               special tokens  ``decode``
    =========  =======================================  ==============  ============================
    ``char``   a Unicode code point, newline included   none            lossless
    ``word``   a word between white space; a newline    <unk>, <eos>    joined by spaces; <eos> is a
               is the token ``<eos>``                                   newline
    ``jieba``  a Chinese word as jieba segments it;     <unk>           lossless for known words
               white space and newlines are kept
    ``bpe``    a byte-level BPE merge (Sennrich 2016;   none            lossless
               Radford 2019)
    =========  =======================================  ==============  ============================

    The special tokens are the defaults. They come first in the vocabulary, followed by the tokens
    of the texts by frequency, descending, and by code point where it is equal (``bpe``: the 256
    bytes, then the merges as they were learned). So Penn Treebank has exactly 10,000 words and
    Tiny Shakespeare exactly 65 characters.

    What the vocabulary does not hold becomes ``<unk>`` where there is one, and is refused, with its
    position, where there is none. A word ``<unk>`` or ``<eos>`` in the text of a ``word`` tokenizer
    is that special token: prepared corpora are written so. In the other kinds text never turns into
    a special token.

    Attributes:
        kind: ``"char"``, ``"word"``, ``"jieba"`` or ``"bpe"``.
        tokens: The vocabulary, by id.
        pad_id: Id of ``<pad>``, or None.
        unk_id: Id of ``<unk>``, or None.
        bos_id: Id of ``<bos>``, or None.
        eos_id: Id of ``<eos>``, or None.
        start_id: The token that a text without any other beginning begins with: ``<bos>``, else the
            newline if the training texts had one, else ``<eos>``, else their first token.
        backend: The ``tokenizers.Tokenizer`` that does the work.
    """

    def __init__(self, backend: Any, kind: Kind, start_id: int | None = None) -> None:
        # Text must never turn into a special token; the library leaves this switch out of the file.
        backend.encode_special_tokens = True
        self.backend = backend
        self.kind: Kind = kind
        size = backend.get_vocab_size()
        self.tokens: tuple[str, ...] = tuple(backend.id_to_token(id) for id in range(size))
        self._ids = {token: id for id, token in enumerate(self.tokens)}
        self.pad_id, self.unk_id, self.bos_id, self.eos_id = map(self.id, (PAD, UNK, BOS, EOS))
        self.start_id = self._usual_start() if start_id is None else start_id
        self._cutter = Cutter.of(backend, kind)
        self._forms = self._visible_forms()

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        kind: Kind,
        vocab_size: int | None = None,
        min_frequency: int = 1,
        special_tokens: Iterable[str] | None = None,
        lowercase: bool = False,
        normalization: NormalizationForm | None = None,
        on_progress: Callable[[int], object] | None = None,
    ) -> "Tokenizer":
        """Make a tokenizer for a corpus; the same texts and options give the same vocabulary.

        Ctrl-C ends it within a second. (The merges of ``bpe`` are learned in a thread of their own,
        which works on in the background until it is done if the program goes on.)

        Args:
            texts: The corpus: one str or several, be they lines, documents or a whole file.
            kind: ``"char"``, ``"word"``, ``"jieba"`` or ``"bpe"``; see the class.
            vocab_size: At most so many tokens, special ones included; the most frequent are kept.
                Default: all of them, and 8,192 for ``bpe``.
            min_frequency: Tokens (``bpe``: merges) that occur fewer times are left out.
            special_tokens: Any of ``"<pad>"``, ``"<unk>"``, ``"<bos>"``, ``"<eos>"``; they take the
                first ids, in the order given. Default: as in the table of the class.
            lowercase: Lower-case all text, here and in ``encode``.
            normalization: Unicode normalisation form of all text, here and in ``encode``.
            on_progress: Called several times a second with the number of characters read so far.

        Returns:
            The tokenizer.

        Raises:
            ImportError: The library (tokenizers; jieba for ``"jieba"``) is not installed.
            TypeError: A text is not a str.
            ValueError: An option is out of its range, the texts hold no token, or ``vocab_size`` or
                ``min_frequency`` leaves out tokens with no ``<unk>`` to stand for them.

        Example:
            >>> tokenizer = Tokenizer.train("to be or not to be", kind="word")
            >>> tokenizer.tokens
            ('<unk>', '<eos>', 'be', 'to', 'not', 'or')
            >>> tokenizer.encode("to be seen")
            [3, 2, 0]
        """
        specials = check_options(kind, vocab_size, min_frequency, special_tokens, normalization)
        backend = backends.build(kind, specials, lowercase=lowercase, normalization=normalization)
        corpus = _Corpus(texts, Cutter.of(backend, kind), on_progress or (lambda done: None))
        if kind == "bpe":
            backends.train_bpe(
                backend, corpus.parts(), specials, vocab_size, min_frequency, corpus.report
            )
        else:
            dropped = backends.train_vocabulary(
                backend, corpus.parts(), specials, vocab_size, min_frequency
            )
            _check_trained(backend, specials, vocab_size, min_frequency, dropped)
        start = cls(backend, kind)._start_of(corpus)
        backends.set_start(backend, start)
        return cls(backend, kind, start)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Load what ``save`` wrote.

        Args:
            path: The folder, or the file itself.

        Returns:
            The tokenizer, with the same ids for every text.

        Raises:
            ImportError: The library is not installed.
            OSError: There is no such file, or it cannot be read.
            ValueError: The file is cut off, damaged, or no tokenizer of one of the four kinds.
        """
        where = "llmkern.text.Tokenizer.load"
        file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
        try:
            with open(file, "rb") as opened:
                content = opened.read(LARGEST + 1)
        except OSError as error:
            raise OSError(
                error.errno, f"{where}: expected a tokenizer in '{file}', got: {error.strerror}"
            ) from error
        return cls(*parse(content, f"{where}: expected '{file}' to be"))

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Make a tokenizer from the content of its file; the reverse of ``to_json``.

        Raises:
            ImportError: The library is not installed.
            ValueError: As ``load``.
        """
        where = "llmkern.text.Tokenizer.from_json"
        return cls(*parse(text.encode(), f"{where}: expected the text to be"))

    def to_json(self) -> str:
        """The content of tokenizer.json, the same for the same vocabulary and options."""
        return f"{self.backend.to_str(pretty=True)}\n"

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``tokenizer.json``, all or nothing.

        Args:
            folder: Where to; made if need be.

        Returns:
            The file.

        Raises:
            OSError: It cannot be written; an older tokenizer.json is unharmed.
        """
        write_files(Path(folder), {FILE_NAME: self.to_json().encode()})
        return Path(folder) / FILE_NAME

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens, special ones included."""
        return len(self.tokens)

    def id(self, token: str) -> int | None:
        """The id of a token, or None if the vocabulary does not hold it."""
        return self._ids.get(token)

    def token(self, id: int) -> str:
        """The token of an id (``bpe``: in the library's alphabet of bytes, where a space is Ġ).

        Raises:
            IndexError: The id is not in the vocabulary.
        """
        return self.tokens[self._check_ids("token", [id])[0]]

    def encode(self, text: str, unknown: Unknown | None = None) -> list[int]:
        """The ids of a text; for a corpus, ``encode_array`` takes a tenth of the memory.

        Args:
            text: Any text. No special token is added at either end.
            unknown: What becomes of tokens that the vocabulary does not hold: ``"replace"`` makes
                them ``<unk>``, ``"drop"`` leaves them out, ``"error"`` refuses them. Default:
                ``"replace"`` where there is an ``<unk>``, else ``"error"``.

        Returns:
            The ids.

        Raises:
            ImportError: jieba is needed and not installed.
            TypeError: ``text`` is not a str.
            ValueError: A token is unknown, and ``unknown`` is ``"error"`` or there is no ``<unk>``;
                names it and its position.
        """
        if unknown not in (None, *UNKNOWN):
            raise ValueError(
                f"llmkern.text.Tokenizer.encode: expected unknown to be one of {UNKNOWN} or None, "
                f"got {unknown!r}"
            )
        if unknown is None or self.kind == "bpe":
            return self.encode_array(text).tolist()  # type: ignore[no-any-return]
        found = map(self._ids.get, self._cutter.tokens(check_text("encode", text)))
        if unknown == "drop":
            return [id for id in found if id is not None]
        ids = [self.unk_id if id is None and unknown == "replace" else id for id in found]
        if None in ids:
            self._refuse_unknown(text)
        return ids  # type: ignore[return-value]

    def encode_array(
        self, text: str, on_progress: Callable[[int], object] | None = None
    ) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The ids of a text of any length, in four bytes a token.

        Args:
            text: Any text, as in ``encode``.
            on_progress: Called several times a second with the number of characters encoded so far.

        Returns:
            The ids, int32 [T].

        Raises:
            ImportError: As ``encode``.
            TypeError: As ``encode``.
            ValueError: A token is unknown and there is no ``<unk>``; names it and its position.
        """
        parts = self._cutter.cut(check_text("encode", text))
        ids, done = array("i"), 0
        while batch := list(itertools.islice(parts, _PIECES_A_BATCH)):
            try:
                encodings = self.backend.encode_batch_fast(
                    [part for _, part in batch],
                    is_pretokenized=self.kind == "jieba",
                    add_special_tokens=False,
                )
            except Exception:  # the library raises no narrower class
                self._refuse_unknown(text)
                raise
            for encoding in encodings:
                ids.extend(encoding.ids)
            done += sum(length for length, _ in batch)
            if on_progress:
                on_progress(done)
        return np.frombuffer(ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids.

        ``<pad>``, ``<bos>`` and ``<eos>`` leave no trace (but ``<eos>`` is a newline in a ``word``
        tokenizer); ``<unk>`` is written as such. Bytes that form no character become U+FFFD.

        Args:
            ids: Token ids: ints, or an integer tensor of shape [T].

        Returns:
            The text.

        Raises:
            IndexError: An id is not in the vocabulary; names its position and its value.
            TypeError: ``ids`` holds something else than integers.
        """
        decoder = StreamDecoder(self)
        return decoder.put(ids) + decoder.end()

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer.from_json, (self.to_json(),)

    def __repr__(self) -> str:
        named = {"pad": self.pad_id, "unk": self.unk_id, "bos": self.bos_id, "eos": self.eos_id}
        specials = "".join(f", {name}_id={id}" for name, id in named.items() if id is not None)
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size}{specials})"

    def visible_forms(self, ids: Iterable[int]) -> list[Any]:
        """What each id adds to the text, str or (bpe) bytes; ids that add nothing are left out.

        Raises:
            IndexError: As ``decode``.
            TypeError: As ``decode``.
        """
        forms = self._forms
        return [form for id in self._check_ids("decode", ids) if (form := forms[id])]

    def _visible_forms(self) -> list[Any]:
        if self.kind == "bpe":
            values = backends.byte_values()
            silent: Any = b""
            forms: list[Any] = [
                silent if token in SPECIAL_TOKENS else bytes(map(values.__getitem__, token))
                for token in self.tokens
            ]
            return forms
        hidden = {PAD: "", BOS: "", EOS: "\n" if self.kind == "word" else ""}
        return [hidden.get(token, token) for token in self.tokens]

    def _usual_start(self) -> int:
        """The beginning for a vocabulary whose texts are not known: of a file of llmkern 0.1."""
        for id in (self.bos_id, self.id(backends.newline_token(self.kind)), self.eos_id):
            if id is not None:
                return id
        return next((i for i, t in enumerate(self.tokens) if t not in SPECIAL_TOKENS), 0)

    def _start_of(self, corpus: "_Corpus") -> int:
        newline = self.id(backends.newline_token(self.kind)) if corpus.has_newline else None
        for id in (self.bos_id, newline, self.eos_id):
            if id is not None:
                return id
        known = (id for id in self.encode(corpus.beginning, "drop") if id != self.unk_id)
        return next(known, self._usual_start())

    def _check_ids(self, where: str, ids: Iterable[int]) -> list[int]:
        try:
            plain = list(map(operator.index, ids.tolist() if hasattr(ids, "tolist") else ids))
        except TypeError as error:
            raise TypeError(
                f"llmkern.text.Tokenizer.{where}: expected integers, got: {error}"
            ) from error
        if plain and not 0 <= min(plain) <= max(plain) < self.vocab_size:
            position = next(i for i, id in enumerate(plain) if not 0 <= id < self.vocab_size)
            raise IndexError(
                f"llmkern.text.Tokenizer.{where}: expected ids in [0, {self.vocab_size}), "
                f"got {plain[position]} at position {position}"
            )
        return plain

    def unknown_tokens(self, text: str) -> Iterator[tuple[int, str]]:
        """The position and the form of every token of a text that the vocabulary does not hold.

        Positions count tokens; for ``char`` these are characters. ``bpe`` knows every text.
        """
        check_text("unknown_tokens", text)
        tokens = () if self.kind == "bpe" else self._cutter.tokens(text)
        return (found for found in enumerate(tokens) if found[1] not in self._ids)

    def _refuse_unknown(self, text: str) -> None:
        found = next(self.unknown_tokens(text), None)
        if found is None:
            return
        position, token = found
        code_point = f" (U+{ord(token):04X})" if self.kind == "char" else ""
        remedy = "give unknown='drop' or 'replace'"
        if self.unk_id is None:
            remedy = f"train on texts that hold it, or with special_tokens=('{UNK}',) (--unk)"
        raise ValueError(
            "llmkern.text.Tokenizer.encode: expected tokens of the vocabulary "
            f"(V = {self.vocab_size}), got {token!r}{code_point} at position {position}; {remedy}"
        ) from None


class _Corpus:
    """The texts that a tokenizer is trained on, on their way to the library."""

    def __init__(
        self, texts: Iterable[str], cutter: Cutter, on_progress: Callable[[int], object]
    ) -> None:
        self._texts = [texts] if isinstance(texts, str) else texts
        self._cutter = cutter
        self._on_progress = on_progress
        self._done = 0
        self.has_newline = False
        self.beginning = ""

    def parts(self) -> Iterator[str | list[str]]:
        """What the library is given."""
        for text in self._texts:
            check_text("train", text)
            self.has_newline = self.has_newline or "\n" in text
            self.beginning = self.beginning or text[:_BEGINNING]
            for length, part in self._cutter.cut(text):
                yield part
                self._done += length
                self.report()

    def report(self) -> None:
        """Tell how much is read."""
        self._on_progress(self._done)


def _check_trained(
    backend: Any,
    specials: tuple[str, ...],
    vocab_size: int | None,
    min_frequency: int,
    dropped: int,
) -> None:
    if backend.get_vocab_size() == len(specials):
        raise ValueError(
            "llmkern.text.Tokenizer.train: expected texts with a token that occurs at least "
            f"{min_frequency} times, got none"
        )
    if dropped and UNK not in specials:
        needed = backend.get_vocab_size() + dropped
        raise ValueError(
            f"llmkern.text.Tokenizer.train: expected vocab_size >= {needed}, the tokens of the "
            f"texts, or '{UNK}' among special_tokens, got vocab_size {vocab_size}"
        )
