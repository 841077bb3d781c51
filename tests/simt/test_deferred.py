# SPDX-License-Identifier: Apache-2.0
"""The record that kernels report wrong input to: one a device, empty at first."""

import numpy as np


def test_a_device_has_one_empty_record(simt):
    found = simt("deferred").run("DeferredRecord", found=np.full(3, -1))["found"]
    assert found.tolist() == [1, 0, 0]
