"""Particle smoothing: what the whole of the data says of each time, one file per method."""

from __future__ import annotations

from pyro_seq.infer.smoothing.backward import BackwardSampler
from pyro_seq.infer.smoothing.fixed_lag import FixedLagSmoother
from pyro_seq.infer.smoothing.paris import Paris

__all__ = ["BackwardSampler", "FixedLagSmoother", "Paris"]
