"""Models of the literature, each a short declaration beside its published inference."""

from pyro_seq.models.arima import ARIMA
from pyro_seq.models.dmm import AugmentedDeepMarkovModel, DeepMarkovModel, StructuredInference
from pyro_seq.models.layers import match_marginals
from pyro_seq.models.srnn import SRNN, SRNNInference
from pyro_seq.models.structural import BasicStructural, LocalLevel, LocalLinearTrend, StructuralModel
from pyro_seq.models.switching import MarkovSwitchingAutoregression
from pyro_seq.models.volatility import StochasticVolatility
from pyro_seq.models.vrnn import VRNN, VRNNInference

__all__ = [
    "ARIMA",
    "SRNN",
    "VRNN",
    "AugmentedDeepMarkovModel",
    "BasicStructural",
    "DeepMarkovModel",
    "LocalLevel",
    "LocalLinearTrend",
    "MarkovSwitchingAutoregression",
    "SRNNInference",
    "StochasticVolatility",
    "StructuralModel",
    "StructuredInference",
    "VRNNInference",
    "match_marginals",
]
