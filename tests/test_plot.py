"""What is drawn is what was given."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

import pyro_seq as seq
from pyro_seq.fit.train import Fit
from pyro_seq.infer.by_step import ElboByStep
from pyro_seq.infer.posterior import Draws
from pyro_seq.plot import free_energy, per_step, piano_roll, plot_comparison, plot_posterior, training_curves

matplotlib.use("Agg")
BATCH, STEPS, NOTES = 3, 10, 88
LENGTHS = [10, 4, 7]


@pytest.fixture(autouse=True)
def closed():
    yield
    matplotlib.pyplot.close("all")


def roll(batch=BATCH, steps=STEPS):
    return torch.bernoulli(torch.full((batch, steps, NOTES), 0.1))


def drawn(ax):
    """The values of a panel, ``(T, notes)``."""
    mesh, = ax.collections
    return np.asarray(mesh.get_array()).reshape(NOTES, -1).T


@pytest.mark.parametrize("sequence", range(BATCH))
def test_piano_roll_draws_the_data(sequence):
    x = roll()
    for rolls, lengths in ((x, LENGTHS), (seq.Sequences.of(x, LENGTHS), None)):
        ax = piano_roll(rolls, lengths, sequence=sequence)
        np.testing.assert_array_equal(drawn(ax), x[sequence, :LENGTHS[sequence]].numpy())


def test_a_single_roll_has_no_batch():
    x = roll()[0]
    np.testing.assert_array_equal(drawn(piano_roll(x)), x.numpy())


def test_notes_are_where_their_names_are():
    x = torch.zeros(1, 4, NOTES)
    x[..., 60 - 21] = 1
    ax = piano_roll(x)
    labels = dict(zip([label.get_text() for label in ax.get_yticklabels()], ax.get_yticks(), strict=True))
    assert labels == {"C4": 60}
    mesh, = ax.collections
    edges = mesh.get_coordinates()[:, 0, 1]
    assert edges[60 - 21] == 59.5 and edges[61 - 21] == 60.5 and ax.get_ylim() == (57.5, 62.5)


def test_panels_share_their_axes_and_draws_keep_their_times():
    x, probability = roll(), torch.rand(BATCH, STEPS, NOTES)
    future = Draws({"x": roll(5 * BATCH, 6).reshape(5, BATCH, 6, NOTES)}, torch.tensor(LENGTHS)[:, None] + torch.arange(1, 7))
    axes = piano_roll({"data": x, "reconstruction": probability, "forecast": future}, LENGTHS, sequence=1)
    assert [ax.get_title() for ax in axes] == ["data", "reconstruction", "forecast"]
    np.testing.assert_array_equal(drawn(axes[1]), probability[1, :4].numpy())
    np.testing.assert_array_equal(drawn(axes[2]), future.mean("x")[1].numpy())
    mesh, = axes[2].collections
    assert mesh.get_coordinates()[0, :, 0].tolist() == [4.5 + i for i in range(7)]
    assert len({ax.get_xlim() for ax in axes}) == len({ax.get_ylim() for ax in axes}) == 1
    assert axes[0].get_xlim() == (0.5, 10.5)


def test_free_energy_averages_over_frames_and_leaves_out_padding():
    values = torch.rand(4, BATCH, STEPS)
    inside = torch.arange(STEPS) < torch.tensor(LENGTHS)[:, None]
    ax = free_energy({"padded": values}, torch.tensor(LENGTHS))
    np.testing.assert_allclose(ax.lines[0].get_ydata(), values[:, inside].mean(1).numpy())
    ax = free_energy(values)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), values.mean((1, 2)).numpy())
    assert ax.lines[0].get_xdata().tolist() == [0, 1, 2, 3]


def parts():
    inside = torch.arange(STEPS) < torch.tensor(LENGTHS)[:, None]
    return ElboByStep(-torch.rand(BATCH, STEPS) * inside, torch.rand(BATCH, STEPS) * inside, torch.tensor(LENGTHS))


def test_per_step_of_one_sequence_and_of_those_that_run():
    found = parts()
    above, below = per_step({"guide": found}, sequence=1)
    np.testing.assert_array_equal(above.lines[0].get_ydata(), found.reconstruction[1, :4].numpy())
    np.testing.assert_array_equal(below.lines[0].get_ydata(), found.kl[1, :4].numpy())
    above, below = per_step(found)
    np.testing.assert_allclose(below.lines[0].get_ydata()[8:], found.kl[0, 8:].numpy())  # one sequence goes on so long
    np.testing.assert_allclose(above.lines[0].get_ydata()[:4], found.reconstruction[:, :4].mean(0).numpy())


def history():
    return pd.DataFrame({"epoch": [1, 2, 3], "updates": [5, 10, 15], "seconds": [1.0, 2.0, 3.0], "train": [9.0, 8.5, 8.1],
                         "valid": [9.1, 8.8, 8.9], "test": [9.2, 9.0, 9.1]})


def test_training_curves():
    for fits in (history(), Fit(history(), 2, 8.8)):
        ax = training_curves({"DMM": fits})
        curves = {line.get_label(): line.get_ydata().tolist() for line in ax.lines if not line.get_label().startswith("_")}
        assert curves == {f"DMM, {name}": history()[name].tolist() for name in ("train", "valid", "test")}
        best, = (line for line in ax.lines if line.get_marker() == "o")
        assert (best.get_xdata()[0], best.get_ydata()[0]) == (2, 8.8)
    assert [line.get_label() for line in training_curves(history()[["epoch", "train"]]).lines] == ["train"]
    annealed = history().assign(kl_weight=[0.4, 0.9, 1.0])
    assert [line.get_label() for line in training_curves(annealed).lines][:2] == [
        "train (objective, KL weight < 1 until epoch 2)", "valid"]


def test_axes_can_be_given():
    axes = matplotlib.pyplot.subplots(3)[1]
    assert piano_roll({"a": roll(), "b": roll()}, axes=axes[:2])[1] is axes[1]
    assert training_curves(history(), ax=axes[2]) is free_energy(torch.rand(2, 3, 4), ax=axes[2]) is axes[2]
    assert per_step(parts(), axes=axes[1:])[0] is axes[1]


@pytest.mark.parametrize("call, error, message", [
    (lambda: piano_roll(torch.zeros(NOTES)), ValueError, r"shape \(88,\); it is \(B, T, notes\)"),
    (lambda: piano_roll(torch.randn(2, 5, NOTES)), ValueError, "torch.sigmoid"),
    (lambda: piano_roll(torch.full((2, 5, NOTES), torch.nan)), ValueError, "nan_to_num"),
    (lambda: piano_roll(roll(), sequence=3), ValueError, "sequence=3: the roll has 3"),
    (lambda: piano_roll({"data": roll()}, sequence=-1), ValueError, "sequence=-1: roll 'data' has 3"),
    (lambda: piano_roll(roll(), [4], sequence=1), ValueError, "no length for sequence 1"),
    (lambda: piano_roll(torch.zeros(1, 5, 120)), ValueError, "120 columns and begins at MIDI note 21"),
    (lambda: piano_roll(seq.Sequences.of({"y": roll()})), ValueError, "no data 'x'; there are .'y'."),
    (lambda: piano_roll({}), ValueError, "nothing to draw"),
    (lambda: piano_roll({"a": roll(), "b": roll()}, axes=matplotlib.pyplot.gca()), ValueError, "1 matplotlib axes; 2 are"),
    (lambda: free_energy(torch.zeros(2, 3)), ValueError, r"\(K \+ 1, B, T\)"),
    (lambda: free_energy(torch.zeros(2, 3, 4), [5, 1, 1]), ValueError, "3 sequences of at most 4 steps"),
    (lambda: free_energy(torch.zeros(2, 3, 4), [4, 1]), ValueError, "one from 1 to T for each"),
    (lambda: per_step(torch.zeros(3, 4)), TypeError, "elbo_by_step"),
    (lambda: per_step(parts(), sequence=7), ValueError, "sequence=7: there are 3"),
    (lambda: per_step(parts(), axes=matplotlib.pyplot.gca()), ValueError, "2 are drawn on"),
    (lambda: plot_comparison({}), ValueError, "nothing to compare"),
    (lambda: plot_comparison({"a": torch.zeros(2, 3)}), TypeError, "posteriors 'a' is a Tensor; it is a posterior"),
    (lambda: plot_posterior(torch.zeros(2, 3)), TypeError, "posterior is a Tensor; it is a posterior, as KalmanFilter"),
    (lambda: training_curves([1.0, 2.0]), TypeError, "pass what seq.fit returned"),
    (lambda: training_curves({"a": pd.DataFrame({"epoch": [1]})}), ValueError, "lacks .'train'."),
    (lambda: training_curves(history().iloc[:0]), ValueError, "no rows"),
])
def test_mistakes(call, error, message):
    with pytest.raises(error, match=message):
        call()
