"""Freed memory is kept for the next step."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyro_seq as seq
from pyro_seq.infer.smc.kept import Kept

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


FILTER = """
import sys, torch
import pyro_seq as seq
sys.path.insert(0, {tests!r})
from models import LocalLevel
torch.set_num_threads(1)
seq.ParticleFilter(LocalLevel(), 500_000).run(torch.zeros(1, {steps}))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of the C library of Linux")
def test_a_filter_of_many_particles_takes_no_more_memory_for_more_steps():
    """What is kept of each step must not stand in the way of reusing what is not. A block is of 2 MB: allowed are a hundred of
    them, which are the holes that there are at any length; a block for each of the 240 steps more is too many."""
    tests = str(Path(__file__).parent)
    short, long = (int(subprocess.run([sys.executable, "-c", FILTER.format(tests=tests, steps=steps)], check=True,
                                      capture_output=True).stdout) for steps in (60, 300))
    assert long - short < 200_000  # kB


@pytest.mark.parametrize("counts", [[3] * 5, [3] * 40, [4] * 20 + [3] * 9 + [1] * 21, [2] * 16 + [1] * 16])
def test_what_is_told_of_each_step_is_put_together(counts):
    lengths = [sum(count > place for count in counts) for place in reversed(range(counts[0]))]
    packed = seq.Sequences.of(torch.zeros(counts[0], len(counts)), lengths=torch.tensor(lengths)).packed
    assert packed.counts == counts
    values, kept = [torch.randn(count, 2) for count in counts], Kept(packed)
    for value in values:
        kept.append(value)
    found = packed.sort(kept.padded())
    assert found.shape == (counts[0], len(counts), 2)
    for t, value in enumerate(values):
        assert torch.equal(found[:len(value), t], value) and not found[len(value):, t].any()
