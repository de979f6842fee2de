"""Real data: located, verified and loaded, one file per source."""

from pyro_seq.data.midi import load_midi
from pyro_seq.data.pianoroll import Polyphonic
from pyro_seq.data.polyphonic import load_polyphonic

__all__ = ["Polyphonic", "load_midi", "load_polyphonic"]
