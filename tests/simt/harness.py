# SPDX-License-Identifier: Apache-2.0
"""Runs kernels of a host-compiled library on numpy arrays: ``Kernels.run("EmbeddingForward<float, int32_t>", ...)``.

Arrays are copied into buffers of emulated device memory, which lie far apart and know which of their bytes were
written; what a checker finds is raised as ``KernelError``.
"""

import ctypes
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from . import build

# For tests that plant a fault, or launch tens of thousands of blocks.
checkers_only = pytest.mark.skipif(
    build.FLAVOUR != "check",
    reason="under AddressSanitizer faults end the process, and threads start slowly",
)

# float16 arrays go where the kernel has float16; bfloat16 is unknown to numpy and travels as uint16.
DTYPES = {"bool": np.dtype(bool), "bfloat16": np.dtype(np.uint16)}


class KernelError(Exception):
    """What a checker found, or what the launch threw, with addresses of code turned into file and line."""


@dataclass(frozen=True)
class Output:
    """An array that the kernel must write from its first byte to its last."""

    shape: int | tuple[int, ...]
    dtype: type | str


@dataclass(frozen=True)
class Scratch:
    """An array for the kernel's own use: never written before it, and not looked at after it."""

    shape: int | tuple[int, ...]
    dtype: type | str


@dataclass(frozen=True)
class SameAs:
    """The memory of another field, which the contract allows."""

    name: str


@dataclass(frozen=True)
class Field:
    name: str
    offset: int
    size: int
    kind: str

    @property
    def element(self) -> str:
        return self.kind.removeprefix("const ").removesuffix("*")


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 (uint16) nearest to float32 values, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bits (uint16)."""
    return (np.ascontiguousarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


class Kernels:
    """A library of kernels with the structs its binding declares."""

    def __init__(self, path: Path) -> None:
        self.runtime = ctypes.CDLL(str(build.ROOT / build.OUT / "libsimt.so"))
        self.runtime.simt_buffer.restype = ctypes.c_void_p
        self.runtime.simt_never_written.restype = ctypes.c_int64
        self.library = ctypes.CDLL(str(path))
        self.library.simt_describe.restype = self.library.simt_run.restype = ctypes.c_char_p
        self.structs: dict[str, tuple[int, int, dict[str, Field]]] = {}
        while text := self.library.simt_describe(ctypes.c_size_t(len(self.structs))):
            name, size, *rest = text.decode().split(";")
            fields = [Field(n, int(o), int(s), k) for n, o, s, k in (f.split(":") for f in rest)]
            self.structs[name.strip("()")] = len(self.structs), int(size), _complete(fields, size)

    def configure(self, *, multiprocessors: int = 4, capability: int = 90) -> None:
        """Sets what the host code asks the device: its size and its compute capability times ten."""
        self.runtime.simt_configure(multiprocessors, capability)

    def run(self, struct: str, **values: object) -> dict[str, np.ndarray]:
        """Calls cuda::run with the struct filled from `values`, one for every field.

        Args:
            struct: its name as in the binding.
            values: numbers; for pointers to const an array; for other pointers an `Output`, a `Scratch` or an array,
                which the kernel then updates; `SameAs`; None for a null pointer.

        Returns:
            The arrays after the call, by field, for every `Output` and every updated array.

        Raises:
            KernelError: a checker found something, or the launch failed.
        """
        index, size, fields = self.structs[struct]
        if fields.keys() != values.keys():
            raise TypeError(f"{struct} has the fields {list(fields)}, got {list(values)}")
        memory = ctypes.create_string_buffer(size)
        pointers = {}
        try:
            for name in sorted(values, key=lambda name: isinstance(values[name], SameAs)):
                data, pointer = self._pack(fields[name], values[name], pointers)
                memory[fields[name].offset : fields[name].offset + fields[name].size] = data
                if pointer is not None and not isinstance(values[name], SameAs):
                    pointers[name] = pointer
            if (error := self.library.simt_run(ctypes.c_size_t(index), memory)) is not None:
                raise KernelError(_readable(error.decode()))
            return self._results(struct, fields, values, pointers)
        finally:
            self.runtime.simt_free_all()

    def _pack(
        self, field: Field, value: object, pointers: dict[str, int]
    ) -> tuple[bytes, int | None]:
        if isinstance(value, SameAs):
            return pointers[value.name].to_bytes(8, "little"), pointers[value.name]
        if not field.kind.endswith("*"):
            return np.array(value, np.dtype(field.kind)).tobytes(), None
        if value is None:
            return bytes(field.size), None
        fresh = isinstance(value, Output | Scratch)
        array = np.empty(value.shape, value.dtype) if fresh else np.ascontiguousarray(value)
        constant = field.kind.startswith("const ")
        if constant and fresh:
            raise TypeError(f"{field.name} is read only: it needs an array")
        expected = DTYPES.get(field.element) or _dtype(field.element)
        if expected is not None and array.dtype != expected:
            raise TypeError(f"{field.name} points to {field.element}, got {array.dtype}")
        contents = None if fresh else array.ctypes.data_as(ctypes.c_void_p)
        address = self.runtime.simt_buffer(
            field.name.encode(), ctypes.c_size_t(array.nbytes), contents, int(constant)
        )
        if address is None:
            raise MemoryError(f"no room for {field.name}, {array.nbytes} bytes")
        return address.to_bytes(8, "little"), address

    def _results(
        self, struct: str, fields: dict[str, Field], values: dict, pointers: dict[str, int]
    ) -> dict[str, np.ndarray]:
        results = {}
        for name, address in pointers.items():
            value = values[name]
            if isinstance(value, Scratch) or fields[name].kind.startswith("const "):
                continue
            result = np.empty(value.shape, value.dtype)
            if isinstance(value, Output) and build.FLAVOUR == "check":
                hole = self.runtime.simt_never_written(ctypes.c_void_p(address))
                if hole >= 0:
                    position = tuple(
                        map(int, np.unravel_index(hole // result.itemsize, result.shape))
                    )
                    raise KernelError(
                        f"simt: unwritten output: {struct} leaves {name}{list(position)} unwritten"
                    )
            ctypes.memmove(result.ctypes.data, address, result.nbytes)
            results[name] = result
        return results


def _dtype(element: str) -> np.dtype | None:
    """The numpy type of a C++ type; None for a struct, which takes any array of the right bytes."""
    return None if element.startswith("struct") else np.dtype(element)


def _complete(fields: list[Field], size: str) -> dict[str, Field]:
    """The fields by name; a binding that forgot one would leave it zero, so gaps must be padding."""
    end = 0
    for field in sorted(fields, key=lambda f: f.offset):
        if field.offset - end >= min(field.size, 8):
            raise TypeError(f"the binding misses a field before {field.name}")
        end = field.offset + field.size
    if int(size) - end >= 8:
        raise TypeError(f"the binding misses a field after {fields[-1].name}")
    return {field.name: field for field in fields}


def _readable(report: str) -> str:
    """Replaces "[library+0x123]" by "(file.cu:12)": the first place that is not in the emulated CUDA headers."""

    def place(match: re.Match[str]) -> str:
        command = ["addr2line", "-ie", match[1], match[2]]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.split()
        places = [line for line in lines if ":" in line and "simt/include" not in line]
        return f" ({Path(places[0]).resolve().relative_to(build.ROOT)})" if places else ""

    return re.sub(r" \[(\S+)\+(0x[0-9a-f]+)\]", place, report)
