# SPDX-License-Identifier: Apache-2.0
"""A model in a folder: config.json, model.safetensors, tokenizer.json.

The three files belong together. model.safetensors therefore carries, in its metadata, the configuration it was made
with, a checksum of its tensors and the hash of its tokenizer. A save that was cut off between two renames, or a file
copied from elsewhere, is then an error with a name instead of a model that writes nonsense.
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from llmkern._files import write_files
from llmkern._optional import require
from llmkern.text import Tokenizer

FORMAT_VERSION = 1
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
            ValueError: a file is corrupt, of another format or model class, or the files do not belong together.
        """
        folder = Path(folder)
        config = _read_config(folder / CONFIG_NAME, cls.__name__)
        tensors, metadata = _read_weights(folder / WEIGHTS_NAME)
        _check_same_save(folder, config, metadata)
        try:
            with torch.random.fork_rng(
                devices=[]
            ):  # the values are replaced: spare the caller's stream
                model = cls(**config)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"llmkern.from_pretrained: {folder / CONFIG_NAME} does not describe a {cls.__name__}: {error}"
            ) from error
        _load_tensors(model, tensors, folder / WEIGHTS_NAME)  # type: ignore[arg-type]
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
    """crc32 over names, shapes and values: safetensors notices a cut file, not a changed byte."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(f"{name}{list(tensors[name].shape)}".encode(), crc)
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _weights_bytes(model: nn.Module, metadata: dict[str, str]) -> bytes:
    tensors = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:  # a tied weight is stored once
            tensors[name] = tensor.detach().cpu().contiguous()
            seen.add(tensor.data_ptr())
    metadata = metadata | {"llmkern_crc32": _checksum(tensors)}
    return _safetensors().torch.save(tensors, metadata)  # type: ignore[no-any-return]


def _read_config(path: Path, model_class: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"llmkern.from_pretrained: expected a model folder with {path.name}, found no file {path}"
        )
    try:
        config = json.loads(path.read_bytes())
        version, found_class = config.pop("format_version"), config.pop("model_class")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"llmkern.from_pretrained: {path} is not a model's configuration or is corrupt: {error!r}"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"llmkern.from_pretrained: expected {path} of format_version {FORMAT_VERSION}, got {version!r}; "
            "it was written by another version of llmkern"
        )
    if found_class != model_class:
        raise ValueError(
            f"llmkern.from_pretrained: expected {path} of model_class {model_class}, got {found_class!r}"
        )
    return config  # type: ignore[no-any-return]


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"llmkern.from_pretrained: found no file {path}")
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"llmkern.from_pretrained: {path} is corrupt or cut off: {error}"
        ) from error
    if _checksum(tensors) != metadata.get("llmkern_crc32", _checksum(tensors)):
        raise ValueError(
            f"llmkern.from_pretrained: {path} is corrupt: its values do not match its checksum "
            f"{metadata['llmkern_crc32']}"
        )
    return tensors, metadata


def _check_same_save(folder: Path, config: dict[str, Any], metadata: dict[str, str]) -> None:
    """Weights from other tools carry no metadata of ours, and are taken as they are."""
    saved = metadata.get("llmkern_config")
    if saved is not None and json.loads(saved) != config:
        raise ValueError(
            f"llmkern.from_pretrained: {folder / CONFIG_NAME} and {folder / WEIGHTS_NAME} are not from the same "
            f"save; the weights were made with {saved}"
        )
    expected = metadata.get("llmkern_tokenizer")
    path = folder / TOKENIZER_NAME
    if expected is None:
        return
    if not path.is_file():
        raise FileNotFoundError(f"llmkern.from_pretrained: found no file {path}")
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    if got != expected:
        raise ValueError(
            f"llmkern.from_pretrained: {path} is not the tokenizer the model was saved with "
            f"(sha256 {got[:12]}, expected {expected[:12]})"
        )


def _load_tensors(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    state = model.state_dict()
    shared = {tensor.data_ptr() for name, tensor in state.items() if name in tensors}
    missing = [n for n, t in state.items() if n not in tensors and t.data_ptr() not in shared]
    unexpected = [name for name in tensors if name not in state]
    if missing or unexpected:
        raise ValueError(
            f"llmkern.from_pretrained: {path} does not fit the model: missing {missing}, unexpected {unexpected}"
        )
    model.to({t.dtype for t in tensors.values() if t.is_floating_point()}.pop())
    state = model.state_dict()
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"llmkern.from_pretrained: {path}: expected {name} of shape {list(state[name].shape)}, "
                f"got {list(tensor.shape)}"
            )
        state[name].copy_(tensor)
