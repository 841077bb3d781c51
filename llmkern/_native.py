# SPDX-License-Identifier: Apache-2.0
"""Loads the native operators, or says what was found, what was expected and what to run."""

import torch

MINIMUM_TORCH = (2, 10)


def _torch_version() -> tuple[int, int]:
    major, minor, *_ = torch.__version__.split(".")
    return int(major), int(minor)


def load() -> None:
    """Registers ``torch.ops.llmkern``.

    Raises:
        ImportError: torch is older than 2.10, the native library is missing or cannot be loaded, or ``LLMKERN_CPU`` or
            ``LLMKERN_CORES`` has a value that means nothing here.
    """
    if _torch_version() < MINIMUM_TORCH:
        raise ImportError(
            f"llmkern: expected torch >= 2.10, got {torch.__version__}. Run: pip install --upgrade torch"
        )
    try:
        import llmkern._C  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "llmkern: could not load the native library llmkern/_C.abi3.so.\n"
            f"  found:    torch {torch.__version__}; {error}\n"
            "  expected: the library that `pip install` builds beside this package, for this machine\n"
            "  run:      pip install llmkern, or in a source checkout: "
            "pip install --no-build-isolation -e ."
        ) from error
    try:
        torch.ops.llmkern.cpu_isa()
        torch.ops.llmkern.usable_cores()
    except ValueError as error:
        raise ImportError(str(error)) from error
