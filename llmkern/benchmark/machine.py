# SPDX-License-Identifier: Apache-2.0
"""Facts about the machine and the software that a figure is worth nothing without."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import llmkern

_CPU = Path("/sys/devices/system/cpu")
_CACHE_DEFAULTS = {2: 1 << 20, 3: 16 << 20}  # where the system does not tell
# The parts of /proc/cpuinfo's flags that kernels are chosen by.
_FLAGS = re.compile(r"(sse4|avx|fma|f16c|bmi|amx|asimd|sve|bf16|i8mm|fphp)")
# Settings that change a timing, by the beginning of their names.
_ENVIRONMENT = (
    *("OMP_", "KMP_", "GOMP_", "MKL_", "DNNL_", "ONEDNN_", "MALLOC_", "LLMKERN_CPU"),
    *("CUDA_", "PYTORCH_", "TORCH_", "NVIDIA_TF32", "CUBLAS_", "CUDNN_"),
)


def cache_bytes(level: int, threads: int) -> int:
    """Bytes of the unified caches of a level that so many threads have at most between them."""
    instances: dict[str, int] = {}
    for cache in _CPU.glob("cpu[0-9]*/cache/index*"):
        try:
            if _read(cache / "level") == str(level) and _read(cache / "type") == "Unified":
                instances[_read(cache / "shared_cpu_list")] = _bytes(_read(cache / "size"))
        except (OSError, ValueError):
            continue
    sizes = sorted(instances.values(), reverse=True)
    return sum(sizes[:threads]) if sizes else _CACHE_DEFAULTS[level]


def machine_facts() -> dict[str, Any]:
    """Processor, caches, memory and governor, as far as they can be read."""
    model, flags = _processor()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "flags": flags,
        "l2_bytes": cache_bytes(2, os.cpu_count() or 1),
        "l3_bytes": cache_bytes(3, os.cpu_count() or 1),
        "governor": _read_or_none(_CPU / "cpu0" / "cpufreq" / "scaling_governor"),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def gpu_facts(device: torch.device) -> dict[str, Any] | None:
    """The GPU, its driver and its state before the run; None for a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **_nvidia_smi(device.index or 0),
    }


def _nvidia_smi(index: int) -> dict[str, str]:
    """Driver, clocks, power limit and load as nvidia-smi tells them; nothing where it does not."""
    fields = ["driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem"]
    fields += ["power.limit", "temperature.gpu", "utilization.gpu", "mig.mode.current"]
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields)}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(fields, (value.strip() for value in done.stdout.split(",")), strict=False))


def software_facts() -> dict[str, Any]:
    """Versions, the instruction set in use, the git commit of a checkout, and the environment's settings."""
    return {
        **llmkern.info(),
        "git_commit": _git_commit(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_ENVIRONMENT)
        },
    }


def command() -> str:
    """The command line of this process, absolute paths cut to their last part."""
    return " ".join(Path(a).name if os.path.isabs(a) else a for a in sys.orig_argv)


def _processor() -> tuple[str, list[str]]:
    text = _read_or_none(Path("/proc/cpuinfo")) or ""
    fields = dict(re.findall(r"^(model name|flags|Features)\s*: (.*)$", text, re.M))
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    model = fields.get("model name") or platform.processor() or platform.machine()
    return model, sorted(flag for flag in flags if _FLAGS.match(flag))


def _git_commit() -> str | None:
    """The checkout this package is imported from, "+modified" added where it differs from the commit."""
    package = Path(llmkern.__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository, which does not track it.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + ("+modified" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _bytes(size: str) -> int:
    """ "512K" is 524288."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(size[:-1]) * units[size[-1]] if size[-1] in units else int(size)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip()


def _read_or_none(path: Path) -> str | None:
    try:
        return _read(path)
    except OSError:
        return None
