"""One VRNN on polyphonic music under the ELBO, IWAE and FIVO of as many particles: ``python -m benchmarks.fivo``.

Protocol. As in ``benchmarks/chorales.py``: splits of Boulanger-Lewandowski et al. (2012), factorised Bernoulli output, every
frame scored, nats per frame summed over all test frames, the weights of the epoch that is best on the validation split, three
seeds, and the same setting for every row (SETTING of chorales, chosen there for the ELBO). The guide is the VRNN's own gated
filter. Only the loss changes: the ELBO averaged over N particles, IWAE of N, and FIVO of N with systematic resampling below
half. The weight of the KL is not annealed, since a bound by weights has none; one row more has the ELBO of one particle
annealed, as in chorales.

Every row gets the time of ``--epochs`` epochs of the ELBO of one particle (and a learning-rate schedule of that length), by the
seconds per epoch that ``--time`` has measured: one epoch of each row in turn, three rounds, medians, on an idle machine with
one thread. What the validation split costs is not counted; it is scored by the row's own bound, since that is what one would
have. All rows are then evaluated alike, by the ELBO and by a particle filter of 128. ``--table`` writes the summary.

A row that is there already is not run again; a run that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import argparse  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import median  # noqa: E402
from typing import Any  # noqa: E402

import pandas as pd  # noqa: E402
import pyro  # noqa: E402
import torch  # noqa: E402

import pyro_seq as seq  # noqa: E402
from benchmarks.chorales import ANNEALED, EPOCHS, PARTICLES, SETTING, _add, _has  # noqa: E402
from pyro_seq.data import load_polyphonic  # noqa: E402
from pyro_seq.models import VRNN, VRNNInference, match_marginals  # noqa: E402

__all__ = ["LOSSES", "main"]

LOSSES = {"ELBO, annealed": seq.SequentialELBO, "ELBO": seq.SequentialELBO, "IWAE": seq.IWAE, "FIVO": seq.FIVO}
ROWS = [("ELBO, annealed", 1), ("ELBO", 1), *((loss, n) for n in (4, 8, 16) for loss in ("ELBO", "IWAE", "FIVO"))]


def build(data: Any, seed: int) -> tuple[Any, Any]:
    """An untrained model and its guide."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    model = VRNN(88)
    match_marginals(model, data.train)
    return model, VRNNInference(model, residual=True)


def options(data: str, loss: str, particles: int) -> dict[str, Any]:
    """Of ``fit``, for one row."""
    annealing = ANNEALED[data] if loss == "ELBO, annealed" else 0
    return SETTING | {"kl_annealing": annealing, "loss": LOSSES[loss](particles)}


def run(key: dict[str, Any], data: Any, epochs: int, folder: Path) -> dict[str, Any]:
    """Train and evaluate one row."""
    model, guide = build(data, key["seed"])
    stem = "-".join(str(v) for v in (*key.values(), epochs)).replace(" ", "_").replace(",", "")
    row = key | {"epochs": epochs}
    try:
        result = seq.fit(model, guide, data.train, valid=data.valid, epochs=epochs, seed=key["seed"],
                         checkpoint=folder / f"{stem}.ckpt", **options(key["data"], key["loss"], key["particles"]))
    except ValueError as error:
        if "finite" not in str(error) and "the bound is" not in str(error):
            raise
        return row | {"note": "diverged"}
    result.history.to_csv(folder / f"{stem}.csv", index=False)
    found = seq.evaluate(model, guide, data.test, num_samples=10, num_particles=PARTICLES, progress=True)
    elbo, bound = found.loc["ELBO"], found.loc["particle bound"]
    return row | {
        "ELBO": elbo["nats per frame"], "ELBO s.e.": elbo["standard error"],
        f"{PARTICLES}-particle bound": bound["nats per frame"],
        "valid": result.best, "best epoch": result.best_epoch, "training seconds": result.history["seconds"].iloc[-1]}


def time_epochs(name: str, data: Any, rounds: int = 3) -> pd.DataFrame:
    """Seconds of one training epoch of each row, by turns."""
    seconds: dict[tuple[str, int], list[float]] = {row: [] for row in ROWS}
    for _ in range(rounds):
        for row in ROWS:
            model, guide = build(data, seed=0)
            result = seq.fit(model, guide, data.train, epochs=1, progress=False, **options(name, *row))
            seconds[row].append(float(result.history["seconds"].iloc[0]))
    return pd.DataFrame([{"loss": loss, "particles": particles, "seconds per epoch": median(found)}
                         for (loss, particles), found in seconds.items()])


def table(results: Path, times: Path) -> pd.DataFrame:
    """Mean and standard deviation over seeds of each row."""
    keys, bound = ["data", "loss", "particles", "budget"], f"{PARTICLES}-particle bound"
    parts = pd.read_csv(results).groupby(keys, sort=False).agg(
        seeds=("seed", "size"), epochs=("epochs", "first"), elbo=("ELBO", "mean"), elbo_sd=("ELBO", "std"),
        bound=(bound, "mean"), bound_sd=(bound, "std")).reset_index()
    parts = parts.merge(pd.read_csv(times), how="left", on=["loss", "particles"])
    parts["order"] = [ROWS.index((row.loss, row.particles)) for row in parts.itertuples()]
    parts = parts.sort_values(["data", "budget", "order"])

    def spread(mean: float, deviation: float) -> str:
        return "" if pd.isna(mean) else f"{mean:.3f}" + ("" if pd.isna(deviation) else f"\u00a0±\u00a0{deviation:.3f}")

    return pd.DataFrame({
        "data": parts["data"], "trained by": parts["loss"], "particles": parts["particles"], "seeds": parts["seeds"],
        "epochs": parts["epochs"],
        "ELBO": [spread(m, d) for m, d in zip(parts["elbo"], parts["elbo_sd"], strict=True)],
        bound: [spread(m, d) for m, d in zip(parts["bound"], parts["bound_sd"], strict=True)],
        "s / epoch": parts["seconds per epoch"].map("{:.2f}".format)})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fivo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=sorted(EPOCHS), default="jsb")
    parser.add_argument("--losses", nargs="+", choices=sorted(LOSSES), default=sorted(LOSSES))
    parser.add_argument("--particles", nargs="+", type=int, default=[1, 4, 8, 16], help="rows to run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=80, help="of the ELBO of one particle; others get the same time")
    parser.add_argument("--folder", type=Path, default=Path("output/fivo"), help="of checkpoints and histories")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fivo.csv")
    parser.add_argument("--time", action="store_true", help="measure the seconds per epoch, and nothing else")
    parser.add_argument("--table", action="store_true", help="write the summary, and nothing else")
    given = parser.parse_args()
    times, summary = (given.output.with_name(f"{given.output.stem}_{part}.csv") for part in ("time", "table"))
    if given.table:
        table(given.output, times).to_csv(summary, index=False)
        return
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    data = load_polyphonic(given.data)
    if given.time:
        times.parent.mkdir(parents=True, exist_ok=True)
        time_epochs(given.data, data).to_csv(times, index=False, float_format="%.3g")
        return
    cost = pd.read_csv(times).set_index(["loss", "particles"])["seconds per epoch"]
    given.folder.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        for loss, particles in ROWS:
            key = {"data": given.data, "loss": loss, "particles": particles, "seed": seed, "budget": given.epochs}
            if loss in given.losses and particles in given.particles and not _has(given.output, key):
                print(key, flush=True)
                epochs = max(1, round(given.epochs * cost["ELBO", 1] / cost[loss, particles]))
                _add(given.output, run(key, data, epochs, given.folder))


if __name__ == "__main__":
    main()
