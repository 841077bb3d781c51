# SPDX-License-Identifier: Apache-2.0
"""What a GPU can do, measured in the same run as the kernels: matrix products by dtype, the bandwidth of L2 and memory.

As on a CPU these are torch's own operators at their best, hence lower bounds. Data are random: products of zeros draw
less power and run at a higher clock.
"""

import os
from collections.abc import Callable
from typing import Any

import torch

from llmkern.benchmark.ceilings import Ceilings, Level
from llmkern.benchmark.device import EventClock

METHODS = {
    "peak": "best of torch.mm at 4096 and 8192 on random data; float32 without TF32",
    "read": "best of Tensor.sum and Tensor.amax, float32",
    "copy": "best of Tensor.copy_, bytes counted both ways",
    "L2": "half of the cache, the best of calls in a row: launch gaps are within, so a low bound",
    "DRAM": "4 GiB, or an eighth of the memory",
}
_PRODUCTS = (torch.float32, torch.bfloat16, torch.float16)
_CALLS = 50  # in a row, for probes as short as a launch


def measure_cuda_ceilings(device: torch.device | str = "cuda", seconds: float = 0.1) -> Ceilings:
    """Measures a GPU.

    Args:
        device: which.
        seconds: time for each of about a dozen probes.

    Returns:
        The ceilings.
    """
    device = torch.device(device)
    load_average = os.getloadavg()[0]
    properties = torch.cuda.get_device_properties(device)
    cache, memory = properties.L2_cache_size, min(4 << 30, properties.total_memory // 8)
    with torch.inference_mode(), torch.cuda.device(device), device:
        peaks = {
            dtype: max(_product_rate(n, dtype, seconds) for n in (4096, 8192))
            for dtype in _PRODUCTS
        }
        levels = (
            Level("L2", cache, *_bandwidths(cache // 2, _CALLS, seconds)),
            Level("DRAM", float("inf"), *_bandwidths(memory, 1, seconds)),
        )
    torch.cuda.empty_cache()
    return Ceilings(torch.get_num_threads(), load_average, peaks, levels, device, METHODS)


def _product_rate(n: int, dtype: torch.dtype, seconds: float) -> float:
    a, b, out = (torch.randn(n, n).to(dtype) for _ in range(3))
    return 2.0 * n**3 / _best(lambda: torch.mm(a, b, out=out), 1, seconds)


def _bandwidths(buffer: int, calls: int, seconds: float) -> tuple[float, float]:
    """Bytes/s read and copied, with so many bytes in use."""
    data = torch.randn(buffer // 4)
    read = min(_best(run, calls, seconds) for run in (data.sum, data.amax))
    source, target = data.view(2, -1) if data.numel() % 2 == 0 else data[:-1].view(2, -1)
    copy = _best(lambda: target.copy_(source), calls, seconds)
    return data.nbytes / read, 2 * source.nbytes / copy


def _best(run: Callable[[], Any], calls: int, seconds: float) -> float:
    """The shortest of at least five samples of so many calls, a call's share of it."""
    clock = EventClock()
    run()
    best, end, samples = float("inf"), clock() + seconds, 0
    while samples < 5 or clock() < end:
        start = clock()
        for _ in range(calls):
            run()
        best = min(best, clock() - start)
        samples += 1
    return best / calls
