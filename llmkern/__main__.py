# SPDX-License-Identifier: Apache-2.0
"""``python -m llmkern`` is the command ``llmkern``."""

from llmkern.cli import main

if __name__ == "__main__":
    main()
