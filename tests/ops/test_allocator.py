"""Freed memory stays with the process: measured by the pages that the system has to bring anew."""

import platform
import subprocess
import sys

import pytest

PAGES_OF_TEN_ROUNDS = """
import resource, sys
import torch
from mpformer.ops.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()

def round():
    torch.zeros(48 << 20, dtype=torch.uint8), torch.zeros(8 << 20, dtype=torch.uint8)

for _ in range(10):  # until the blocks have found their places
    round()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    round()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages(how: str) -> int:
    command = [sys.executable, "-c", PAGES_OF_TEN_ROUNDS, how]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_memory_that_was_freed_is_not_fetched_again():
    # 48 MiB are at least 24 large or 12,288 small pages, ten times
    assert pages("default") > 200
    assert pages("kept") < 20
