# SPDX-License-Identifier: Apache-2.0
"""Every operator with a CUDA kernel, and every layer, keeps on a GPU what tests/promises.py says."""

import pytest

from tests import promises

pytestmark = pytest.mark.cuda


# torch's own, the first time it is asked for derivatives in forward mode.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@promises.every_promise_of(promises.with_cuda_kernels())
def test_promise(device, promise, op):
    promise(op, device)
