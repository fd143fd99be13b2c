"""The compiled CPU library, or the reason why it is not there."""

import pytest

from mpformer.ops.cpu import Library
from mpformer.ops.kernels import find_kernel


@pytest.fixture(scope="session")
def library() -> Library:
    """The library that runs here, skipping tests that need it where it cannot be built."""
    kernel, reason = find_kernel("cpu")
    if kernel is None:
        pytest.skip(f"no compiled CPU kernel: {reason}")
    return kernel
