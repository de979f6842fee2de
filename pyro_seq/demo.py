"""The demo: one model of the Nile's flow, declared once, and four ways to infer its level."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.optim import ClippedAdam
from torch import Tensor
from tqdm import tqdm

from pyro_seq.guide import SequentialGuide
from pyro_seq.guides.avf import AmortizedVariationalFilter
from pyro_seq.guides.recurrent import FilteringGuide
from pyro_seq.infer.compare import Comparison, compare
from pyro_seq.infer.elbo import SequentialELBO
from pyro_seq.infer.kalman import KalmanFilter
from pyro_seq.infer.particle_filter import ParticleFilter
from pyro_seq.infer.variational import Variational
from pyro_seq.model import SequentialModel, StateSpaceModel

__all__ = ["EXACT_LOG_EVIDENCE", "LocalLevel", "as_text", "compare_on_nile", "nile", "save_figure", "train"]

EXACT_LOG_EVIDENCE = -639.3007238
"""Of :class:`LocalLevel` on :func:`nile`, nats."""


class LocalLevel(StateSpaceModel):
    """A level that walks at random, observed with noise: the variances are those estimated for the Nile by maximum
    likelihood.

    Source: Durbin and Koopman, *Time Series Analysis by State Space Methods*, 2012, chapter 2.
    """

    def initial(self) -> Tensor:
        mean = torch.tensor(1000.0, dtype=torch.float64)
        return pyro.sample("level", dist.Normal(mean, math.sqrt(1e5)))

    def transition(self, level: Tensor) -> Tensor:
        return pyro.sample("level", dist.Normal(level, math.sqrt(1469.1)))

    def emission(self, level: Tensor, flow: Tensor | None = None) -> Tensor:
        return pyro.sample("flow", dist.Normal(level, math.sqrt(15099.0)), obs=flow)


def nile() -> dict[str, Tensor]:
    """Annual flow of the Nile at Aswan, 1871 to 1970, in 10^8 cubic metres: ``{"flow": (1, 100)}``."""
    from statsmodels.datasets import nile as dataset

    volume = dataset.load_pandas().data["volume"].to_numpy(dtype=float)
    return {"flow": torch.tensor(volume, dtype=torch.float64)[None]}


def train(model: SequentialModel, guide: SequentialGuide, data: Any, steps: int, label: str) -> None:
    """Fit a guide by SVI, with a progress bar."""
    optimiser = ClippedAdam({"lr": 0.03, "lrd": 0.02 ** (1 / steps)})  # the rate decays, or its noise stays in the bound
    svi = SVI(model, guide, optimiser, loss=SequentialELBO(num_particles=32))
    bar = tqdm(range(steps), desc=label)
    for _ in bar:
        bar.set_postfix_str(f"bound {-svi.step(data):.1f}", refresh=False)


def compare_on_nile(steps: int = 300, seed: int = 0) -> Comparison:
    """Run four methods on one declared model.

    Both learned guides read the same: the current flow and the last level. A guide with a recurrent encoding could
    remember this one series, and its bound would flatter it.

    :param steps: SVI steps for each of the two learned guides.
    :param seed: of all random numbers.
    """
    pyro.set_rng_seed(seed)
    data, model = nile(), LocalLevel()
    with pyro.get_param_store().scope():
        network = FilteringGuide(model, like=data, hidden=32, cell=None)
        train(model, network, data, steps, "training the filtering network")
        refined = AmortizedVariationalFilter(model, like=data, hidden=32)
        train(model, refined, data, steps, "training AVF")
        return compare({
            "Kalman filter": KalmanFilter(model),
            "particle filter": ParticleFilter(model, num_particles=1000, num_runs=16),
            "filtering network": Variational(model, network),
            "AVF": Variational(model, refined),
        }, data)


def as_text(table: Comparison) -> str:
    """The table, rounded, for a terminal."""
    columns = {
        "log evidence": [f"{v:.4f}" for v in table["log_evidence"]],
        "what it is": list(table["kind"]),
        "standard error": [f"{v:.4f}" for v in table["standard_error"]],
        "samples": ["-" if pd.isna(v) else str(v) for v in table["num_samples"]],
        "seconds": [f"{v:.2f}" for v in table["seconds"]],
    }
    return pd.DataFrame(columns, index=table.index.rename(None)).to_string()


def save_figure(table: Comparison, path: Path) -> None:
    """The estimates and the evidences of all methods, as a picture."""
    import matplotlib

    matplotlib.use("Agg")  # A file, not a window.
    axes = table.plot_comparison()
    axes[0].set(title="Level of the Nile at Aswan", xlabel="year", ylabel="annual flow, $10^8$ m$^3$")
    axes[0].xaxis.set_major_formatter(lambda t, _: f"{1870 + t:.0f}")
    axes[0].figure.savefig(path, dpi=150)
