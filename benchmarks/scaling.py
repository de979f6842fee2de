"""How cost grows, eager and compiled: ``python -m benchmarks.scaling [--rounds 3]``.

A training step (loss and gradients, one sample) of ``pyro_seq.models.DeepMarkovModel`` with 88 notes, against the length T and
the size B of a batch and the latent size, with a filtering network, and against the iterations K of AVF; and a bootstrap filter
of 100 steps against its particles N. What is not varied is T = 100, B = 20 and 64 latents. Medians of interleaved calls after
compilation, processor time on one pinned thread, seed 0; ``results/scaling.csv`` and ``results/scaling.png``.
"""

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import argparse  # noqa: E402
from collections.abc import Callable  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import matplotlib  # noqa: E402

matplotlib.use("agg")

import matplotlib.pyplot as plt  # noqa: E402
import pandas as pd  # noqa: E402
import pyro  # noqa: E402
import torch  # noqa: E402

import pyro_seq as seq  # noqa: E402
from benchmarks.elbo import BATCH, HIDDEN, LATENT, NOTES, STEPS  # noqa: E402
from benchmarks.filters import StochasticVolatility  # noqa: E402
from benchmarks.timing import interleaved  # noqa: E402
from pyro_seq.models import DeepMarkovModel  # noqa: E402

__all__ = ["VARIED", "draw", "main", "run"]

VARIED = {
    "T": ("steps T", "training step", (25, 50, 100, 200, 400)),
    "B": ("sequences B", "training step", (5, 20, 80, 320)),
    "latent": ("latents", "training step", (16, 32, 64, 128, 256)),
    "K": ("AVF iterations K", "training step", (1, 2, 4, 8)),
    "N": ("particles N", "bootstrap filter", (100, 1_000, 10_000, 100_000, 1_000_000))}
"""What is varied: its label, the work, and the values."""


def training_step(T: int = STEPS, B: int = BATCH, latent: int = LATENT, K: int = 0) -> dict[str, Callable[[], Any]]:
    """Both contestants; ``K = 0`` is the filtering network."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = DeepMarkovModel(NOTES, latent)
    guide = (seq.AmortizedVariationalFilter(model, K) if K else
             seq.FilteringGuide(model, hidden=HIDDEN, residual=False, cell=None))
    batch = seq.Sequences.of(torch.bernoulli(torch.full((B, T, NOTES), 0.1)))
    losses = {"eager": seq.SequentialELBO(), "compiled": seq.SequentialELBO(compile=True)}
    return {name: partial(loss.loss_and_grads, model, guide, batch) for name, loss in losses.items()}


def bootstrap_filter(N: int) -> dict[str, Callable[[], Any]]:
    """Both contestants."""
    pyro.set_rng_seed(0)
    model = StochasticVolatility()
    x = model.simulate([STEPS])["x"]
    methods = {"eager": seq.ParticleFilter(model, N), "compiled": seq.ParticleFilter(model, N, compile=True)}
    return {name: partial(method.run, x) for name, method in methods.items()}


def run(rounds: int) -> pd.DataFrame:
    """One row a contestant and value."""
    rows = []
    for name, (_, work, values) in VARIED.items():
        make = bootstrap_filter if work == "bootstrap filter" else training_step
        for value in values:
            for contestant, seconds in interleaved(make(**{name: value}), rounds, warmup=3).items():
                rows.append({"varied": name, "value": value, "work": work, "contestant": contestant,
                             "milliseconds": 1e3 * seconds})
            print(pd.DataFrame(rows[-2:]).to_string(index=False, header=False), flush=True)
    return pd.DataFrame(rows)


def draw(frame: pd.DataFrame) -> plt.Figure:
    """One panel for each thing that is varied, with a line of slope one to compare with."""
    figure, axes = plt.subplots(1, len(VARIED), figsize=(2.3 * len(VARIED), 2.6), sharey=True, layout="constrained")
    for axis, (name, (label, work, _)) in zip(axes, VARIED.items(), strict=True):
        panel = frame[frame["varied"] == name]
        for contestant, style in (("eager", "o-"), ("compiled", "s-")):
            part = panel[panel["contestant"] == contestant]
            axis.plot(part["value"], part["milliseconds"], style, markersize=4, label=contestant)
        values = sorted(panel["value"].unique())
        last = panel.loc[panel["value"] == values[-1], "milliseconds"].max()
        axis.plot(values, [last * value / values[-1] for value in values], color="0.8", linewidth=1, linestyle="--", zorder=0,
                  label="proportional")
        axis.set(xscale="log", yscale="log", xlabel=label, title=work,
                 ylim=(frame["milliseconds"].min() / 2, 2 * frame["milliseconds"].max()))
        if name != "N":  # a few values, to be named
            axis.set_xticks(values, [str(value) for value in values])
            axis.minorticks_off()
    axes[0].set_ylabel("milliseconds")
    axes[0].legend(frameon=False, fontsize="small")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds of each contestant (default 3)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "scaling.csv")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    pyro.enable_validation(False)
    frame = run(options.rounds)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(options.output, index=False, float_format="%.4g")
    draw(frame).savefig(options.output.with_suffix(".png"), dpi=150)
    print(f"written to {options.output} and {options.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
