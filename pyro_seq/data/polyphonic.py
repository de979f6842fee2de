"""The four sets of polyphonic music that sequential latent variable models are compared on.

N. Boulanger-Lewandowski, Y. Bengio and P. Vincent, Modeling Temporal Dependencies in High-Dimensional Sequences: Application
to Polyphonic Music Generation and Transcription, 2012.
"""

from __future__ import annotations

import pickle
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from pyro_seq.data.locate import data_folder, download
from pyro_seq.data.pianoroll import HIGHEST, LOWEST, NUM_NOTES, SPLITS, Polyphonic, padded

__all__ = ["load_polyphonic"]

_URL = "https://github.com/pyro-ppl/datasets/blob/master/polyphonic/{}.pickle?raw=true"
_SOURCES = {
    "jsb": ("jsb_chorales", "git:3b69144b974da0d34eb62d2de6faf74a3db44c57"),
    "nottingham": ("nottingham", "git:97268091279ec2844cf2fed04cee1f47db7b4a5d"),
    "musedata": ("muse_data", "git:ef8ef2c01ce94ccc74f247eec1ca61d10b4e00de"),
    "piano_midi": ("piano_midi", "git:4cefeae9f30c9313182f49062299832eb2e9cb6c"),
}
"""File name and checksum of the pickle by name."""


def load_polyphonic(name: str, folder: str | Path | None = None) -> Polyphonic:
    """One of four sets of polyphonic music, as piano rolls in the splits of Boulanger-Lewandowski et al. (2012).

    ======================  =============  =================  ======================
    name                    what           songs              steps
    ======================  =============  =================  ======================
    ``"jsb"``               Bach chorales  229 / 76 / 77      13807 / 4602 / 4725
    ``"nottingham"``        folk tunes     694 / 173 / 170    176561 / 45513 / 44463
    ``"musedata"``          orchestral     524 / 135 / 124    245202 / 82755 / 64339
    ``"piano_midi"``        piano          87 / 12 / 25       75911 / 8540 / 19036
    ======================  =============  =================  ======================

    Reads ``polyphonic/NAME.npz`` or ``polyphonic/NAME.pickle`` in the data folder, ``NAME`` being ``jsb_chorales``,
    ``nottingham``, ``muse_data`` or ``piano_midi``; where there is neither, the pickle that Pyro's own loader reads is
    downloaded. Nothing in a file is ever executed: a pickle may hold containers and integers only. Songs keep the order of
    the file. MuseData, whose songs are of very unequal length, takes 1 GB when padded, in single precision.

    :param name: of the set; the name of its file will do as well.
    :param folder: where data lives; :func:`~pyro_seq.data.locate.data_folder` by default.
    :raises ValueError: on an unknown name, or a file that is truncated, corrupt or not what it should be.
    :raises ConnectionError: if the file is not there and cannot be downloaded.

    Example::

        >>> import pickle, tempfile
        >>> from pathlib import Path
        >>> from pyro_seq.data import load_polyphonic
        >>> song = [(60, 64, 67), (), (62,)]  # MIDI notes at each step
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "polyphonic" / "jsb_chorales.pickle"
        ...     path.parent.mkdir()
        ...     _ = path.write_bytes(pickle.dumps({"train": [song, song[:2]], "valid": [song], "test": [song]}))
        ...     data = load_polyphonic("jsb", folder)
        >>> data.train
        Sequences(x=(2, 3, 88), lengths 2..3)
        >>> (data.train.x["x"][0, 0].nonzero().flatten() + 21).tolist()
        [60, 64, 67]
    """
    names = {key: key for key in _SOURCES} | {stem: key for key, (stem, _) in _SOURCES.items()}
    if name not in names:
        raise ValueError(f"there is no polyphonic data set {name!r}: choose among {', '.join(map(repr, _SOURCES))}")
    name = names[name]
    stem, checksum = _SOURCES[name]
    folder = (data_folder() if folder is None else Path(folder)) / "polyphonic"
    path = folder / f"{stem}.npz"
    if path.exists():
        read = _read_npz
    else:
        path, read = folder / f"{stem}.pickle", _read_pickle
        if not path.exists():
            download(_URL.format(stem), path, checksum)
    try:
        splits = read(path)
    # Half a file can make numpy, zipfile or pickle raise almost anything.
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # Permissions and the like: the file is not to blame.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not the piano rolls of {name}: {reason}. If it is broken, delete it, so that it is "
                         "downloaded again, or set PYRO_SEQ_DATA to a folder with a whole copy") from error
    return Polyphonic(name, *(padded(splits[split]) for split in SPLITS))


def _read_npz(path: Path) -> dict[str, list[np.ndarray]]:
    """Rolls packed to bits: all songs one after the other, their lengths, and the split of each."""
    with open(path, "rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        needed = ("rolls", "lengths", "split", "split_names", "low_midi", "n_notes")
        if missing := [key for key in needed if key not in archive]:
            raise ValueError(f"it lacks {missing}")
        rolls, lengths, split, names, low, notes = (archive[key] for key in needed)
    if (low.tolist(), notes.tolist()) != (LOWEST, NUM_NOTES):
        raise ValueError(f"it starts at MIDI note {low.tolist()} and has {notes.tolist()} notes, not {LOWEST} and {NUM_NOTES}")
    if rolls.dtype != np.uint8 or rolls.ndim != 2 or rolls.shape[1] != NUM_NOTES // 8:
        raise ValueError(f"its rolls are {rolls.dtype} of shape {rolls.shape}, not uint8 of shape (steps, {NUM_NOTES // 8})")
    for key, value in (("lengths", lengths), ("split", split)):
        if value.dtype.kind not in "iu" or value.shape != (lengths.size,):
            raise ValueError(f"its {key} are {value.dtype} of shape {value.shape}, not one integer for each song")
    if (lengths < 1).any():
        raise ValueError(f"song {int((lengths < 1).argmax())} has length {lengths[lengths < 1][0]}")
    if lengths.sum(dtype=np.int64) != len(rolls):
        raise ValueError(f"its lengths sum to {lengths.sum(dtype=np.int64)}, but it has {len(rolls)} steps")
    if sorted(names.tolist()) != sorted(SPLITS):
        raise ValueError(f"its splits are {names.tolist()}, not {list(SPLITS)}")
    if sorted(set(split.tolist())) != [0, 1, 2]:
        raise ValueError(f"its songs are in splits {sorted(set(split.tolist()))}, not in all of 0, 1 and 2")
    songs = np.split(np.unpackbits(rolls, axis=1), np.cumsum(lengths)[:-1])
    return {str(name): [song for song, where in zip(songs, split) if where == i] for i, name in enumerate(names)}


def _read_pickle(path: Path) -> dict[str, list[np.ndarray]]:
    """A dict of splits, each a list of songs, each a list of the tuples of MIDI notes at each step."""
    with open(path, "rb") as file:
        # Written by Python 2, whose strings are bytes.
        splits = _Unpickler(file, encoding="latin1").load()
    if not isinstance(splits, dict) or set(splits) != set(SPLITS):
        raise ValueError(f"it holds {sorted(map(str, splits)) if isinstance(splits, dict) else type(splits).__name__}, "
                         f"not a dict of {list(SPLITS)}")
    return {split: _rolls(split, songs) for split, songs in splits.items()}


def _rolls(split: str, songs: Any) -> list[np.ndarray]:
    if not isinstance(songs, (list, tuple)) or not songs:
        raise ValueError(f"{split!r} is not a list of songs")
    rolls = []
    for i, song in enumerate(songs):
        if not isinstance(song, (list, tuple)) or not song or not all(isinstance(step, (list, tuple)) for step in song):
            raise ValueError(f"song {i} of {split!r} is not a list of tuples of notes, one for each step")
        notes = list(chain.from_iterable(song))
        if bad := [note for note in notes if type(note) is not int or not LOWEST <= note <= HIGHEST]:
            raise ValueError(f"song {i} of {split!r} has the note {bad[0]!r}; MIDI notes {LOWEST} to {HIGHEST} are expected")
        roll = np.zeros((len(song), NUM_NOTES), np.uint8)
        roll[np.repeat(np.arange(len(song)), [len(step) for step in song]), np.array(notes, int) - LOWEST] = 1
        rolls.append(roll)
    return rolls


class _Dtype:
    """Stands in for ``numpy.dtype`` in a pickle."""

    def __init__(self, code: str, *_: Any):
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class _Scalar:
    """Stands in for the function by which numpy unpickles a scalar: makes a plain integer.

    It is a class with a ``__setstate__``, since a pickle can set the attributes of what has none.
    """

    def __new__(cls, dtype: _Dtype, data: str | bytes) -> int:
        data = data.encode("latin1") if isinstance(data, str) else data
        if dtype.code[0] not in "iu" or int(dtype.code[1:]) != len(data):
            raise pickle.UnpicklingError(f"a number of type {dtype.code!r} is not an integer")
        return int.from_bytes(data, "big" if dtype.order == ">" else "little", signed=dtype.code[0] == "i")

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("an integer has no state")


class _Unpickler(pickle.Unpickler):
    """Admits built-in containers and numbers, and integers that were numpy scalars; nothing of the file is called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "dtype"):
            return _Dtype
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "scalar":
            return _Scalar
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run any code; only numbers and containers "
                                     "are read")
