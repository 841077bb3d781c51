# SPDX-License-Identifier: Apache-2.0
"""What was built, what this machine has, what is in use: the first thing a bug report needs."""

import json
import os
import platform
from typing import Any

import torch


def info() -> dict[str, Any]:
    """Facts about this installation.

    Returns:
        A flat dict of JSON values: versions of llmkern, torch and Python; the CUDA architectures compiled in ("" for a
        CPU build); the CPU instruction set detected and the one in use (``LLMKERN_CPU`` overrides it); torch's threads
        and the cores that this process may use (``LLMKERN_CORES`` overrides them); GPUs.

    Example:
        >>> import llmkern
        >>> llmkern.info()["cpu_isa"] in ("generic", "avx2", "avx512")
        True
    """
    import llmkern

    built = json.loads(torch.ops.llmkern.build_info())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "llmkern": llmkern.__version__,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_target_version": built["torch_target_version"],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "compiler": built["compiler"],
        "cuda_version": built["cuda_version"],
        "cuda_architectures": built["cuda_architectures"],
        "cpu_isa_detected": torch.ops.llmkern.cpu_isa_detected(),
        "cpu_isa": torch.ops.llmkern.cpu_isa(),
        "cpu_isa_override": os.environ.get("LLMKERN_CPU", ""),
        "threads": torch.get_num_threads(),
        "usable_cores": torch.ops.llmkern.usable_cores(),
        "gpus": gpus,
    }
