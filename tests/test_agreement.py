"""The engine's fast path against Pyro's own losses on the unrolled program: the same draws, the same numbers."""

import pytest
import torch
from cases import guides
from models import VRNN, DeepMarkov, TwoSites, ragged
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyro_seq as seq

LENGTHS = torch.tensor([4, 6, 1, 5])


def with_gaps(x):
    """Missing single entries, and a missing whole frame."""
    x = x.clone()
    x[0, 1, 0] = torch.nan
    x[1, 3] = torch.nan
    x[3, 4, ..., -1] = torch.nan
    return x


class Replayed:
    """Feeds the values of a guide's Pyro trace to the engine, and the same trace to Pyro's losses.

    The inner draws of AVF, which no trace shows, get fixed noise per sequence and time in both.
    """

    def __init__(self, guide, batch, monkeypatch, row_noise):
        self.guide, self.noise, self.inner, self.trace = guide, row_noise, False, None
        monkeypatch.setattr("pyro_seq.engine.sites.draw", self.draw)
        monkeypatch.setattr("pyro_seq.engine.loop.draw", self.draw)
        if isinstance(guide, seq.AmortizedVariationalFilter):
            free_energy = guide._step_free_energy

            def marked(*args):
                self.inner = True
                try:
                    return free_energy(*args)
                finally:
                    self.inner = False

            monkeypatch.setitem(guide.__dict__, "_step_free_energy", marked)
        with poutine.trace() as tr:
            guide(batch)
        self.trace = tr.trace

    def draw(self, fn, name, frame):
        if self.inner:
            return self.noise.draw(fn, name, frame)
        rows = []
        for row in range(frame.rows):
            t = frame.t if isinstance(frame.t, int) else int(frame.t[row])
            key = f"{name}_{t}" if f"{name}_{t}" in self.trace else f"{name}_{t}_missing"
            rows.append(self.trace.nodes[key]["value"][frame.sequence[row]])
        return torch.stack(rows)

    def __call__(self, *args, **kwargs):
        return poutine.replay(self.guide, trace=self.trace)(*args, **kwargs)


def gradients(loss, *modules):
    parameters = [p for module in modules for p in module.parameters()]
    return torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)


def assert_same(first, second, tolerance=1e-10):
    for a, b in zip(first, second, strict=True):
        a, b = (torch.zeros(()) if v is None else v for v in (a, b))
        torch.testing.assert_close(a.expand(b.shape) if a.dim() == 0 else a, b.expand(a.shape) if b.dim() == 0 else b,
                                   rtol=tolerance, atol=tolerance)


MODELS = {
    "deep Markov": (lambda: DeepMarkov(gaussian=True), lambda: torch.randn(4, 6, 4)),
    # Discrete data: a gap that the state does not read must not be taken for a draw with a score function.
    "binary frames": (lambda: DeepMarkov(), lambda: torch.bernoulli(torch.full((4, 6, 4), 0.5))),
    "VRNN": (lambda: VRNN(), lambda: torch.randn(4, 6, 4)),
    "VRNN without advance": (lambda: VRNN(with_advance=False), lambda: torch.randn(4, 6, 4)),
    "two sites": (lambda: TwoSites(), lambda: torch.randn(4, 6, 3)),
}


@pytest.mark.parametrize("missing", [False, True], ids=["complete", "missing"])
@pytest.mark.parametrize("guide", ["filtering", "direct", "smoothing", "avf"])
@pytest.mark.parametrize("model", MODELS)
def test_sequential_elbo_equals_pyro(model, guide, missing, monkeypatch, row_noise):
    make, data = MODELS[model]
    model = make()
    x = ragged(data(), LENGTHS)
    batch = seq.Sequences.of(with_gaps(x) if missing else x, LENGTHS)
    guide = guides(model, batch)[guide]()
    for parameter in guide.parameters():  # away from the zero that heads start at
        parameter.data += 0.1 * torch.randn_like(parameter)
    replayed = Replayed(guide, batch, monkeypatch, row_noise)
    for analytic, pyros in ((False, Trace_ELBO()), (True, TraceMeanField_ELBO())):
        expected = pyros.differentiable_loss(model, replayed, batch)
        actual = seq.SequentialELBO(analytic_kl=analytic).differentiable_loss(model, guide, batch)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        assert_same(gradients(actual, model, guide), gradients(expected, model, guide))
