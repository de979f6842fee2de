"""Sequential latent variable models for Pyro: declare one step once, infer it in any way."""

from pyro_seq import flows
from pyro_seq.fit.evaluate import evaluate
from pyro_seq.fit.train import fit, restore
from pyro_seq.from_pyro import from_pyro
from pyro_seq.guide import PriorGuide, SequentialGuide
from pyro_seq.guides.avf import AmortizedVariationalFilter
from pyro_seq.guides.recurrent import FilteringGuide, SmoothingGuide
from pyro_seq.infer.by_step import elbo_by_step, reconstruct
from pyro_seq.infer.compare import compare
from pyro_seq.infer.elbo import SequentialELBO
from pyro_seq.infer.em import expectation_maximization
from pyro_seq.infer.estimates import Estimates
from pyro_seq.infer.gibbs import Gibbs
from pyro_seq.infer.hmm import ForwardBackward
from pyro_seq.infer.kalman import GaussianPosterior, KalmanFilter
from pyro_seq.infer.marginal import Marginal
from pyro_seq.infer.maximum_likelihood import maximum_likelihood
from pyro_seq.infer.particle_filter import ParticleFilter
from pyro_seq.infer.posterior import Posterior
from pyro_seq.infer.variational import Variational
from pyro_seq.model import SequentialModel, StateSpaceModel
from pyro_seq.sequences import Sequences

__all__ = [
    "AmortizedVariationalFilter",
    "Estimates",
    "FilteringGuide",
    "ForwardBackward",
    "GaussianPosterior",
    "Gibbs",
    "KalmanFilter",
    "Marginal",
    "ParticleFilter",
    "Posterior",
    "PriorGuide",
    "Sequences",
    "SequentialELBO",
    "SequentialGuide",
    "SequentialModel",
    "SmoothingGuide",
    "StateSpaceModel",
    "Variational",
    "compare",
    "elbo_by_step",
    "evaluate",
    "expectation_maximization",
    "fit",
    "flows",
    "from_pyro",
    "maximum_likelihood",
    "reconstruct",
    "restore",
]

__version__ = "0.1.0"
