"""Figures. Each function returns matplotlib axes and shows nothing by itself."""

from pyro_seq.plot.guides import free_energy, per_step
from pyro_seq.plot.posteriors import plot_comparison, plot_posterior
from pyro_seq.plot.rolls import piano_roll
from pyro_seq.plot.training import training_curves

__all__ = ["free_energy", "per_step", "piano_roll", "plot_comparison", "plot_posterior", "training_curves"]
