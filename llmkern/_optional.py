# SPDX-License-Identifier: Apache-2.0
"""Loading of the packages that only the extra ``llmkern[text]`` brings.

Texts, training and saved models use them. They are imported where they are first used: ``import llmkern`` and its
subpackages stay fast and work without them, and a missing one is reported with the command that installs it.
"""

import importlib
import warnings
from types import ModuleType


def require(package: str, purpose: str) -> ModuleType:
    """Import an optional package.

    Warnings raised while it loads are dropped: they are about that package's own source (jieba's
    regular expressions, for one), which no user of llmkern can act on.

    Args:
        package: Name of the package, as it is imported.
        purpose: What it is needed for, as the error says it.

    Returns:
        The imported module.

    Raises:
        ImportError: The package is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"llmkern: expected the package '{package}' ({purpose}), got '{error}'; "
            "run: pip install 'llmkern[text]'"
        ) from error
