"""One answer object whatever made it: moments, draws, predictions, frames, figures."""

import math

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from models import VRNN, Driven, HiddenMarkov, LocalLevel

import pyro_seq as seq


def answers(model, x, lengths=None):
    pyro.clear_param_store()
    return {
        "kalman": seq.KalmanFilter(model).run(x, lengths),
        "particles": seq.ParticleFilter(model, 4000, history=True).run(x, lengths),
        "several runs": seq.ParticleFilter(model, 1000, num_runs=4).run(x, lengths),
        "guide": seq.Variational(model, seq.FilteringGuide(model), num_samples=200).run(x, lengths),
    }


def test_every_answer_has_the_interface():
    model, x = LocalLevel(0.0, 1.0, 0.5, 0.5), torch.randn(3, 6)
    lengths = [6, 3, 5]
    for name, posterior in answers(model, x, lengths).items():
        assert posterior.log_evidence.shape == posterior.standard_error.shape == (3,), name
        moments = posterior.filtered["z"]
        assert moments.mean.shape == moments.variance.shape == (3, 6)
        assert (moments.mean[1, 3:] == 0).all()
        frame = posterior.to_dataframe()
        assert len(frame) == 14 and set(frame.columns) >= {"sequence", "time", "site", "filtered_mean", "filtered_std"}
        future = posterior.predict(4, num_samples=50)
        assert future.samples["x"].shape == (50, 3, 4) and future.samples["z"].shape == (50, 3, 4)
        assert future.times.tolist() == [[7, 8, 9, 10], [4, 5, 6, 7], [6, 7, 8, 9]]
        table = future.to_dataframe()
        assert len(table) == 24 and table["q0.05"].le(table["q0.95"]).all()
        assert set(posterior.summary().index) == {"log_evidence", "kind", "standard_error", "num_samples", "seconds"}


def test_prediction_against_the_exact_one():
    """Mean and variance of the future of a random walk, from every method, in Monte Carlo error."""
    model, x = LocalLevel(0.0, 1.0, 0.5, 0.5), torch.randn(2, 6)
    exact = seq.KalmanFilter(model).run(x, [6, 4])
    level = torch.stack([exact.filtered["z"].mean[0, 5], exact.filtered["z"].mean[1, 3]])
    spread = torch.stack([exact.filtered["z"].variance[0, 5], exact.filtered["z"].variance[1, 3]])
    for name, posterior in answers(model, x, [6, 4]).items():
        if name == "guide":  # untrained: its filter is not the exact one
            continue
        draws = posterior.predict(3, num_samples=4000).samples["x"]
        for h in range(3):
            variance = spread + 0.5 * (h + 1) + 0.5
            # 4000 draws, and a filter of at least 1000 effective particles.
            assert ((draws[:, :, h].mean(0) - level).abs() < 5 * (variance / 1000).sqrt()).all(), name
            assert ((draws[:, :, h].var(0) / variance - 1).abs() < 5 * math.sqrt(2 / 1000)).all(), name


def test_quantiles_and_trajectories_of_a_filter():
    model, x = LocalLevel(0.0, 1.0, 0.5, 0.5), torch.randn(2, 6)
    exact = seq.KalmanFilter(model).run(x, [6, 4])
    posterior = seq.ParticleFilter(model, 4000, history=True).run(x, [6, 4])
    normal = torch.distributions.Normal(exact.filtered["z"].mean, exact.filtered["z"].std + 1e-9)
    inside = posterior.sequences.active
    independent = 1000  # draws that 4000 particles are worth at least, resampled at half their effective number
    for q in (0.05, 0.5, 0.9):
        exact_quantile = normal.icdf(torch.tensor(q))
        error = math.sqrt(q * (1 - q) / independent) / normal.log_prob(exact_quantile).exp()
        assert ((posterior.quantile("z", q) - exact_quantile).abs() < 5 * error)[inside].all()
    both = posterior.quantile("z", [0.1, 0.9])
    assert both.shape == (2, 2, 6) and (both[0][inside] < both[1][inside]).all()
    paths = posterior.trajectories(2000).samples["z"]
    assert paths.shape == (2000, 2, 6)
    last = torch.stack([paths[:, 0, 5], paths[:, 1, 3]], 1)
    expected = torch.stack([exact.filtered["z"].mean[0, 5], exact.filtered["z"].mean[1, 3]])
    spread = torch.stack([exact.filtered["z"].std[0, 5], exact.filtered["z"].std[1, 3]])
    assert ((last.mean(0) - expected).abs() < 5 * spread * math.sqrt(1 / independent + 1 / 2000)).all()
    # The genealogy smooths: near the end it agrees with the smoother.
    error = exact.smoothed["z"].std[0, 4] * math.sqrt(1 / independent + 1 / 2000)
    assert abs(paths[:, 0, 4].mean() - exact.smoothed["z"].mean[0, 4]) < 5 * error


def test_covariates_in_prediction():
    model, x, u = Driven(), torch.randn(2, 5), torch.randn(2, 5, 2)
    posterior = seq.KalmanFilter(model).run(x, u=u)
    future = torch.tensor([[[10.0, 0.0]], [[-10.0, 0.0]]])
    drawn = posterior.predict(1, num_samples=500, u=future).mean("z")
    assert (drawn[0] > 7).all() and (drawn[1] < -7).all()


def test_comparison_and_figures(tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    model, x = LocalLevel(0.0, 1.0, 0.5, 0.5), torch.randn(1, 6)
    found = answers(model, x)
    table = seq.compare(found, x)
    assert isinstance(table, pd.DataFrame) and list(table.index) == list(found)
    assert table.loc["kalman", "kind"] == "exact" and table.loc["guide", "kind"] == "lower bound (ELBO)"
    assert table.loc["particles", "standard_error"] > 0 and table.loc["several runs", "standard_error"] > 0
    axes = table.plot_comparison()
    axes[0].figure.savefig(tmp_path / "comparison.png")
    found["kalman"].plot().figure.savefig(tmp_path / "posterior.png")
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_arviz():
    model, x = LocalLevel(0.0, 1.0, 0.5, 0.5), torch.randn(1, 6)
    data = seq.ParticleFilter(model, 100, history=True).run(x).to_arviz(50)
    assert data.posterior["z"].shape == (1, 50, 1, 6)


def test_data_of_every_kind_is_the_same_data():
    model, x = LocalLevel(0.0, 1.0, 0.5, 0.5), torch.randn(6)
    kalman = seq.KalmanFilter(model)
    expected = kalman.run(x[None]).log_evidence
    for data in (x, x.numpy(), x.tolist(), pd.Series(x.numpy()), [x], [x.numpy()], {"x": x}):
        assert torch.equal(kalman.run(data).log_evidence, expected)
    ragged = kalman.run([x, x[:3]]).log_evidence
    assert torch.equal(ragged[0], expected[0])
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(5, 4)))
    assert seq.Sequences.of(frame).x["x"].shape == (1, 5, 4)
    gaps = pd.Series([1.0, None, 2.0])
    assert seq.KalmanFilter(model).run(gaps).log_evidence.isfinite().all()
    mask = torch.tensor([[True, False, True]])
    assert torch.equal(kalman.run(torch.tensor([[1.0, 5.0, 2.0]]), mask=mask).log_evidence, kalman.run(gaps).log_evidence)


def test_integer_data_with_gaps():
    """A mask over whole numbers, which cannot hold NaN."""
    class Tosses(HiddenMarkov):
        def emission(self, k, x=None):
            return pyro.sample("x", pyro.distributions.Categorical(logits=self.locs[k][:, None] * torch.ones(3)), obs=x)

    model = Tosses()
    x = torch.tensor([[0, 2, 1, 1]])
    mask = torch.tensor([[True, False, True, True]])
    found = seq.ParticleFilter(model, 10).run(x, mask=mask)
    # The emission is uniform: each observed toss adds -log 3.
    assert abs(found.total_log_evidence + 3 * math.log(3)) < 1e-9
    assert abs(seq.ParticleFilter(model, 10).run(x).total_log_evidence + 4 * math.log(3)) < 1e-9


def test_recurrent_model_predicts():
    model = VRNN()
    posterior = seq.ParticleFilter(model, 50).run(torch.randn(2, 5, 4), [5, 3])
    assert posterior.predict(3, num_samples=7).samples["x"].shape == (7, 2, 3, 4)
