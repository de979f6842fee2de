"""Sequential latent variable models for Pyro: declare one step once, infer it in any way."""

from pyro_seq import data, flows, models, plot, resampling
from pyro_seq.engine.memory import keep_freed_memory
from pyro_seq.fit.evaluate import evaluate
from pyro_seq.fit.train import fit, restore
from pyro_seq.from_pyro import from_pyro
from pyro_seq.guide import PriorGuide, SequentialGuide
from pyro_seq.guides.avf import AmortizedVariationalFilter
from pyro_seq.guides.enumerated import EnumeratedGuide
from pyro_seq.guides.kalman import KalmanGuide
from pyro_seq.guides.recurrent import FilteringGuide, SmoothingGuide
from pyro_seq.infer.auxiliary_filter import AuxiliaryParticleFilter
from pyro_seq.infer.backtest import backtest
from pyro_seq.infer.by_step import elbo_by_step, reconstruct
from pyro_seq.infer.compare import compare
from pyro_seq.infer.elbo import SequentialELBO
from pyro_seq.infer.em import expectation_maximization
from pyro_seq.infer.ensemble_kalman import EnsembleKalmanFilter
from pyro_seq.infer.estimates import Estimates
from pyro_seq.infer.extended_kalman import ExtendedKalmanFilter
from pyro_seq.infer.fivo import FIVO
from pyro_seq.infer.gibbs import Gibbs
from pyro_seq.infer.hmm import ForwardBackward
from pyro_seq.infer.inspection import exact, inspect
from pyro_seq.infer.iwae import IWAE
from pyro_seq.infer.kalman import GaussianPosterior, KalmanFilter
from pyro_seq.infer.likelihood import ExactLikelihood
from pyro_seq.infer.marginal import Marginal
from pyro_seq.infer.maximum_likelihood import maximum_likelihood
from pyro_seq.infer.naive import Naive
from pyro_seq.infer.particle_filter import ParticleFilter
from pyro_seq.infer.posterior import Posterior
from pyro_seq.infer.rao_blackwell import RaoBlackwellisedFilter
from pyro_seq.infer.smc.conditional_path import ConditionalParticleFilter
from pyro_seq.infer.smoothing import BackwardSampler, FixedLagSmoother, Paris
from pyro_seq.infer.structure import Structure
from pyro_seq.infer.twisted_filter import TwistedParticleFilter
from pyro_seq.infer.unscented_kalman import UnscentedKalmanFilter
from pyro_seq.infer.variational import Variational
from pyro_seq.infer.wake_sleep import ReweightedWakeSleep
from pyro_seq.model import AutoregressiveModel, SequentialModel, StateSpaceModel
from pyro_seq.sequences import Sequences

__all__ = [
    "FIVO",
    "IWAE",
    "AmortizedVariationalFilter",
    "AutoregressiveModel",
    "AuxiliaryParticleFilter",
    "BackwardSampler",
    "ConditionalParticleFilter",
    "EnsembleKalmanFilter",
    "EnumeratedGuide",
    "Estimates",
    "ExactLikelihood",
    "ExtendedKalmanFilter",
    "FilteringGuide",
    "FixedLagSmoother",
    "ForwardBackward",
    "GaussianPosterior",
    "Gibbs",
    "KalmanFilter",
    "KalmanGuide",
    "Marginal",
    "Naive",
    "Paris",
    "ParticleFilter",
    "Posterior",
    "PriorGuide",
    "RaoBlackwellisedFilter",
    "ReweightedWakeSleep",
    "Sequences",
    "SequentialELBO",
    "SequentialGuide",
    "SequentialModel",
    "SmoothingGuide",
    "StateSpaceModel",
    "Structure",
    "TwistedParticleFilter",
    "UnscentedKalmanFilter",
    "Variational",
    "backtest",
    "compare",
    "data",
    "elbo_by_step",
    "evaluate",
    "exact",
    "expectation_maximization",
    "fit",
    "flows",
    "from_pyro",
    "inspect",
    "maximum_likelihood",
    "models",
    "plot",
    "reconstruct",
    "resampling",
    "restore",
]

__version__ = "0.1.0"

keep_freed_memory()
