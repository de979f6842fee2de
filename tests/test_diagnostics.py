"""What one run of a particle filter says of its own errors.

Comparisons of averages over runs fail at 5 standard errors, 6e-7 each for a normal error.
"""

import math
import warnings

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import HiddenMarkov, LocalLevel, StochasticVolatility

import pyro_seq as seq
from pyro_seq.engine.loop import forward
from pyro_seq.guide import PriorGuide
from pyro_seq.infer.run import entered
from pyro_seq.infer.smc.families import Families
from pyro_seq.infer.smc.population import Population
from pyro_seq.infer.smc.record import Record
from pyro_seq.resampling import Ancestral, systematic

matplotlib.use("Agg")


def multinomial(weights):
    return torch.multinomial(weights, weights.shape[1], replacement=True)


def runs_of(model, x, particles, scheme, ess_threshold):
    """Log evidence, its standard error and the estimate of its variance for every sequence, with any resampling."""
    sequences = seq.Sequences.of(x)
    guide = PriorGuide(model)

    def run(_):
        population = Population(Ancestral(scheme), ess_threshold)
        record = Record(sequences.packed, particles)
        for step in forward(model, guide, sequences, particles, between=population.between):
            factor = population.weigh(step)
            record.add(step, population.weights, factor)
        record.finish()
        return record.evidence().sum(1), record.standard_error(), record.families.variance(population.weights.normalised)[0]

    return entered(model, guide, sequences, run)


@pytest.mark.parametrize("ess_threshold", [1.0, 0.5])
@pytest.mark.parametrize("make", [lambda: LocalLevel(0.0, 1.0, 0.5, 2.0), HiddenMarkov, StochasticVolatility])
def test_variance_of_lee_and_whiteley_is_that_over_runs(make, ess_threshold):
    """E[Z^2 V] is the variance of Z under multinomial resampling at every step; over 2000 runs."""
    model = make()
    x = model.simulate([6])["x"].expand(2000, -1)
    log_evidence, _, variance = runs_of(model, x, 100, multinomial, ess_threshold)
    z = (log_evidence - log_evidence.mean()).exp()
    # Both sides from the same runs: the variance, and its estimates, and how they differ.
    difference = z.square() * variance - (z - z.mean()).square()
    assert abs(difference.mean()) < 5 * difference.std() / math.sqrt(len(z))
    assert abs(variance.mean() / (z.var() / z.mean().square()) - 1) < 0.25


@pytest.mark.parametrize("method", [
    lambda model: seq.AuxiliaryParticleFilter(model, 100, guide=seq.KalmanGuide(model), resampling="multinomial",
                                              ess_threshold=1.0),
    lambda model: seq.ParticleFilter(model, 100, resampling=seq.resampling.Soft(0.3, "multinomial"), ess_threshold=1.0),
], ids=["fully adapted", "soft"])
def test_variance_counts_by_the_chances_of_the_ancestors(method):
    """The same where ancestors are drawn by other chances than the weights; over 2000 runs."""
    model = LocalLevel(0.0, 1.0, 0.5, 2.0)
    found = method(model).run(model.simulate([4])["x"].expand(2000, -1))
    weights = found.particles.last[1].normalised
    variance = found.particles.families.variance(weights)[0]
    z = (found.log_evidence - found.log_evidence.mean()).exp()
    difference = z.square() * variance - (z - z.mean()).square()
    assert abs(difference.mean()) < 5 * difference.std() / math.sqrt(len(z))
    assert abs(variance.mean() / (z.var() / z.mean().square()) - 1) < 0.25


def test_standard_error_of_the_fully_adapted_filter_is_about_right():
    """Systematic resampling by look-ahead weights, an approximation: within a third of the spread over runs."""
    model = LocalLevel(0.0, 2.0, 1.0, 0.3)
    method = seq.AuxiliaryParticleFilter(model, 200, guide=seq.KalmanGuide(model))
    found = method.run(model.simulate([3])["x"].expand(1000, -1))
    ratio = found.standard_error.square().nanmean().sqrt() / found.log_evidence.std()
    assert 0.7 < ratio < 1.3, ratio


@pytest.mark.parametrize("ess_threshold", [1.0, 0.5])
def test_standard_error_of_systematic_resampling_is_about_right(ess_threshold):
    """An approximation: within a third of the spread over runs, where Lee and Whiteley's own formula is often negative."""
    model = StochasticVolatility()
    x = model.simulate([40])["x"].expand(1000, -1)
    found = seq.ParticleFilter(model, 300, ess_threshold=ess_threshold).run(x)
    assert found.standard_error.isfinite().double().mean() > 0.97
    ratio = found.standard_error.square().nanmean().sqrt() / found.log_evidence.std()
    assert 0.7 < ratio < 1.3, ratio


def test_standard_error_without_resampling_is_that_of_importance_sampling():
    model = LocalLevel(0.0, 1.0, 0.5, 2.0)
    x = model.simulate([5])["x"]
    found = seq.ParticleFilter(model, 50, ess_threshold=0.0, history=True).run(x)
    weights = found.particles.steps[-1].log_weights.exp()[0]
    expected = weights.var() / 50 / weights.mean().square()
    torch.testing.assert_close(found.standard_error, expected.sqrt()[None])


def test_standard_error_of_ragged_sequences_is_that_of_each():
    """With no resampling each sequence's error is that of its own weights at its own end."""
    model = LocalLevel(0.0, 1.0, 0.5, 2.0)
    found = seq.ParticleFilter(model, 50, ess_threshold=0.0, history=True).run(torch.randn(3, 5), [3, 5, 1])
    steps = found.particles.steps
    for b, (row, end) in enumerate(((1, 3), (0, 5), (2, 1))):
        weights = steps[end - 1].log_weights.exp()[row]
        expected = (weights.var() / 50).sqrt() / weights.mean()
        torch.testing.assert_close(found.standard_error[b], expected)


def test_what_is_known_has_no_error_and_what_has_one_family_has_none_to_tell():
    model = LocalLevel(0.0, 1.0, 0.5, 0.5)
    assert (seq.ParticleFilter(model, 50).run(torch.full((1, 4), math.nan)).standard_error == 0).all()
    assert seq.ParticleFilter(model, 1).run(torch.zeros(1, 4)).standard_error.isnan().all()
    assert seq.ParticleFilter(model, 20).run(model.simulate([300])["x"]).standard_error.isnan().all()
    assert seq.ParticleFilter(model, 50, num_runs=3).run(torch.zeros(1, 4)).standard_error > 0


def test_families_follow_the_ancestors():
    families = Families.first(2, 4, torch.device("cpu"))
    weights = torch.full((2, 4), 0.25)
    families = families.resampled(torch.tensor([[0, 0, 2, 3], [1, 1, 1, 1]]), weights)
    families = families.resampled(torch.tensor([[2, 2, 0, 3], [0, 1, 2, 3]]), weights)
    assert families.eve.tolist() == [[2, 2, 0, 3], [1, 1, 1, 1]]
    error = families.standard_error(weights)
    assert error[1].isnan()
    families = families.resampled(torch.eye(4).expand(2, 4, 4), weights)
    assert families.standard_error(weights).isnan().all()


def test_table_is_that_of_the_run():
    model = LocalLevel(0.0, 1.0, 0.5, 0.5)
    posterior = seq.ParticleFilter(model, 200, history=True).run(torch.randn(2, 12), [12, 7])
    table = posterior.diagnostics()
    assert len(table) == 19 and (table.groupby("sequence").size().tolist() == [12, 7])
    np.testing.assert_allclose(table["ess"], posterior.ess[posterior.sequences.active].numpy())
    second = table[table["sequence"] == 1]
    # The last particles are their own descendants; before, ancestors only merge.
    assert second["distinct_ancestors"].iloc[-1] == 200 and (second["distinct_ancestors"].diff().dropna() >= 0).all()
    steps = posterior.particles.steps
    index = torch.arange(200)
    for t in (6, 5, 4):
        if t < 6 and steps[t + 1].ancestors is not None:
            index = steps[t + 1].ancestors[1][index]
        assert second["distinct_ancestors"].iloc[t] == len(index.unique())
    weights = steps[3].log_weights[0].softmax(-1)
    assert abs(table["largest_weight"].iloc[3] - float(weights.max())) < 1e-12
    short = seq.ParticleFilter(model, 200).run(torch.randn(2, 12), [12, 7]).diagnostics()
    assert list(short) == ["sequence", "time", "ess", "largest_weight", "advice"]
    several = seq.ParticleFilter(model, 200, num_runs=3).run(torch.randn(2, 12), [12, 7]).diagnostics()
    assert len(several) == 57


def test_one_particle_has_no_tail():
    posterior = seq.ParticleFilter(LocalLevel(0.0, 1.0, 0.5, 0.5), 1, history=True).run(torch.randn(2, 4), [4, 2])
    table = posterior.diagnostics()
    assert len(table) == 6 and table["pareto_k"].isna().all() and (table["advice"] == "").all()
    assert (table["ess"] == 1).all() and (table["distinct_ancestors"] == 1).all()


def test_pareto_k_is_the_tails():
    """Of one step of importance sampling from N(0, 1) to N(0, s^2), with weights proportional to exp(c z^2), the tail index is
    2c: light below s = 1, without a variance beyond s^2 = 2."""
    class Scale(seq.StateSpaceModel):
        def __init__(self, c):
            super().__init__()
            self.c = c

        def initial(self):
            return pyro.sample("z", dist.Normal(0.0, 1.0))

        def transition(self, z):
            return pyro.sample("z", dist.Normal(0.0, 1.0))

        def emission(self, z, x=None):
            pyro.factor("tilt", self.c * z.square())
            return pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    for c in (0.1, 0.45):
        table = seq.ParticleFilter(Scale(c), 5000, history=True).run(torch.zeros(40, 1)).diagnostics()
        # The mean of 40 fits to some 210 tail weights each, which are biased for weights that are Pareto only in the limit.
        assert abs(table["pareto_k"].mean() - 2 * c) < 0.2
        assert (table["advice"] != "").mean() > 0.5 if c == 0.45 else (table["advice"] == "").all()


def test_a_good_run_says_nothing(data_dir):
    import pandas as pd

    nile = torch.tensor(pd.read_csv(next(data_dir.glob("timeseries/*nile*"))).iloc[:, -1].to_numpy(), dtype=torch.float64)
    for model, x in ((LocalLevel(), nile), (StochasticVolatility(), StochasticVolatility().simulate([200])["x"]),
                     (HiddenMarkov(3), HiddenMarkov(3).simulate([100])["x"])):
        posterior = seq.ParticleFilter(model, 1000).run(x)
        assert posterior.notes == () and (posterior.diagnostics()["advice"] == "").all()
        assert posterior.standard_error > 0


def test_a_bad_run_says_what_and_what_to_do():
    model = LocalLevel(0.0, 1.0, 0.5, 1e-5)
    x = model.simulate([30])["x"]
    posterior = seq.ParticleFilter(model, 200).run(x)
    low, = (note for note in posterior.notes if "effective sample size below 10" in note)
    assert "in sequence 0" in low and "use a guide" in low
    advice = posterior.diagnostics()["advice"]
    assert (advice != "").any() and advice[advice != ""].str.contains("use a guide").all()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bad = seq.ParticleFilter(LocalLevel(0.0, 1.0, 0.5, 1e-9), 100).run(x)
    assert len(caught) == 1 and "one of 100 particles has all the weight at most times of sequence 0" in str(caught[0].message)
    assert any("one particle has all the weight at time" in note for note in bad.notes)


def test_an_exact_method_has_nothing_to_diagnose():
    posterior = seq.KalmanFilter(LocalLevel()).run(torch.zeros(3))
    with pytest.raises(ValueError, match="Kalman filter has no particles to diagnose"):
        posterior.diagnostics()


def test_a_transport_has_no_genealogy():
    """Mixed particles have no ancestors: no smoothed moments, no trajectories, no error, and a clear refusal."""
    class Mixing(seq.resampling.Resampler):
        def __call__(self, weights, state, look_ahead=None):
            n, particles = weights.log.shape
            return weights.normalised[:, None].expand(n, particles, particles), torch.zeros_like(weights.log)

    model, x = LocalLevel(0.0, 1.0, 0.5, 0.5), torch.randn(1, 4)
    sequences, guide = seq.Sequences.of(x), PriorGuide(model)

    def run(_):
        population = Population(Mixing(), 1.0)
        record = Record(sequences.packed, 20, history=True)
        for step in forward(model, guide, sequences, 20, between=population.between):
            factor = population.weigh(step)
            record.add(step, population.weights, factor)
        record.finish()
        return record

    record = entered(model, guide, sequences, run)
    assert record.smoothed() == {} and record.standard_error().isnan().all()
    with pytest.raises(ValueError, match="mixed by a transport"):
        record.trajectories(3)


def test_systematic_is_what_the_filter_uses():
    """The helper above is the public filter, but for its resampling."""
    model, x = LocalLevel(0.0, 1.0, 0.5, 0.5), torch.randn(3, 6)
    pyro.set_rng_seed(3)
    evidence, error, _ = runs_of(model, x, 50, systematic, 0.5)
    pyro.set_rng_seed(3)
    found = seq.ParticleFilter(model, 50).run(x)
    torch.testing.assert_close(found.log_evidence, evidence)
    torch.testing.assert_close(found.standard_error, error, equal_nan=True)


def test_figures_show_the_table():
    import matplotlib.pyplot as plt
    import pandas as pd

    model = LocalLevel(0.0, 1.0, 0.5, 0.5)
    posterior = seq.ParticleFilter(model, 30, history=True).run(torch.randn(2, 12), [7, 12])
    table = posterior.diagnostics()
    for b, length in enumerate((7, 12)):
        count, largest = seq.plot.plot_diagnostics(posterior, sequence=b)
        lines = {line.get_label(): line.get_ydata() for line in count.lines}
        rows = table[table["sequence"] == b]
        np.testing.assert_array_equal(lines["effective sample size"], rows["ess"])
        np.testing.assert_array_equal(lines["distinct ancestors of the last particles"], rows["distinct_ancestors"])
        ax = seq.plot.plot_genealogy(posterior, sequence=b)
        dead, alive = ax.collections[:2]
        assert len(dead.get_segments()) + len(alive.get_segments()) == 30 * (length - 1)
        assert len(alive.get_segments()) == rows["distinct_ancestors"].iloc[1:].sum()
        starts = {segment[0][1] for segment in alive.get_segments() if segment[0][0] == 1}
        assert len(starts) == rows["distinct_ancestors"].iloc[0]
    dated = pd.Series(np.zeros(9), index=pd.period_range("2000-01", periods=9, freq="M"))
    seq.plot.plot_genealogy(seq.ParticleFilter(model, 30, history=True).run(dated)).figure.canvas.draw()
    seq.plot.plot_diagnostics(seq.ParticleFilter(model, 30).run(dated))[0].figure.canvas.draw()
    plt.close("all")


def filtered(particles, **options):
    return seq.ParticleFilter(LocalLevel(), particles, **options).run(torch.zeros(3))


FIGURES = {
    "no particles": (lambda: seq.plot.plot_diagnostics(seq.KalmanFilter(LocalLevel()).run(torch.zeros(3))),
                     "Kalman filter has no particles to draw"),
    "no history": (lambda: seq.plot.plot_genealogy(filtered(20)),
                   "kept no ancestors to draw: use ParticleFilter\\(history=True\\)"),
    "too many": (lambda: seq.plot.plot_genealogy(filtered(600, history=True)),
                 "600 particles cannot be told apart"),
    "no such site": (lambda: seq.plot.plot_genealogy(filtered(20, history=True), "k"),
                     "no latent site 'k' that the particles hold; there are \\['z'\\]"),
    "no such sequence": (lambda: seq.plot.plot_diagnostics(filtered(20), sequence=1),
                         "sequence=1: there are 1"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_mistakes_in_figures(name):
    call, message = FIGURES[name]
    with pytest.raises(ValueError, match=message):
        call()
