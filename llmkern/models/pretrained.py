# SPDX-License-Identifier: Apache-2.0
"""A model in a folder: config.json, model.safetensors, tokenizer.json.

The three files belong together. model.safetensors therefore carries, in its metadata, the configuration it was made
with, a checksum of its tensors and the hash of its tokenizer. A save that was cut off between two renames, or a file
copied from elsewhere, is then an error with a name instead of a model that writes nonsense.

A folder may come from a stranger: sizes are compared with the shapes in the header of model.safetensors before any of
them is allocated, and whatever is wrong with a file is one ValueError that names it.
"""

import hashlib
import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from llmkern._files import check_readable, read_file, write_files
from llmkern._optional import require
from llmkern.models.building import build, shortened
from llmkern.text import Tokenizer

FORMAT_VERSION = 1
_LOAD = "llmkern.from_pretrained"
_CHECKSUM = "llmkern_checksum"
_MAX_CONFIG_BYTES, _MAX_TOKENIZER_BYTES = 1 << 20, 1 << 28
_UNREADABLE = (ValueError, TypeError, RuntimeError, LookupError, AttributeError, OverflowError)
CONFIG_NAME, WEIGHTS_NAME, TOKENIZER_NAME = "config.json", "model.safetensors", "tokenizer.json"


class PretrainedMixin:
    """save_pretrained and from_pretrained for a module with ``config``, its constructor's arguments."""

    tokenizer: Tokenizer | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        raise AttributeError(f"{type(self).__name__} must define config")

    def save_pretrained(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Writes the model into a folder, which is made if need be; files there are replaced, all or none.

        Args:
            folder: where to.
            tokenizer: saved with the model; default: the model's own ``tokenizer``, if it has one.

        Raises:
            OSError: the folder or a file cannot be written; files that were there are unharmed.
            ValueError: the tokenizer's vocabulary is not the model's.
        """
        folder = Path(folder)
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        contents: dict[str, bytes] = {}
        metadata = {"format": "pt", "llmkern_config": json.dumps(self.config)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                error.errno, f"llmkern.save: could not make the folder {folder}: {error.strerror}"
            ) from error
        if tokenizer is not None:
            _check_vocabulary(tokenizer, self.config["vocab_size"], "the tokenizer to save")
            contents[TOKENIZER_NAME] = tokenizer.to_json().encode()
            metadata["llmkern_tokenizer"] = hashlib.sha256(contents[TOKENIZER_NAME]).hexdigest()
        header = {"format_version": FORMAT_VERSION, "model_class": type(self).__name__}
        contents[CONFIG_NAME] = (json.dumps(header | self.config, indent=2) + "\n").encode()
        contents[WEIGHTS_NAME] = _weights_bytes(self, metadata)  # type: ignore[arg-type]
        write_files(folder, contents)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str | None = None) -> Self:
        """Loads a model that save_pretrained wrote, in evaluation mode; ``tokenizer`` is set if the folder has one.

        Args:
            folder: the folder.
            device: where the parameters go; default: the CPU.

        Raises:
            FileNotFoundError: the folder or a file in it is missing.
            OSError: a file cannot be read.
            ValueError: a file is corrupt, of another format or model class, or the files do not belong together;
                names the file. Nothing is allocated before the sizes in config.json fit the weights.
        """
        folder = Path(folder)
        config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
        config = _read_config(config_path, cls.__name__)
        tensors, metadata = _read_weights(weights_path)
        _check_same_save(folder, config, metadata)
        model = build(
            cls,  # type: ignore[type-var]
            config,
            tensors,
            described_by=f"{_LOAD}: {config_path}",
            stored_in=f"{_LOAD}: {weights_path}",
        )
        if (folder / TOKENIZER_NAME).is_file():
            model.tokenizer = Tokenizer.load(folder)
            _check_vocabulary(model.tokenizer, config["vocab_size"], str(folder / TOKENIZER_NAME))
        return model.to(device).eval()  # type: ignore[attr-defined, no-any-return]


def _check_vocabulary(tokenizer: "Tokenizer", vocab_size: int, what: str) -> None:
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"llmkern.models: expected {what} to have the model's vocab_size = {vocab_size}, "
            f"got {tokenizer.vocab_size}"
        )


def _safetensors() -> Any:
    require("safetensors.torch", "saving and loading models")
    return require("safetensors", "saving and loading models")


def _checksum(tensors: dict[str, Tensor]) -> str:
    """crc32 over names, dtypes, shapes and values: safetensors notices a cut file, not a changed byte."""
    crc = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name}{tensor.dtype}{list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _weights_bytes(model: nn.Module, metadata: dict[str, str]) -> bytes:
    tensors = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:  # a tied weight is stored once
            tensors[name] = tensor.detach().cpu().contiguous()
            seen.add(tensor.data_ptr())
    metadata = metadata | {_CHECKSUM: _checksum(tensors)}
    return _in_one_order(_safetensors().torch.save(tensors, metadata))


def _in_one_order(data: bytes) -> bytes:
    """The same file with its metadata sorted: safetensors writes it in another order each time.

    The format is the header's length in 8 bytes, little-endian, the header in JSON, padded with spaces so that the
    values after it are aligned, and the values.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(data)[end:]])


def _read_config(path: Path, model_class: str) -> dict[str, Any]:
    try:
        config = json.loads(read_file(path, _LOAD, _MAX_CONFIG_BYTES))
        version, found_class = config.pop("format_version"), config.pop("model_class")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{_LOAD}: {path} is not a model's configuration or is corrupt: {shortened(error)}"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{_LOAD}: expected {path} of format_version {FORMAT_VERSION}, got {shortened(version)}; "
            "it was written by another version of llmkern"
        )
    if found_class != model_class:
        raise ValueError(
            f"{_LOAD}: expected {path} of model_class {model_class}, got {shortened(found_class)}"
        )
    return config  # type: ignore[no-any-return]


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    check_readable(path, _LOAD)  # safetensors calls an unreadable file a missing one
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, *_UNREADABLE) as error:
        raise ValueError(f"{_LOAD}: {path} is corrupt or cut off: {shortened(error)}") from error
    if _CHECKSUM in metadata and _checksum(tensors) != metadata[_CHECKSUM]:
        raise ValueError(
            f"{_LOAD}: {path} is corrupt: its values do not match its checksum {shortened(metadata[_CHECKSUM])}"
        )
    return tensors, metadata


def _check_same_save(folder: Path, config: dict[str, Any], metadata: dict[str, str]) -> None:
    """Weights from other tools carry no metadata of ours, and are taken as they are."""
    saved = metadata.get("llmkern_config")
    if saved is not None and _parsed(saved) != config:
        raise ValueError(
            f"{_LOAD}: {folder / CONFIG_NAME} and {folder / WEIGHTS_NAME} are not from the same save; "
            f"the weights were made with {shortened(saved)}"
        )
    expected = metadata.get("llmkern_tokenizer")
    path = folder / TOKENIZER_NAME
    if expected is None:
        return
    got = hashlib.sha256(read_file(path, _LOAD, _MAX_TOKENIZER_BYTES)).hexdigest()
    if got != expected:
        raise ValueError(
            f"{_LOAD}: {path} is not the tokenizer the model was saved with "
            f"(sha256 {got[:12]}, expected {expected[:12]})"
        )


def _parsed(text: str) -> Any:
    """The value of a JSON text; of one that is damaged, a value that equals nothing."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return math.nan
