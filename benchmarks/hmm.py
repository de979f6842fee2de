"""Hidden Markov models: 100 sequences of 200 scalar Gaussian frames, against ``hmmlearn`` and Pyro's ``DiscreteHMM``.

Protocol: one model, dense transitions, float64, one thread; median of interleaved runs. Ours is ``ForwardBackward.run``: the
evidence by step, filtered and smoothed probabilities and moments. ``hmmlearn`` is asked for ``score`` and ``predict_proba``, in
its default implementation (logarithms) and in its faster one (scaling, which raises an error where it underflows). The floor
is the two matrix products a step that no way round takes away, and one exponential a state and frame. For learning: the
evidence and its gradient in all parameters.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_seq as seq
from benchmarks.timing import interleaved

__all__ = ["gradient", "main", "run"]

SEQUENCES, STEPS = 100, 200


class Gaussian(seq.StateSpaceModel):
    def __init__(self, states: int):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.initial_logits = nn.Parameter(torch.randn(states, generator=g))
        self.logits = nn.Parameter(torch.randn(states, states, generator=g))
        self.locs = nn.Parameter(3 * torch.randn(states, generator=g))

    def initial(self):
        return pyro.sample("k", dist.Categorical(logits=self.initial_logits))

    def transition(self, k):
        return pyro.sample("k", dist.Categorical(logits=self.logits[k]))

    def emission(self, k, x=None):
        return pyro.sample("x", dist.Normal(self.locs[k], 1.0), obs=x)


def _problem(states: int) -> tuple[Gaussian, torch.Tensor]:
    torch.set_default_dtype(torch.float64)
    pyro.enable_validation(False)
    pyro.set_rng_seed(0)
    model = Gaussian(states)
    return model, model.simulate([STEPS] * SEQUENCES)["x"]


def run(states: int, rounds: int) -> dict[str, float]:
    """Seconds a pass over the batch of each contestant, and the log evidence of each."""
    from hmmlearn.hmm import GaussianHMM

    model, x = _problem(states)
    evidence: dict[str, float] = {}

    def theirs(implementation: str):
        hmm = GaussianHMM(states, "diag", implementation=implementation, init_params="")
        hmm.startprob_ = model.initial_logits.softmax(-1).detach().numpy()
        hmm.transmat_ = model.logits.softmax(-1).detach().numpy()
        hmm.means_, hmm.covars_ = model.locs.detach().numpy()[:, None], np.ones((states, 1))
        data, lengths = x.reshape(-1, 1).numpy(), [STEPS] * SEQUENCES

        def both() -> None:
            evidence[f"hmmlearn, {implementation}"] = hmm.score(data, lengths)
            hmm.predict_proba(data, lengths)

        return both

    def ours() -> None:
        evidence["ForwardBackward"] = seq.ForwardBackward(model).run(x).total_log_evidence

    transition, rows = model.logits.softmax(-1).detach(), torch.rand(SEQUENCES, states)
    back, emission = transition.T.contiguous(), torch.randn(STEPS, SEQUENCES, states)

    def floor() -> None:
        emission.exp()
        for _ in range(STEPS):
            rows @ transition
            rows @ back

    found = interleaved({"ForwardBackward": ours, "hmmlearn, log": theirs("log"), "hmmlearn, scaling": theirs("scaling"),
                         "floor": floor}, rounds)
    torch.set_default_dtype(torch.float32)
    return found | {f"log evidence, {name}": value for name, value in evidence.items()}


def gradient(states: int, rounds: int) -> dict[str, float]:
    """Seconds for the evidence and its gradient."""
    model, x = _problem(states)
    evidence: dict[str, float] = {}

    def differentiate(name: str, value: torch.Tensor) -> None:
        torch.autograd.grad(value, list(model.parameters()))
        evidence[name] = value.item()

    def ours() -> None:
        differentiate("ForwardBackward", seq.ForwardBackward(model).log_evidence(x).sum())

    def package() -> None:  # its first transition comes before the first frame
        first = model.initial_logits.expand(1, states, states)
        transitions = torch.cat([first, model.logits.expand(STEPS - 1, states, states)])
        hmm = dist.DiscreteHMM(model.initial_logits, transitions, dist.Normal(model.locs, 1.0), duration=STEPS)
        differentiate("DiscreteHMM", hmm.log_prob(x).sum())

    found = interleaved({"ForwardBackward": ours, "DiscreteHMM": package}, rounds)
    torch.set_default_dtype(torch.float32)
    return found | {f"log evidence, {name}": value for name, value in evidence.items()}


def main(rounds: int = 5) -> pd.DataFrame:
    """One row a contestant: seconds, and how many times ours it takes. Pyro's gradient is left out at 64 states, where it needs
    200 x 100 x 64^3 numbers at once."""
    found = {f"filter and smooth, {states} states": run(states, rounds) for states in (8, 64)}
    found["evidence and gradient, 8 states"] = gradient(8, rounds)
    return pd.DataFrame([
        {"benchmark": benchmark, "contestant": name, "seconds": value, "times ours": value / seconds["ForwardBackward"]}
        for benchmark, seconds in found.items() for name, value in seconds.items() if not name.startswith("log evidence")])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(main().to_string(index=False, float_format=lambda v: f"{v:.4g}"))
