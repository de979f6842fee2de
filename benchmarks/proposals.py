"""What proposes for a particle filter, at equal time: ``python -m benchmarks.proposals``.

Protocol. Two fixed models: a VRNN trained on JSB chorales by the ELBO with its own gated filter (80 epochs, the setting of
``chorales.py``), on 20 test chorales; and stochastic volatility with the parameters of the reference (mu = -1.02, rho = 0.9702,
sigma = 0.178) on the first 200 returns of GBP/USD. Each proposal that learns is trained for the fixed model by the ELBO for the
same processor seconds (``--seconds``), on the training split, and for the returns on 200 series simulated from the model. Then
each filter gets as many particles as take the time of the bootstrap filter with the number given in PARTICLES: processor
seconds of one filter, one thread, of all series and all RUNS independent runs of each side by side, so that it is arithmetic
that counts; found by doubling and interpolation, and measured again. Reported: the effective sample size, in particles and as a
share of N, over all frames; the standard deviation over the runs of the log evidence of a series, averaged over the series; the
mean log evidence a frame of all runs together, a lower bound. Resampling is systematic, below half.
"""

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import argparse  # noqa: E402
import math  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pyro  # noqa: E402
import torch  # noqa: E402

import pyro_seq as seq  # noqa: E402
from benchmarks.chorales import SETTING  # noqa: E402
from pyro_seq.data import load_polyphonic  # noqa: E402
from pyro_seq.data.locate import data_folder  # noqa: E402
from pyro_seq.models import VRNN, StochasticVolatility, VRNNInference, match_marginals  # noqa: E402

__all__ = ["compare_proposals", "main"]

Proposals = dict[str, Callable[[Any, Any], Any]]

LEARNED: Proposals = {
    "network": lambda model, like: seq.FilteringGuide(model, like=like, cell=None, hidden=128),
    "AVF K=1": lambda model, like: seq.AmortizedVariationalFilter(model, like=like),
    "AVF K=2": lambda model, like: seq.AmortizedVariationalFilter(model, like=like, iterations=2),
    "AVF without gradient": lambda model, like: seq.AmortizedVariationalFilter(model, like=like, gradient=False),
}


def train(model: Any, guide: Any, data: Any, seconds: float, seed: int, **options: Any) -> None:
    """Raise the bound in the guide alone for as many epochs as the seconds allow."""
    options = {**SETTING, "kl_annealing": 0, "progress": False, "seed": seed, **options}
    before = {k: v.clone() for k, v in guide.state_dict().items()}
    start = time.process_time()
    seq.fit(model, guide, data, epochs=1, **options)
    epochs = max(1, round(seconds / (time.process_time() - start)))
    guide.load_state_dict(before)
    seq.fit(model, guide, data, epochs=epochs, **options)


def seconds_of(method: Any, x: Any) -> float:
    """Processor seconds of one filter, after a first one."""
    method.run(x.select([0]))
    start = time.process_time()
    method.run(x)
    return time.process_time() - start


def affordable(make: Callable[[int], Any], x: Any, budget: float) -> int:
    """The number of particles that takes the time of the budget, at least two."""
    count, before = 2, (0, 0.0)
    while (taken := seconds_of(make(count), x)) < budget:
        before, count = (count, taken), 2 * count
    share = (budget - before[1]) / (taken - before[1])
    return max(2, round(before[0] + share * (count - before[0])))


def compare_proposals(model: Any, guides: dict[str, Any], x: Any, particles: int, runs: int) -> pd.DataFrame:
    """A row for each proposal."""
    x = seq.Sequences.of(x)
    many = x.repeat(runs)
    budget = seconds_of(seq.ParticleFilter(model, particles), many)
    rows = []
    for name, guide in {"prior": None, **guides}.items():
        def make(count: int, guide: Any = guide) -> Any:
            return seq.ParticleFilter(model, count, guide=guide)

        count = particles if guide is None else affordable(make, many, budget)
        start = time.process_time()
        posterior = make(count).run(many)
        seconds = time.process_time() - start
        evidence, ess = posterior.log_evidence.reshape(runs, -1), posterior.ess[many.active].mean().item()
        rows.append({"proposal": name, "particles": count, "seconds": seconds, "ESS": ess, "ESS share": ess / count,
                     "sd of log evidence": evidence.std(0).mean().item(),
                     "log evidence per frame": (evidence.logsumexp(0) - math.log(runs)).sum().item() / int(x.lengths.sum())})
        print(pd.Series(rows[-1]).to_string(), flush=True)
    return pd.DataFrame(rows)


def chorales(seconds: float, seed: int) -> tuple[Any, dict[str, Any], Any]:
    data = load_polyphonic("jsb")
    pyro.clear_param_store()
    torch.manual_seed(seed)
    model = VRNN(88)
    match_marginals(model, data.train)
    own = VRNNInference(model, residual=True)
    seq.fit(model, own, data.train, valid=data.valid, epochs=80, kl_annealing=20, seed=seed, **SETTING)
    guides = {"trained with the model": own}
    model.requires_grad_(False)
    for name, make in LEARNED.items():
        guides[name] = make(model, data.train.select(range(50)))
        train(model, guides[name], data.train, seconds, seed)
    return model, guides, data.test.select(range(20))


def volatility(seconds: float, seed: int) -> tuple[Any, dict[str, Any], Any]:
    pyro.clear_param_store()
    torch.manual_seed(seed)
    model = StochasticVolatility({"mu": -1.02, "rho": 0.9702, "sigma": 0.178})
    path = data_folder() / "timeseries" / "GBP_vs_USD_9798.txt"
    rates = torch.tensor(np.loadtxt(path, skiprows=2, usecols=(3,), comments="("))
    returns = (100 * rates.log().diff())[None, :200].float()
    model.requires_grad_(False)
    series = seq.Sequences.of(model.simulate([200] * 200)["x"])
    guides = {}
    for name, make in LEARNED.items():
        guides[name] = make(model, series.select(range(50)))
        train(model, guides[name], series, seconds, seed, weight_decay=0.0)
    return model, guides, returns


PROBLEMS = {"stochastic volatility, GBP/USD": volatility, "VRNN, JSB": chorales}
PARTICLES = {"stochastic volatility, GBP/USD": 1000, "VRNN, JSB": 128}
RUNS = {"stochastic volatility, GBP/USD": 100, "VRNN, JSB": 10}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proposals", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, each proposal (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "proposals.csv")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tables = []
    for name, problem in PROBLEMS.items():
        model, guides, x = problem(options.seconds, options.seed)
        table = compare_proposals(model, guides, x, PARTICLES[name], RUNS[name])
        table.insert(0, "model", name)
        tables.append(table)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        pd.concat(tables).to_csv(options.output, index=False, float_format="%.4g")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
