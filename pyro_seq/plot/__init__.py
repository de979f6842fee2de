"""Figures. Each function returns matplotlib axes and shows nothing by itself."""

from pyro_seq.plot.forecasts import plot_backtest, plot_forecast
from pyro_seq.plot.guides import free_energy, per_step
from pyro_seq.plot.particles import plot_diagnostics, plot_genealogy
from pyro_seq.plot.posteriors import plot_comparison, plot_posterior
from pyro_seq.plot.residuals import plot_residuals
from pyro_seq.plot.rolls import piano_roll
from pyro_seq.plot.training import training_curves

__all__ = ["free_energy", "per_step", "piano_roll", "plot_backtest", "plot_comparison", "plot_diagnostics",
           "plot_forecast", "plot_genealogy", "plot_posterior", "plot_residuals", "training_curves"]
