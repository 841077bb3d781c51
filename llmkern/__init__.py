# SPDX-License-Identifier: Apache-2.0
"""Fused kernels for recurrent language models in PyTorch.

import llmkern

lstm = llmkern.nn.LSTM(256, 512, num_layers=2)        # instead of torch.nn.LSTM
output, (h_n, c_n) = lstm(torch.randn(35, 20, 256))   # [T, B, I] -> [T, B, H]
llmkern.convert(model)                                # or all such layers of a model, in place
drawn = llmkern.ops.sample(logits, temperature=0.8, top_p=0.9, seed=1)
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING

from llmkern import _native

_native.load()

from llmkern import nn, ops  # noqa: E402  (they use the operators that load() registers)
from llmkern._info import info  # noqa: E402
from llmkern.nn.conversion import convert, revert  # noqa: E402

try:
    __version__ = version("llmkern")
except PackageNotFoundError:  # a source tree with the library built in place, never installed
    __version__ = "0+source"

__all__ = ["__version__", "convert", "info", "nn", "ops", "revert"]

# Imported where they are first asked for: `import llmkern` is for the layers, and fast.
_LAZY = {"benchmark", "generation", "models", "onnx", "text", "training", "transformers"}

if TYPE_CHECKING:
    from llmkern import benchmark, generation, models, onnx, text, training, transformers  # noqa: F401
else:

    def __getattr__(name: str) -> ModuleType:
        if name in _LAZY:
            return importlib.import_module(f"llmkern.{name}")
        raise AttributeError(f"module 'llmkern' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*__all__, *_LAZY})
