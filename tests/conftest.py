"""Every test starts from a fixed seed, an empty parameter store, float64 and full validation.

``PYRO_SEQ_DEVICE=cuda`` runs the same tests on a GPU.
"""

import os
from pathlib import Path

import pyro
import pytest
import torch

from pyro_seq.engine.families import Family

DEVICE = os.environ.get("PYRO_SEQ_DEVICE", "cpu")
DATA = Path(os.environ.get("PYRO_SEQ_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def clean_slate():
    torch.set_default_dtype(torch.float64)
    if DEVICE != "cpu":
        torch.set_default_device(DEVICE)
    pyro.clear_param_store()
    pyro.enable_validation(True)
    pyro.set_rng_seed(0)
    yield
    if DEVICE != "cpu":
        torch.set_default_device("cpu")
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def data_dir():
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}: set PYRO_SEQ_DATA")
    return DATA


@pytest.fixture
def row_noise(monkeypatch):
    """Give every (sequence, particle, time, site) its own random numbers, whatever batch it is run in.

    Sequences are told apart by ``row_noise.ids``, one per sequence of the batch.
    """
    class Noise:
        ids = list(range(100))

        def draw(self, fn, name, frame):
            rows = frame.rows
            sequence = frame.sequence.tolist()
            seen: dict[int, int] = {}
            values = []
            # One row at a time: what a generator gives a row must not depend on the other rows.
            family = Family(fn, name)
            parameters = family.parameters(fn)
            for row in range(rows):
                particle = seen.get(sequence[row], 0)
                seen[sequence[row]] = particle + 1
                t = int(frame.t if isinstance(frame.t, int) else frame.t[row])
                torch.manual_seed(hash((self.ids[sequence[row]], particle, t, name)) % 2**31)
                one = family.distribution(parameters[row:row + 1])
                values.append((one.rsample() if one.has_rsample else one.sample())[0])
            return torch.stack(values)

    noise = Noise()
    monkeypatch.setattr("pyro_seq.engine.sites.draw", noise.draw)
    monkeypatch.setattr("pyro_seq.engine.loop.draw", noise.draw)
    return noise
