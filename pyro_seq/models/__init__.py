"""Models of the literature, each a short declaration beside its published inference."""

from pyro_seq.models.arima import ARIMA
from pyro_seq.models.autoregressive import AutoregressiveNetwork, CausalConvolution, CausalTransformer, RecurrentNetwork
from pyro_seq.models.dmm import AugmentedDeepMarkovModel, DeepMarkovModel, StructuredInference
from pyro_seq.models.layers import match_marginals
from pyro_seq.models.logistic import DiscretisedLogisticMixture
from pyro_seq.models.outputs import (
    BernoulliOutput,
    CategoricalOutput,
    LogisticMixtureOutput,
    NormalOutput,
    Output,
)
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
    "AutoregressiveNetwork",
    "BasicStructural",
    "BernoulliOutput",
    "CategoricalOutput",
    "CausalConvolution",
    "CausalTransformer",
    "DeepMarkovModel",
    "DiscretisedLogisticMixture",
    "LocalLevel",
    "LocalLinearTrend",
    "LogisticMixtureOutput",
    "MarkovSwitchingAutoregression",
    "NormalOutput",
    "Output",
    "RecurrentNetwork",
    "SRNNInference",
    "StochasticVolatility",
    "StructuralModel",
    "StructuredInference",
    "VRNNInference",
    "match_marginals",
]
