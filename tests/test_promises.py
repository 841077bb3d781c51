# SPDX-License-Identifier: Apache-2.0
"""Every operator and layer keeps every promise on the CPU: see promises.py."""

import pytest

from tests import promises

pytestmark = pytest.mark.usefixtures("one_thread")


# torch's own, the first time it is asked for derivatives in forward mode.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@promises.every_promise_of(promises.OPS, promises.same_bits_on_any_number_of_threads)
def test_promise(promise, op):
    promise(op, "cpu")
