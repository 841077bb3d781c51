# SPDX-License-Identifier: Apache-2.0
"""Tokenizer: text to ids and back, over the ``tokenizers`` library, in one self-contained file."""

import itertools
import operator
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llmkern._files import write_files
from llmkern.text import backends
from llmkern.text._checks import check_options, check_text
from llmkern.text.backends import BOS, EOS, PAD, SPECIAL_TOKENS, UNK, Kind
from llmkern.text.normalization import NormalizationForm
from llmkern.text.streaming import StreamDecoder

FILE_NAME = "tokenizer.json"
_PIECES_A_BATCH = 8


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
        backend: The ``tokenizers.Tokenizer`` that does the work.
    """

    def __init__(self, backend: Any, kind: Kind) -> None:
        # Text must never turn into a special token; the library leaves this switch out of the file.
        backend.encode_special_tokens = True
        self.backend = backend
        self.kind: Kind = kind
        size = backend.get_vocab_size()
        self.tokens: tuple[str, ...] = tuple(backend.id_to_token(id) for id in range(size))
        self._ids = {token: id for id, token in enumerate(self.tokens)}
        self.pad_id, self.unk_id, self.bos_id, self.eos_id = map(self.id, (PAD, UNK, BOS, EOS))
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
    ) -> "Tokenizer":
        """Make a tokenizer for a corpus; the same texts and options give the same vocabulary.

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
        normalizer = backend.normalizer
        parts: Iterator[str | list[str]] = itertools.chain.from_iterable(
            backends.cut(normalizer, kind, check_text("train", text))
            for text in ([texts] if isinstance(texts, str) else texts)
        )
        if kind == "bpe":
            backends.train_bpe(backend, parts, specials, vocab_size, min_frequency)
            return cls(backend, kind)
        dropped = backends.train_vocabulary(backend, parts, specials, vocab_size, min_frequency)
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
        return cls(backend, kind)

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
            content = file.read_bytes()
        except OSError as error:
            raise OSError(
                error.errno, f"{where}: expected a tokenizer in '{file}', got: {error.strerror}"
            ) from error
        return cls(*backends.parse(content, f"{where}: expected '{file}' to be"))

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Make a tokenizer from the content of its file; the reverse of ``to_json``.

        Raises:
            ImportError: The library is not installed.
            ValueError: As ``load``.
        """
        where = "llmkern.text.Tokenizer.from_json"
        return cls(*backends.parse(text.encode(), f"{where}: expected the text to be"))

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

    def encode(self, text: str) -> list[int]:
        """The ids of a text.

        Args:
            text: Any text. No special token is added at either end.

        Returns:
            The ids.

        Raises:
            ImportError: jieba is needed and not installed.
            TypeError: ``text`` is not a str.
            ValueError: A token is unknown and there is no ``<unk>``; names it and its position.
        """
        parts = backends.cut(self.backend.normalizer, self.kind, check_text("encode", text))
        ids: list[int] = []
        while batch := list(itertools.islice(parts, _PIECES_A_BATCH)):
            try:
                encodings = self.backend.encode_batch_fast(
                    batch, is_pretokenized=self.kind == "jieba", add_special_tokens=False
                )
            except Exception:  # the library raises no narrower class
                self._refuse_unknown(text)
                raise
            for encoding in encodings:
                ids += encoding.ids
        return ids

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

    def _refuse_unknown(self, text: str) -> None:
        if self.kind == "bpe":
            return
        for position, token in enumerate(backends.tokens_of(self.backend, self.kind, text)):
            if token not in self._ids:
                code_point = f" (U+{ord(token):04X})" if self.kind == "char" else ""
                raise ValueError(
                    "llmkern.text.Tokenizer.encode: expected tokens of the vocabulary "
                    f"(V = {self.vocab_size}), got {token!r}{code_point} at position {position}; "
                    f"train on texts that hold it, or with special_tokens=('{UNK}',)"
                ) from None
