"""Flows over time: a sequence as noise that the past shifts and scales, and models of that noise."""

from pyro_seq.flows.affine import AffineTemporalAutoregressive, affine_temporal_autoregressive
from pyro_seq.flows.conditioners import RecurrentPast, WindowPast
from pyro_seq.flows.model import FlowedGuide, FlowedModel

__all__ = [
    "AffineTemporalAutoregressive",
    "FlowedGuide",
    "FlowedModel",
    "RecurrentPast",
    "WindowPast",
    "affine_temporal_autoregressive",
]
