# SPDX-License-Identifier: Apache-2.0
"""Philox 4x32-10 and the masks of csrc/kernels/mask.h in numpy: the judge of what the kernels draw."""

import numpy as np

DROPOUT, ZONEOUT_CELL, ZONEOUT_HIDDEN = 2, 3, 4


def philox(key: int, counters: np.ndarray) -> np.ndarray:
    """counters uint64 [n, 4] of 32 bits each -> the words, uint64 [n, 4] (Salmon et al. 2011, figure 2)."""
    c0, c1, c2, c3 = counters.astype(np.uint64).T
    low, high = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1 = (b >> shift) ^ c1 ^ np.uint64(low), b & mask
        c2, c3 = (a >> shift) ^ c3 ^ np.uint64(high), a & mask
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1)


def mask(seed: int, purpose: int, rows: int, columns: int, p: float) -> np.ndarray:
    """bool [rows, columns]."""
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    group, j = row * -(-columns // 16) + column // 16, column % 16
    index = (4 * group + j % 4).reshape(-1).astype(np.uint64)
    counters = np.zeros((index.size, 4), np.uint64)
    counters[:, 0], counters[:, 1] = index & np.uint64(0xFFFFFFFF), index >> np.uint64(32)
    counters[:, 2] = purpose
    words = philox(seed % 2**64, counters)[np.arange(index.size), (j // 4).reshape(-1)]
    return (words.astype(np.float64) < p * 2.0**32).reshape(rows, columns)
