"""What compiling gains: ``python -m benchmarks.compiled [--rounds 15] [--device cpu|cuda] [--dtype float32|bfloat16]``.

Training steps (loss and gradients; batch 20, 100 steps, 88 binary notes, 64 latents, one sample, no analytic KL) of the deep
Markov model of ``elbo.py`` and of the VRNN and SRNN of ``pyro_seq.models`` (128 hidden units), each with a filtering network
and with AVF; the bootstrap filters of ``filters.py``; the Kalman filters of ``kalman.py``. Contestants: compiled
and eager; Pyro's ``Trace_ELBO`` on the same model and guide; a torch loop written by hand, with its densities spelled out; JAX
written by hand and jitted (``jaxed.py``, where it is installed); ``particles``, asked for the evidence and the moments; and a
floor: the matrix products of the eager step at the rate of one large product, in the faster of torch's two libraries, or a
filter's normal numbers and one pass over memory.

Weights are the initial ones, stirred a little, since an untrained guide has gradients of zero. All contestants draw the same
numbers, but for JAX's and ``particles``' filters, so that their losses or evidences agree (a filter's in float32 up to 1000
particles, of more of which rounding will have one choose another ancestor): ``relative difference`` is that from
eager, and in float32 one above 1e-4 is an error. ``first call`` is what it takes on the clock, in seconds, until all is
compiled: three calls, without Inductor's cache on disk; of the others it is the first call. ``steps to repay`` is that over
what each later one saves against eager. ``peak megabytes`` is the most memory a call takes beyond what is held before it, where
that can be told (Linux, CUDA).
Milliseconds are of interleaved calls, medians, seed 0: processor time on one pinned thread, or the clock's for a GPU.
``--dtype bfloat16`` has the weights and the data of the training steps in that format.
"""

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS",
                 "TORCHINDUCTOR_FORCE_DISABLE_CACHES"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import argparse  # noqa: E402
import ctypes  # noqa: E402
import gc  # noqa: E402
import math  # noqa: E402
import platform  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pyro  # noqa: E402
import torch  # noqa: E402
from pyro.infer import Trace_ELBO  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import pyro_seq as seq  # noqa: E402
from benchmarks import elbo, filters, jaxed, kalman, loops  # noqa: E402
from benchmarks.elbo import BATCH, HIDDEN, LATENT, NOTES, STEPS  # noqa: E402
from benchmarks.timing import interleaved  # noqa: E402
from pyro_seq.engine.memory import MMAP_THRESHOLD, TRIM_THRESHOLD, keep_freed_memory  # noqa: E402
from pyro_seq.models import SRNN, VRNN  # noqa: E402

__all__ = ["GUIDES", "MODELS", "Machine", "build", "exact", "main", "particle_filter", "training_step"]

MODELS = {"DMM": elbo.DeepMarkov, "VRNN": lambda: VRNN(NOTES, LATENT, HIDDEN), "SRNN": lambda: SRNN(NOTES, LATENT, HIDDEN)}
GUIDES = {
    "filtering network": lambda model: seq.FilteringGuide(model, hidden=HIDDEN, residual=False, cell=None),
    "filtering network with a GRU": lambda model: seq.FilteringGuide(model, hidden=HIDDEN, residual=False),
    "AVF, K=1": lambda model: seq.AmortizedVariationalFilter(model, 1),
    "AVF, K=2": lambda model: seq.AmortizedVariationalFilter(model, 2)}
LOOPS = {"DMM": elbo.spelled_out, "VRNN": loops.vrnn, "SRNN": loops.srnn}
STIRRED = 0.005
"""The standard deviation of what is added to each weight."""
SHARED = 1e-4
"""The largest relative difference between contestants that draw the same numbers, in float32."""


class Machine(NamedTuple):
    """Where the contestants run, and in what."""

    device: str
    dtype: torch.dtype

    @property
    def is_plain(self) -> bool:
        """Whether the contestants that know only float32 on a CPU take part."""
        return self.device == "cpu" and self.dtype == torch.float32

    def done(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        """``fn``, until the device has done what it asked for."""
        if self.device == "cpu":
            return fn

        def run() -> Any:
            value = fn()
            torch.cuda.synchronize()
            return value

        return run

    def peak_megabytes(self, fn: Callable[[], Any]) -> float:
        """The most that a call holds beyond what is held before; NaN where that cannot be told. The holes that the C library
        leaves between kept blocks do not count: it asks the system for each large one here."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            fn()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        return min(_peak_megabytes(fn) for _ in range(3))  # at first it may take what was kept of earlier calls

    def floor_seconds(self, step: Callable[[], Any]) -> float:
        """The time of the matrix products of ``step``, if they were one large one."""
        with FlopCounterMode(display=False) as count:
            step()
        size = 1024 if self.device == "cpu" else 8192
        a, b = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        products = {"matmul": lambda: a @ b}
        if self.device == "cpu" and torch.backends.mkldnn.is_available():
            products["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return count.get_total_flops() / (2 * size**3) * min(self.seconds(products, 10).values())

    def seconds(self, contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
        """Medians of interleaved calls."""
        clock = time.process_time if self.device == "cpu" else time.perf_counter
        return interleaved({name: self.done(fn) for name, fn in contestants.items()}, rounds, clock=clock)

    def compare(self, model: str, method: str, contestants: dict[str, Callable[[], float]], rounds: int,
                floor: Callable[[], float] | None = None, apart: dict[str, float] | None = None) -> list[dict[str, Any]]:
        """One row a contestant.

        :param contestants: each returns the number that all agree on; one of them is ``"compiled"``, and one ``"eager"``.
        :param floor: seconds.
        :param apart: those that draw numbers of their own, and how far they may be off.
        :raises ValueError: if contestants disagree.
        """
        value, first, apart = {}, {}, apart or {}
        for name, fn in contestants.items():
            torch.manual_seed(0)
            start = time.perf_counter()
            value[name] = self.done(fn)()
            for _ in range(2 if name == "compiled" else 0):  # the first runs as written, the others compile
                torch.manual_seed(0)
                value[name] = self.done(fn)()
            first[name] = time.perf_counter() - start
        seconds = self.seconds(contestants, rounds)
        rows = []
        for name, fn in contestants.items():
            difference = abs(value[name] - value["eager"])
            if self.dtype == torch.float32 and not difference <= apart.get(name, SHARED * abs(value["eager"])):
                raise ValueError(f"{model}, {method}: {name} says {value[name]}, and eager {value['eager']}")
            saved = seconds["eager"] - seconds[name]
            rows.append({
                "model": model, "method": method, "contestant": name, "milliseconds": 1e3 * seconds[name],
                "times compiled": seconds[name] / seconds["compiled"],
                "relative difference": math.nan if name in apart else difference / abs(value["eager"]),
                "first call": first[name],
                "steps to repay": math.ceil(first[name] / saved) if name == "compiled" and saved > 0 else math.nan,
                "peak megabytes": self.peak_megabytes(self.done(fn))})
        if floor is not None:
            found = floor()
            rows.append({"model": model, "method": method, "contestant": "floor", "milliseconds": 1e3 * found,
                         "times compiled": found / seconds["compiled"]})
        print(pd.DataFrame(rows).to_string(index=False, float_format=lambda v: f"{v:.4g}"), flush=True)
        return rows


def _peak_megabytes(fn: Callable[[], Any]) -> float:
    gc.collect()
    try:
        library = ctypes.CDLL(None)
        library.mallopt(MMAP_THRESHOLD, 2**18)
        library.mallopt(TRIM_THRESHOLD, 0)
        fn()
        library.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is held
    except (OSError, AttributeError, TypeError):
        return math.nan
    before = _status("VmRSS")
    fn()
    found = _status("VmHWM") - before
    keep_freed_memory()
    return found


def _status(key: str) -> float:
    """Megabytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def build(model: str, guide: str, machine: Machine) -> tuple[Any, Any]:
    """A model and its guide, from seed 0."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    built = MODELS[model]().to(machine.device, machine.dtype)
    made = GUIDES[guide](built)
    with torch.no_grad():
        for parameter in (*built.parameters(), *made.parameters()):
            parameter.add_(STIRRED * torch.randn_like(parameter))
    return built, made


def training_step(model: str, guide: str, rounds: int, machine: Machine) -> list[dict[str, Any]]:
    """Time the training steps of one model with one guide."""
    built, made = build(model, guide, machine)
    x = torch.bernoulli(torch.full((BATCH, STEPS, NOTES), 0.1)).to(machine.device, machine.dtype)
    batch = seq.Sequences.of(x)
    losses = {"compiled": seq.SequentialELBO(analytic_kl=False, compile=True), "eager": seq.SequentialELBO(analytic_kl=False),
              "Pyro Trace_ELBO": Trace_ELBO()}
    contestants = {name: lambda loss=loss: loss.loss_and_grads(built, made, batch) for name, loss in losses.items()}
    if isinstance(made, seq.FilteringGuide):
        contestants["torch loop by hand"] = lambda: LOOPS[model](built, made, x)
        jitted = jaxed.training_step(built, made, x) if machine.is_plain else None
        if jitted is not None:
            contestants["JAX by hand, jitted"] = lambda: jitted()[0]
    rows = machine.compare(model, guide, contestants, rounds, lambda: machine.floor_seconds(contestants["eager"]))
    if "JAX by hand, jitted" in contestants:
        jaxed.check(jitted, losses["eager"], built, made, x)
    return rows


def particle_filter(num_particles: int, rounds: int, machine: Machine) -> list[dict[str, Any]]:
    """Time the bootstrap filters of one number of particles; six standard errors are how far those of others may be off."""
    import particles
    from particles import collectors, state_space_models

    pyro.set_rng_seed(0)
    np.random.seed(0)
    model = filters.StochasticVolatility()
    x = model.simulate([filters.STEPS])["x"]
    data = x[0].double().numpy()
    theirs = state_space_models.StochVol(mu=filters.MU, rho=filters.RHO, sigma=filters.SIGMA)
    x = x.to(machine.device)

    def ours(**compiled: bool) -> Callable[[], float]:
        filter_ = seq.ParticleFilter(model, num_particles, **compiled)
        return lambda: filter_.run(x).total_log_evidence

    def package() -> float:
        filter_ = particles.SMC(fk=state_space_models.Bootstrap(ssm=theirs, data=data), N=num_particles,
                                resampling="systematic", ESSrmin=0.5, collect=[collectors.Moments()])
        filter_.run()
        return filter_.logLt

    def floor() -> None:
        z = torch.empty(num_particles, device=machine.device)
        for _ in range(filters.STEPS):
            z = z + torch.randn(num_particles, device=machine.device)

    contestants = {"compiled": ours(compile=True), "eager": ours(), "particles": package}
    jitted = jaxed.particle_filter(num_particles, data) if machine.is_plain else None
    if jitted is not None:
        contestants["JAX by hand, jitted"] = lambda: float(jitted()[0])
    off = 6 * math.sqrt(2) * float(seq.ParticleFilter(model, num_particles).run(x).standard_error)
    return machine.compare("stochastic volatility", f"bootstrap filter, N = {num_particles}", contestants, rounds,
                           lambda: machine.seconds({"floor": floor}, rounds)["floor"],
                           dict.fromkeys(["particles", "JAX by hand, jitted", *["compiled"][:num_particles > 1000]], off))


def exact(rounds: int, machine: Machine) -> list[dict[str, Any]]:
    """Kalman filters, in double precision."""
    rows = []

    def add(label: str, method: str, task: Callable[[Any, torch.Tensor], float], kind: type, model: Any, x: torch.Tensor
            ) -> None:
        contestants = {"compiled": partial(task, kind(model, compile=True), x), "eager": partial(task, kind(model), x)}
        rows.extend(machine.compare(label, method, contestants, rounds))

    for batch in (1, 1000):
        pyro.set_rng_seed(0)
        torch.set_default_dtype(torch.float64)
        trend = kalman.Trend()
        x = trend.simulate([kalman.STEPS] * batch)["x"].to(machine.device)
        for what, task in (("evidence", _evidence), ("smoothing", _posterior)):
            add("local linear trend", f"Kalman filter, {what}, {batch} series", task, seq.KalmanFilter, trend, x)
    torch.set_default_dtype(torch.float32)
    return rows


def _evidence(method: Any, x: torch.Tensor) -> float:
    with torch.no_grad():
        return method.log_evidence(x).sum().item()


def _posterior(method: Any, x: torch.Tensor) -> float:
    return method.run(x).total_log_evidence


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds of each contestant (default 15)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "compiled.csv")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the training steps")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    pyro.enable_validation(False)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {platform.machine()}")
    plain = Machine(options.device, torch.float32)
    rows = []
    for model in MODELS:
        for guide in GUIDES:
            if model == "DMM" or guide != "filtering network with a GRU":  # the others have a recurrence of their own
                rows += training_step(model, guide, options.rounds, plain._replace(dtype=getattr(torch, options.dtype)))
    for count in (1_000, 100_000, 1_000_000):
        rows += particle_filter(count, options.rounds, plain)
    rows += exact(options.rounds, plain)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(options.output, index=False, float_format="%.4g")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
