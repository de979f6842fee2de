"""Resampling: which particles of a weighted set go on."""

from __future__ import annotations

from pyro_seq.resampling.ancestral import Ancestral, Scheme, Soft, StopGradient
from pyro_seq.resampling.base import Resampler
from pyro_seq.resampling.inversion import multinomial, residual, stratified, systematic
from pyro_seq.resampling.metropolis import Metropolis
from pyro_seq.resampling.names import NAMES, named, resolve
from pyro_seq.resampling.transport import OptimalTransport

__all__ = [
    "NAMES",
    "Ancestral",
    "Metropolis",
    "OptimalTransport",
    "Resampler",
    "Scheme",
    "Soft",
    "StopGradient",
    "multinomial",
    "named",
    "residual",
    "resolve",
    "stratified",
    "systematic",
]
