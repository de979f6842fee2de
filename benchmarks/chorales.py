"""Deep Markov model and VRNN on polyphonic music, under each kind of guide: ``python -m benchmarks.chorales``.

Protocol. Splits of Boulanger-Lewandowski et al. (2012); factorised Bernoulli output; every frame scored, the first from an
empty past; padding not. Nats per frame, summed over all test frames. The same setting for every row (SETTING), chosen on the
validation split by trials with the VRNN's own gated filter, and none tuned for a row: equal updates, equal search. The weights
evaluated are those of the epoch that is best on the validation split. Three seeds. Each update is the mean over its own
frames (``normalise="batch"``, not the default of ``fit``): so the rows were trained.

``--budget updates`` (the default) gives every row the same epochs. ``--budget time`` gives it as many as take the time of the
model's own direct filter (and a learning-rate schedule of that length; annealing takes as long as ever), by the seconds per
epoch that ``--time`` has measured: one epoch of each row in turn, three rounds, medians, on an idle machine with one thread.
``--table`` writes the summary that the documentation shows.

A row that is there already is not run again; a run that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import argparse  # noqa: E402
import fcntl  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import median  # noqa: E402
from typing import Any  # noqa: E402

import pandas as pd  # noqa: E402
import pyro  # noqa: E402
import torch  # noqa: E402

import pyro_seq as seq  # noqa: E402
from pyro_seq.data import load_polyphonic  # noqa: E402
from pyro_seq.models import (  # noqa: E402
    VRNN,
    DeepMarkovModel,
    StructuredInference,
    VRNNInference,
    match_marginals,
)

__all__ = ["GUIDES", "SETTING", "main"]

SETTING = dict(batch_size=20, learning_rate=3e-3, schedule="cosine", warmup=50, clip=5.0, weight_decay=0.3, averaging=0.99,
               normalise="batch")
ANNEALED = {"jsb": 20, "piano_midi": 2}
"""Epochs over which the weight of the latents is raised to one, however long the run: with a share of shorter runs instead, all
that were tried did worse on the validation split, and deep Markov models lost their latents."""
EPOCHS = {"jsb": 80, "piano_midi": 10}
WINDOW = {"jsb": None, "piano_midi": 100}
PARTICLES = 128

MODELS: dict[str, Callable[[], Any]] = {"dmm": lambda: DeepMarkovModel(88), "vrnn": lambda: VRNN(88)}


def _avf(cell: str | None, **options: Any) -> Callable[[Any, Any], Any]:
    return lambda model, like: seq.AmortizedVariationalFilter(model, like=like, cell=cell, **options)


# Every network has 128 units (as published, the paper preset's has 1024).
# A deep Markov model's own filter reads all frames so far, and the VRNN's the current one beside the model's state: AVF is
# given the same to read.
GUIDES: dict[str, dict[str, Callable[[Any, Any], Any]]] = {
    "dmm": {
        "own": lambda model, like: StructuredInference(model),
        "own, gated residual": lambda model, like: StructuredInference(model, residual=True),
        "AVF paper": _avf(None, preset="paper", hidden=128),
        "AVF K=1": _avf("gru"),
        "AVF K=2": _avf("gru", iterations=2),
        "AVF without gradient": _avf("gru", gradient=False),
        "smoothing": lambda model, like: StructuredInference(model, reads="future"),
    },
    "vrnn": {
        "own": lambda model, like: VRNNInference(model),
        "own, gated residual": lambda model, like: VRNNInference(model, residual=True),
        "AVF paper": _avf(None, preset="paper", hidden=128),
        "AVF K=1": _avf(None),
        "AVF K=2": _avf(None, iterations=2),
        "AVF without gradient": _avf(None, gradient=False),
        "smoothing": lambda model, like: seq.SmoothingGuide(model, like=like, hidden=128),
    },
}


def build(data: Any, model_name: str, guide_name: str, seed: int) -> tuple[Any, Any]:
    """An untrained model and its guide."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    model = MODELS[model_name]()
    match_marginals(model, data.train)
    return model, GUIDES[model_name][guide_name](model, data.train.select(range(50)))


def run(key: dict[str, Any], data: Any, epochs: int, folder: Path) -> dict[str, Any]:
    """Train and evaluate one row."""
    model, guide = build(data, key["model"], key["guide"], key["seed"])
    stem = "-".join(str(v) for v in key.values()).replace(" ", "_").replace(",", "").replace("=", "")
    row = key | {"epochs": epochs}
    try:
        result = seq.fit(model, guide, data.train, valid=data.valid, epochs=epochs, window=WINDOW[key["data"]],
                         kl_annealing=ANNEALED[key["data"]], seed=key["seed"], checkpoint=folder / f"{stem}.ckpt",
                         **SETTING)
    except ValueError as error:
        if "finite" not in str(error) and "the bound is" not in str(error):
            raise
        return row | {"note": "diverged"}
    result.history.to_csv(folder / f"{stem}.csv", index=False)
    table = seq.evaluate(model, guide, data.test, num_samples=10, num_particles=PARTICLES, progress=True)
    elbo, bound = table.loc["ELBO"], table.loc["particle bound"]
    return row | {
        "ELBO": elbo["nats per frame"], "ELBO s.e.": elbo["standard error"], "ELBO by sequence": elbo["by sequence"],
        "ELBO skip first": elbo["skip first"], f"{PARTICLES}-particle bound": bound["nats per frame"],
        "valid": result.best, "best epoch": result.best_epoch}


def time_epochs(data: Any, rounds: int = 3) -> pd.DataFrame:
    """Seconds of one training epoch of each row, by turns."""
    rows = [(model, guide) for model in GUIDES for guide in GUIDES[model]]
    seconds: dict[tuple[str, str], list[float]] = {row: [] for row in rows}
    for _ in range(rounds):
        for row in rows:
            model, guide = build(data, *row, seed=0)
            result = seq.fit(model, guide, data.train, epochs=1, progress=False, **SETTING)
            seconds[row].append(float(result.history["seconds"].iloc[0]))
    return pd.DataFrame([{"model": model, "guide": guide, "seconds per epoch": median(found)}
                         for (model, guide), found in seconds.items()])


def table(results: Path, times: Path) -> pd.DataFrame:
    """Mean and standard deviation over seeds of each row."""
    found = pd.read_csv(results)
    keys = ["data", "model", "budget", "guide"]
    parts = found.groupby(keys, sort=False).agg(
        seeds=("seed", "size"), epochs=("epochs", "first"), elbo=("ELBO", "mean"), elbo_sd=("ELBO", "std"),
        bound=(f"{PARTICLES}-particle bound", "mean"), bound_sd=(f"{PARTICLES}-particle bound", "std"),
        sequence=("ELBO by sequence", "mean"), skip=("ELBO skip first", "mean")).reset_index()
    parts = parts.merge(pd.read_csv(times), how="left", on=["model", "guide"])
    parts["order"] = [list(GUIDES[row.model]).index(row.guide) for row in parts.itertuples()]
    parts = parts.sort_values(["data", "model", "budget", "order"], ascending=[True, True, False, True])

    def spread(mean: float, deviation: float) -> str:
        return "" if pd.isna(mean) else f"{mean:.3f}" + ("" if pd.isna(deviation) else f"\u00a0±\u00a0{deviation:.3f}")

    return pd.DataFrame({
        "data": parts["data"], "model": parts["model"], "equal": parts["budget"], "guide": parts["guide"],
        "seeds": parts["seeds"], "epochs": parts["epochs"],
        "ELBO": [spread(m, d) for m, d in zip(parts["elbo"], parts["elbo_sd"], strict=True)],
        f"{PARTICLES}-particle bound": [spread(m, d) for m, d in zip(parts["bound"], parts["bound_sd"], strict=True)],
        "ELBO, by sequence": parts["sequence"].map("{:.3f}".format), "ELBO, skip first": parts["skip"].map("{:.3f}".format),
        "s / epoch": [f"{s:.2f}" if data == "jsb" else "" for s, data in zip(
            parts["seconds per epoch"], parts["data"], strict=True)]})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chorales", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=sorted(EPOCHS), default="jsb")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument("--guides", nargs="+", default=None, help="rows to run (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("output/chorales"), help="of checkpoints and histories")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "chorales.csv")
    parser.add_argument("--budget", choices=("updates", "time"), default="updates")
    parser.add_argument("--time", action="store_true", help="measure the seconds per epoch, and nothing else")
    parser.add_argument("--table", action="store_true", help="write the summary, and nothing else")
    options = parser.parse_args()
    times, summary = (options.output.with_name(f"{options.output.stem}_{part}.csv") for part in ("time", "table"))
    if options.table:
        table(options.output, times).to_csv(summary, index=False)
        return
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    data = load_polyphonic(options.data)
    if options.time:
        time_epochs(data).to_csv(times, index=False, float_format="%.3g")
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for model_name in options.models:
            for guide_name in options.guides or GUIDES[model_name]:
                key = {"data": options.data, "model": model_name, "guide": guide_name, "seed": seed, "budget": options.budget}
                if not _has(options.output, key):
                    print(key, flush=True)
                    epochs = EPOCHS[options.data]
                    if options.budget == "time":
                        cost = pd.read_csv(times).set_index(["model", "guide"])["seconds per epoch"][model_name]
                        epochs = max(1, round(epochs * cost["own"] / cost[guide_name]))
                    same = key | {"budget": "updates"}
                    if epochs == EPOCHS[options.data] and _has(options.output, same):  # it would be the same run
                        _add(options.output, _row(options.output, same) | key)
                    else:
                        _add(options.output, run(key, data, epochs, options.folder))


def _has(path: Path, key: dict[str, Any]) -> bool:
    return path.exists() and _row(path, key) is not None


def _row(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The last row of the table with these values."""
    table = pd.read_csv(path)
    rows = table[(table[list(key)] == pd.Series(key)).all(axis=1)]
    return None if rows.empty else rows.iloc[-1].to_dict()


def _add(path: Path, row: dict[str, Any]) -> None:
    """Add a row, whatever other process is adding one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        old = [pd.read_csv(path)] if path.exists() else []
        table = pd.concat([*old, pd.DataFrame([row])], ignore_index=True).sort_values(list(row)[:5])
        temporary = path.with_suffix(".part")
        table.to_csv(temporary, index=False, float_format="%.5g")
        os.replace(temporary, path)
        print(pd.Series(row).to_string(), flush=True)


if __name__ == "__main__":
    main()
