"""Interleaved timing: the contestants take turns, so that a drift of the machine hits all of them.

Seconds are of processor time, all threads together. With one pinned thread on an idle machine that is the time on the clock;
on a busy one it is what does not depend on who else is running.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

__all__ = ["interleaved"]


def interleaved(contestants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1,
                clock: Callable[[], float] = time.process_time) -> dict[str, float]:
    """Median processor seconds of one call of each contestant.

    :param clock: ``time.perf_counter`` where it is not the processor that works.
    """
    for _ in range(warmup):
        for fn in contestants.values():
            fn()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, fn in contestants.items():
            start = clock()
            fn()
            seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
