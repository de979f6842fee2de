"""Run the timings: ``python -m benchmarks [--threads 1] [--output benchmarks/results/speed.csv]``."""

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # pinned before torch, numpy and numba start their threads

import argparse  # noqa: E402
import platform  # noqa: E402
from pathlib import Path  # noqa: E402

import pandas as pd  # noqa: E402
import torch  # noqa: E402

from benchmarks import elbo, filters, hmm, kalman  # noqa: E402

__all__ = ["main"]


def rows(benchmark: str, seconds: dict[str, float], ours: str) -> list[dict[str, object]]:
    """One row a contestant: seconds, and how many times ours it takes."""
    return [{"benchmark": benchmark, "contestant": name, "seconds": value, "times ours": value / seconds[ours]}
            for name, value in seconds.items() if not name.startswith("log evidence")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds of each contestant (default 9)")
    parser.add_argument("--largest", type=int, default=1_000_000, help="most particles (default a million)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "speed.csv")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {platform.machine()}")

    table = rows("training step, filtering network on (z, x)", elbo.run(options.rounds, None), "SequentialELBO")
    table += rows("training step, recurrent filtering network", elbo.run(options.rounds, "gru"), "SequentialELBO")
    evidences = {}
    for count in (n for n in (1_000, 100_000, 1_000_000) if n <= options.largest):
        found = filters.run(count, max(3, options.rounds if count < 1_000_000 else options.rounds // 2))
        table += rows(f"bootstrap filter, N = {count}", found, "float32")
        evidences[count] = {k.removeprefix("log evidence, "): v for k, v in found.items() if k.startswith("log evidence")}
    table += rows("bootstrap filter, 1000 series at once", filters.many(max(3, options.rounds // 2)), "float32")
    for batch in (1, 1000):
        for task, found in kalman.run(batch, options.rounds).items():
            table += rows(f"Kalman filter, {task}, {batch} series", found, "KalmanFilter")
    frame = pd.concat([pd.DataFrame(table), hmm.main(options.rounds)], ignore_index=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(options.output, index=False, float_format="%.4g")
    print(frame.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    print("\nlog evidence (float32, float64 and particles estimate the same number):")
    print(pd.DataFrame(evidences).T.to_string(float_format=lambda v: f"{v:.4f}"))
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    main()
