"""Freed memory is kept for the next step."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
{setup}
def step():
    return sum(torch.ones(400_000, dtype=torch.float64)[::4096].sum() for _ in range(8)) + sum(
        part[::4096].sum() for part in [torch.ones(400_000, dtype=torch.float64) for _ in range(8)])
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(setup):
    return int(subprocess.run([sys.executable, "-c", PROGRAM.format(setup=setup)], check=True, capture_output=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of the C library of Linux")
def test_what_a_step_frees_the_next_step_has_without_asking_the_system():
    """Five steps of 16 blocks of 3.2 MB, in pages of 4 kB: tens of thousands of page faults where blocks are given back; few
    where they are not, those of a system short of memory."""
    given_back = faults("")
    assert given_back > 5000 and faults("import pyro_seq") < given_back / 5
