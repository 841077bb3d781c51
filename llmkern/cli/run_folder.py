# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: is it free, and what was in it."""

import shutil
from pathlib import Path

from llmkern.models.pretrained import CONFIG_NAME, TOKENIZER_NAME, WEIGHTS_NAME
from llmkern.training import list_checkpoints
from llmkern.training.run_log import DATA_NAME, LOG_NAME, TENSORBOARD_NAME


def check_unused(folder: Path) -> None:
    """Raises a FileExistsError if a run lives here."""
    if list_checkpoints(folder):
        raise FileExistsError(
            f"--output: {folder} holds a run; give --resume to go on with it, --overwrite to replace it"
        )


def clear(folder: Path) -> None:
    """Removes the files a run writes, and nothing else."""
    for path in list_checkpoints(folder):
        path.unlink()
    for name in (CONFIG_NAME, WEIGHTS_NAME, TOKENIZER_NAME, LOG_NAME, DATA_NAME):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / TENSORBOARD_NAME, ignore_errors=True)
