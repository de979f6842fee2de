"""Any folder of MIDI files as piano rolls."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import ceil
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from pyro_seq.data.pianoroll import HIGHEST, LOWEST, NUM_NOTES, SPLITS, Polyphonic, padded

__all__ = ["load_midi"]

_PERCUSSION = 9  # the channel on which General MIDI has drums, counted from 0
_PEDAL = 64  # the controller of the sustain pedal


class _Note(NamedTuple):
    start: int
    stop: int
    """In ticks; the note sounds before it."""
    channel: int
    pitch: int


def load_midi(folder: str | Path, step: float = 0.5, *, pedal: bool = False, valid: float = 0.1, test: float = 0.1
              ) -> Polyphonic:
    """Every MIDI file below a folder, as piano rolls sampled on a regular grid of beats. Needs ``mido``.

    Frame ``t`` (from 1) has the notes that sound at the instant ``(t - 1) * step``: those struck then or before, and not
    released until later. A note between two instants of the grid is not seen, and one struck again without a rest looks
    like one held. A song starts at beat zero and lasts until its last note is released. Time is counted in beats as
    written, so tempo changes play no part. Tracks and channels are put together; percussion (channel 10) is left out.
    Notes outside the piano, MIDI 21 to 108, are dropped, and a warning says how many.

    If the folder has subfolders ``train``, ``valid`` and ``test``, these are the splits. Otherwise the files are sorted
    by their path below the folder and split in that order: first train, then valid, then test.

    :param folder: searched with all its subfolders for ``.mid`` and ``.midi``.
    :param step: between frames, in quarter notes: 0.5 is an eighth note, usual for Nottingham, and 1 a quarter
        note, usual for the chorales of Bach. Thirds and the like are understood: ``1 / 3``.
    :param pedal: hold notes while the sustain pedal is down. By default a note ends as its key is released, as in a score.
    :param valid: fraction of the files, when there are no subfolders; at least one file.
    :param test: as ``valid``.
    :raises ValueError: naming the file that is broken, has no notes or is not counted in beats; if there are too few files
        or files beside the subfolders; or on an impossible option.
    :raises ImportError: without ``mido``: ``pip install pyro-seq[midi]``.

    Example::

        >>> import mido, tempfile
        >>> from pathlib import Path
        >>> from pyro_seq.data import load_midi
        >>> song = mido.MidiFile(ticks_per_beat=480)
        >>> song.tracks.append(mido.MidiTrack([
        ...     mido.Message("note_on", note=60, time=0), mido.Message("note_on", note=64, time=480),
        ...     mido.Message("note_off", note=60, time=240), mido.Message("note_off", note=64, time=240)]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in "abc":
        ...         song.save(Path(folder) / f"{name}.mid")
        ...     data = load_midi(folder, step=0.5)
        >>> data.train
        Sequences(x=(1, 4, 88), lengths 4..4)
        >>> [(frame.nonzero().flatten() + 21).tolist() for frame in data.train.x["x"][0]]
        [[60], [60], [60, 64], [64]]
    """
    folder = Path(folder)
    grid = Fraction(step).limit_denominator(1000) if 0 < step < float("inf") else Fraction(0)
    if grid <= 0:
        raise ValueError(f"step={step}: the time between frames is a positive number of quarter notes, at least 0.001")
    mido = _mido()
    dropped: dict[Path, int] = {}
    splits = {split: padded([_roll(mido, path, grid, pedal, dropped) for path in paths])
              for split, paths in _split(folder, valid, test).items()}
    if dropped:
        warnings.warn(f"{sum(dropped.values())} notes outside MIDI {LOWEST} to {HIGHEST} were dropped, in {len(dropped)} "
                      f"files of {folder}, the first being {next(iter(dropped))}", stacklevel=2)
    return Polyphonic(folder.name, **splits)


def _mido() -> ModuleType:
    try:
        import mido
    except ImportError as error:
        raise ImportError("load_midi reads MIDI files by mido, which is not installed: pip install pyro-seq[midi]") from error
    return mido


def _split(folder: Path, valid: float, test: float) -> Mapping[str, Sequence[Path]]:
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder")
    if not (valid > 0 and test > 0 and valid + test < 1):
        raise ValueError(f"valid={valid} and test={test} are fractions of the files: positive, and less than 1 together")
    # As text, since the order of paths differs between platforms.
    paths = sorted((path for path in folder.rglob("*") if path.suffix.lower() in (".mid", ".midi") and path.is_file()),
                   key=lambda path: path.relative_to(folder).as_posix())
    present = [split for split in SPLITS if (folder / split).is_dir()]
    if present:
        found = {split: [path for path in paths if path.relative_to(folder).parts[0] == split] for split in SPLITS}
        if empty := [split for split, inside in found.items() if not inside]:
            raise ValueError(f"{folder} has a subfolder {present[0]!r}, but there are no MIDI files in {empty}: with one of "
                             f"{list(SPLITS)}, all three are needed")
        if stray := [path for path in paths if path.relative_to(folder).parts[0] not in SPLITS]:
            raise ValueError(f"{stray[0]} is in none of the subfolders {list(SPLITS)}: move it into one")
        return found
    num_valid, num_test = max(1, round(valid * len(paths))), max(1, round(test * len(paths)))
    num_train = len(paths) - num_valid - num_test
    if num_train < 1:
        raise ValueError(f"{folder} has {len(paths)} MIDI files, too few to split in three")
    return {"train": paths[:num_train], "valid": paths[num_train:num_train + num_valid],
            "test": paths[num_train + num_valid:]}


def _roll(mido: ModuleType, path: Path, grid: Fraction, pedal: bool, dropped: dict[Path, int]) -> np.ndarray:
    """One song, ``(T, 88)``."""
    try:
        song = mido.MidiFile(path)
    # A broken file can make mido raise almost anything.
    except Exception as error:
        raise ValueError(f"{path} is not a readable MIDI file: {str(error) or type(error).__name__}. Repair or remove "
                         "it") from error
    if song.type == 2:
        raise ValueError(f"{path} holds several independent sequences (MIDI type 2): save each as a file of its own")
    if song.ticks_per_beat <= 0:
        raise ValueError(f"{path} counts time in seconds (SMPTE), not in beats: save it with ticks per quarter note")
    notes = [note for track in song.tracks for note in _notes(track)]
    if pedal:
        notes = _held(notes, song.tracks)
    inside = [note for note in notes if LOWEST <= note.pitch <= HIGHEST and note.stop > note.start]
    if outside := sum(not LOWEST <= note.pitch <= HIGHEST for note in notes):
        dropped[path] = outside
    if not inside:
        raise ValueError(f"{path} has no notes from MIDI {LOWEST} to {HIGHEST}: remove it")
    ticks = grid * song.ticks_per_beat  # per frame
    roll = np.zeros((ceil(max(note.stop for note in inside) / ticks), NUM_NOTES), np.uint8)
    for note in inside:
        roll[ceil(note.start / ticks):ceil(note.stop / ticks), note.pitch - LOWEST] = 1
    return roll


def _notes(track: Sequence[Any]) -> list[_Note]:
    """The notes of a track; those never released last until its end.

    Two voices may strike one key: it sounds until it was released as often as it was struck.
    """
    notes = []
    down: dict[tuple[int, int], list[int]] = defaultdict(list)
    now = 0
    for message in track:
        now += message.time
        if message.type not in ("note_on", "note_off") or message.channel == _PERCUSSION:
            continue
        key = message.channel, message.note
        if message.type == "note_on" and message.velocity > 0:
            down[key].append(now)
        elif down[key]:
            notes.append(_Note(down[key].pop(0), now, *key))
    return notes + [_Note(start, now, *key) for key, starts in down.items() for start in starts]


def _held(notes: Sequence[_Note], tracks: Sequence[Sequence[Any]]) -> list[_Note]:
    """The notes with each that ends under the pedal of its channel prolonged until the pedal is lifted."""
    events = defaultdict(list)
    end = 0
    for track in tracks:
        now = 0
        for message in track:
            now += message.time
            if message.type == "control_change" and message.control == _PEDAL:
                events[message.channel].append((now, message.value >= 64))
        end = max(end, now)
    times, lifted = {}, {}
    for channel, found in events.items():
        found.sort(key=lambda event: event[0])
        times[channel] = [time for time, _ in found]
        # When the pedal is up again after each event; at once if the event lifts it.
        after, until = [], end
        for time, is_down in reversed(found):
            until = until if is_down else time
            after.append(until)
        lifted[channel] = after[::-1]
    held = []
    for note in notes:
        # The last event until the key is released says whether the pedal is down.
        last = bisect_right(times.get(note.channel, []), note.stop) - 1
        held.append(note if last < 0 else note._replace(stop=max(note.stop, lifted[note.channel][last])))
    return held
