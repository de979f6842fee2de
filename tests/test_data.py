"""Data: located, downloaded whole or not at all, verified, and read exactly."""

import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mido
import numpy as np
import pytest
import torch

import pyro_seq as seq
from pyro_seq.data import load_midi, load_polyphonic, locate, polyphonic
from pyro_seq.data.locate import data_folder, download

SPLITS = ("train", "valid", "test")
SONGS = {
    "train": [[(60, 64, 67), (), (62,)], [(21,), (108, 21), (108,), (60,)]],
    "valid": [[(), (40,)]],
    "test": [[(50, 52)], [(50,), (51,), (52,)], [(108,)]],
}


def rolls(split):
    """Each song of a split as ``(T, 88)``, without its padding."""
    return [x[:length] for x, length in zip(split.x["x"], split.lengths.tolist(), strict=True)]


def notes(roll):
    return [tuple((frame.nonzero().flatten() + 21).tolist()) for frame in roll]


def same(data, songs):
    return all([notes(roll) for roll in rolls(getattr(data, split))] == [[tuple(sorted(step)) for step in song]
                                                                        for song in songs[split]] for split in SPLITS)


def arrays(songs):
    """The contents of the packed form."""
    flat = [(i, song) for i, split in enumerate(SPLITS) for song in songs[split]]
    roll = np.zeros((sum(len(song) for _, song in flat), 88), np.uint8)
    for row, step in zip(roll, (step for _, song in flat for step in song), strict=True):
        row[[note - 21 for note in step]] = 1
    return {"rolls": np.packbits(roll, axis=1), "lengths": np.array([len(song) for _, song in flat], np.int32),
            "split": np.array([i for i, _ in flat], np.uint8), "split_names": np.array(SPLITS),
            "low_midi": np.array(21), "n_notes": np.array(88)}


def save(folder, contents, suffix="npz"):
    path = folder / "polyphonic" / f"jsb_chorales.{suffix}"
    path.parent.mkdir(exist_ok=True)
    if suffix == "npz" and isinstance(contents, dict):
        np.savez_compressed(path, **contents)
    else:
        path.write_bytes(contents)
    return path


def pickled_by_python2(songs):
    """As Python 2 pickled songs whose notes are numpy's int64: the form of the files that Pyro's loader names."""
    out = io.BytesIO()
    out.write(b"\x80\x02}q\x01(")
    known = False
    for split in sorted(songs):
        out.write(b"U" + bytes([len(split)]) + split.encode() + b"](")
        for song in songs[split]:
            out.write(b"](")
            for step in song:
                out.write(b"(")
                for note in step:
                    if known:
                        out.write(b"h\x05h\x07")
                    else:
                        out.write(b"cnumpy.core.multiarray\nscalar\nq\x05cnumpy\ndtype\nq\x06U\x02i8K\x00K\x01\x87Rq\x07"
                                  b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")
                        known = True
                    out.write(b"U\x08" + struct.pack("<q", note) + b"\x86R")
                out.write(b"t")
            out.write(b"e")
        out.write(b"e")
    out.write(b"u.")
    return out.getvalue()


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['EVIL']}",)


# Where data lives.

def test_environment_overrides_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_SEQ_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    monkeypatch.setenv("PYRO_SEQ_DATA", str(tmp_path / "misspelt"))
    with pytest.raises(ValueError, match="misspelt' is not a folder: create it"):
        data_folder()
    with pytest.raises(ValueError, match="misspelt' is not a folder"):
        load_polyphonic("jsb")


@pytest.mark.parametrize("platform, environment, expected", [
    ("linux", {}, ".cache/pyro_seq"),
    ("linux", {"XDG_CACHE_HOME": "relative"}, ".cache/pyro_seq"),
    ("linux", {"XDG_CACHE_HOME": "/var/xdg"}, "/var/xdg/pyro_seq"),
    ("darwin", {}, "Library/Caches/pyro_seq"),
    ("win32", {}, "AppData/Local/pyro_seq"),
    ("win32", {"LOCALAPPDATA": "/local"}, "/local/pyro_seq"),
])
def test_cache_of_each_platform(platform, environment, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYRO_SEQ_DATA", "")  # Empty is unset.
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert data_folder() == tmp_path / expected


# Downloads.

@pytest.fixture
def server(monkeypatch):
    """Serves ``contents``; other paths misbehave."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/absent":
                self.send_error(404)
                return
            if self.path == "/silent":
                done.wait(5)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(running.contents) + (1000 if self.path == "/cut" else 0)))
            self.end_headers()
            self.wfile.write(running.contents)

        def log_message(self, *_):
            pass

    done = threading.Event()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.contents = b"hello\n"
        running.url = f"http://127.0.0.1:{running.server_address[1]}"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        done.set()
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("checksum", [
    None, "sha256:5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03",
    "git:ce013625030ba8dba906f756967f9e9ca394464a"])
def test_download(checksum, server, tmp_path):
    path = tmp_path / "new" / "hello.txt"
    download(f"{server.url}/hello", path, checksum)
    assert path.read_bytes() == b"hello\n"
    assert list(path.parent.iterdir()) == [path]


def test_git_checksum_is_that_of_git(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(200_000))
    try:
        found = subprocess.run(["git", "hash-object", path], check=True, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        pytest.skip("no git")
    assert locate._checksum(path, "git:") == f"git:{found}"
    assert locate._checksum(path, "sha256:") == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


@pytest.mark.parametrize("where, options, error, message", [
    ("absent", {}, ConnectionError, "could not download {url}/absent: HTTP Error 404"),
    ("cut", {}, ConnectionError, "could not download {url}/cut: the connection was closed 1000 bytes before the end"),
    ("silent", {"timeout": 0.2}, ConnectionError, "could not download {url}/silent: .*timed out"),
    ("hello", {"checksum": "sha256:" + 64 * "0"}, ValueError, "{url}/hello has the checksum sha256:5891.*was not kept"),
    ("hello", {"checksum": "git:" + 40 * "0"}, ValueError, "{url}/hello has the checksum git:ce01.*Try again"),
])
def test_failed_download_leaves_nothing(where, options, error, message, server, tmp_path):
    with pytest.raises(error, match=message.format(url=server.url)) as raised:
        download(f"{server.url}/{where}", tmp_path / "file", **options)
    assert str(tmp_path / "file") in str(raised.value)
    assert ("PYRO_SEQ_DATA" in str(raised.value)) == (error is ConnectionError)
    assert list(tmp_path.iterdir()) == []


def test_failed_download_keeps_what_was_there(server, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ConnectionError):
        download(f"{server.url}/cut", path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"old"


def test_interrupted_download_leaves_nothing(server, tmp_path, monkeypatch):
    def interrupted(*_):
        yield b"half"
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(locate, "_chunks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download(f"{server.url}/hello", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_no_network(tmp_path):
    with pytest.raises(ConnectionError, match=r"could not download http://pyro-seq\.invalid/a.*PYRO_SEQ_DATA"):
        download("http://pyro-seq.invalid/a", tmp_path / "a")  # RFC 2606: never resolves.


def test_polyphonic_is_downloaded_once(server, tmp_path, monkeypatch):
    server.contents = pickled_by_python2(SONGS)
    digest = hashlib.sha256(server.contents).hexdigest()
    monkeypatch.setattr(polyphonic, "_URL", server.url + "/{}")
    monkeypatch.setenv("PYRO_SEQ_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="has the checksum git:"):  # These are not the real files.
        load_polyphonic("jsb")
    monkeypatch.setattr(polyphonic, "_SOURCES", {"jsb": ("jsb_chorales", f"sha256:{digest}")})
    assert same(load_polyphonic("jsb"), SONGS)
    server.contents = b""
    assert same(load_polyphonic("jsb"), SONGS)
    assert [path.name for path in (tmp_path / "polyphonic").iterdir()] == ["jsb_chorales.pickle"]


# The four sets of polyphonic music.

@pytest.mark.parametrize("suffix, contents", [
    ("npz", arrays(SONGS)),
    ("npz", arrays(SONGS) | {"split_names": np.array(SPLITS[::-1]), "split": 2 - arrays(SONGS)["split"]}),
    ("pickle", pickle.dumps(SONGS)),
    ("pickle", pickle.dumps(SONGS, protocol=0)),
    ("pickle", pickle.dumps({s: [[[np.int64(n) for n in step] for step in song] for song in v] for s, v in SONGS.items()})),
    ("pickle", pickle.dumps({s: [[tuple(np.array(step, ">u2")) for step in song] for song in v] for s, v in SONGS.items()})),
    ("pickle", pickled_by_python2(SONGS)),
], ids=["npz", "npz, splits in another order", "pickle", "protocol 0", "numpy scalars", "big-endian scalars", "Python 2"])
def test_every_form_reads_the_same(suffix, contents, tmp_path):
    save(tmp_path, contents, suffix)
    data = load_polyphonic("jsb", tmp_path)
    assert data.name == "jsb" and same(data, SONGS)
    assert same(load_polyphonic("jsb_chorales", str(tmp_path)), SONGS)
    for split in SPLITS:
        made = getattr(data, split)
        checked = seq.Sequences.of(rolls(made))
        assert torch.equal(made.lengths, checked.lengths)
        assert torch.equal(made.x["x"], checked.x["x"]) and made.x["x"].dtype == torch.get_default_dtype()


def test_python2_form_is_what_pickle_reads():
    """The bytes above are a pickle like any other, so that reading them shows something."""
    assert pickle.loads(pickled_by_python2(SONGS)) == SONGS


@pytest.mark.parametrize("contents", [
    lambda: pickle.dumps(Evil()),
    lambda: pickle.dumps({"train": [[(60, Evil())]], "valid": [[()]], "test": [[()]]}),
    lambda: pickle.dumps(Evil(), protocol=0),
], ids=["alone", "among notes", "protocol 0"])
def test_malicious_pickle_runs_nothing(contents, tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL", str(tmp_path / "executed"))
    contents = contents()
    pickle.loads(contents)
    assert (tmp_path / "executed").exists()  # Python's own loader does run it.
    (tmp_path / "executed").unlink()
    path = save(tmp_path, contents, "pickle")
    with pytest.raises(ValueError, match=f"{path} is not.*asks for (posix|nt).system, which could run any code"):
        load_polyphonic("jsb", tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("contents", [
    b"cbuiltins\neval\n(S'1'\ntR.", b"cnumpy\nload\n.", b"cnumpy.core.multiarray\n_reconstruct\n.",
    b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",  # a dotted name
    b"cnumpy.core.multiarray\nscalar\n(dS'__new__'\nI1\nsb.",  # sets attributes of the stand-in itself
    b"cnumpy\ndtype\n(dS'__setstate__'\nI1\nsb.",
    b"\x80\x02cnumpy.core.multiarray\nscalar\nN}U\x08__name__U\x01xs\x86b.",
    b"\x82\x01.", b"Pid\n.",
])
def test_pickles_reach_nothing(contents, tmp_path):
    before = {c: dict(vars(c)) for c in (polyphonic._Scalar, polyphonic._Dtype)}
    path = save(tmp_path, contents, "pickle")
    with pytest.raises(ValueError, match=f"{path} is not the piano rolls of jsb"):
        load_polyphonic("jsb", tmp_path)
    assert before == {c: dict(vars(c)) for c in before}


def changed(**changes):
    return {key: value for key, value in (arrays(SONGS) | changes).items() if value is not None}


def zipped(contents):
    out = io.BytesIO()
    np.savez(out, **contents)
    return out.getvalue()


def flipped(contents):
    """One bit wrong, in the rolls."""
    at = contents.index(arrays(SONGS)["rolls"].tobytes())
    return contents[:at] + bytes([contents[at] ^ 1]) + contents[at + 1:]


def single(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@pytest.mark.parametrize("contents, message", [
    (b"", "No data left"),
    (zipped(arrays(SONGS))[:-50], ""),
    (zipped(arrays(SONGS))[:200], ""),
    (flipped(zipped(arrays(SONGS))), "CRC"),
    (b"<html>404</html>", "pickled"),
    (single(np.zeros(3)), "it is a single array"),
    (pickle.dumps(SONGS), "pickled"),
    (changed(rolls=None), r"lacks \['rolls'\]"),
    (changed(split=None, n_notes=None), r"lacks \['split', 'n_notes'\]"),
    (changed(rolls=np.array([None])), "Object arrays"),
    (changed(rolls=arrays(SONGS)["rolls"][:, :10]), r"uint8 of shape \(14, 10\), not uint8 of shape \(steps, 11\)"),
    (changed(rolls=arrays(SONGS)["rolls"].astype(float)), "its rolls are float64"),
    (changed(rolls=arrays(SONGS)["rolls"][:-1]), "lengths sum to 14, but it has 13 steps"),
    (changed(lengths=np.array([3, 4, 2, 1, 3, 2])), "lengths sum to 15, but it has 14 steps"),
    (changed(lengths=np.array([3, 4, 2, 0, 4, 1])), "song 3 has length 0"),
    (changed(lengths=np.array([3, 4, 2, 8, -4, 1])), "song 4 has length -4"),
    (changed(lengths=np.array([3., 4, 2, 1, 3, 1])), "its lengths are float64"),
    (changed(lengths=np.array([[3, 4, 2, 1, 3, 1]])), r"its lengths are int64 of shape \(1, 6\)"),
    (changed(split=np.array([0, 0, 1, 2, 2])), r"its split are int64 of shape \(5,\)"),
    (changed(split=np.array([0, 0, 1, 1, 1, 1])), r"splits \[0, 1\], not in all"),
    (changed(split=np.array([0, 0, 1, 2, 2, 3])), r"splits \[0, 1, 2, 3\], not in all"),
    (changed(split_names=np.array(["train", "valid", "verify"])), "its splits are"),
    (changed(low_midi=np.array(20)), "starts at MIDI note 20"),
    (changed(n_notes=np.array(87)), "has 87 notes"),
])
def test_broken_or_foreign_npz(contents, message, tmp_path):
    path = save(tmp_path, contents)
    with pytest.raises(ValueError, match=f"{path} is not the piano rolls of jsb: .*{message}.*delete it.*PYRO_SEQ_DATA"):
        load_polyphonic("jsb", tmp_path)


@pytest.mark.parametrize("contents, message", [
    (b"", "Ran out of input"),
    (pickle.dumps(SONGS)[:-20], ""),
    (pickled_by_python2(SONGS)[:-300], ""),
    (b"<html>404</html>", ""),
    (zipped(arrays(SONGS)), ""),
    (pickle.dumps([SONGS]), "it holds list, not a dict"),
    (pickle.dumps({"train": SONGS["train"]}), r"it holds \['train'\], not a dict of"),
    (pickle.dumps(SONGS | {"extra": []}), "it holds"),
    (pickle.dumps(SONGS | {"valid": []}), "'valid' is not a list of songs"),
    (pickle.dumps(SONGS | {"valid": {}}), "'valid' is not a list of songs"),
    (pickle.dumps(SONGS | {"test": [[(60,)], []]}), "song 1 of 'test' is not a list of tuples"),
    (pickle.dumps(SONGS | {"test": [[60]]}), "song 0 of 'test' is not a list of tuples"),
    (pickle.dumps(SONGS | {"test": [[(20,)]]}), "song 0 of 'test' has the note 20; MIDI notes 21 to 108"),
    (pickle.dumps(SONGS | {"test": [[(109,)]]}), "has the note 109"),
    (pickle.dumps(SONGS | {"test": [[(60.0,)]]}), "has the note 60.0"),
    (pickle.dumps(SONGS | {"test": [[(True,)]]}), "has the note True"),
    (pickle.dumps(SONGS | {"test": [[(np.float64(60),)]]}), "'f8' is not an integer"),
])
def test_broken_or_foreign_pickle(contents, message, tmp_path):
    path = save(tmp_path, contents, "pickle")
    with pytest.raises(ValueError, match=f"{path} is not the piano rolls of jsb: .*{message}.*delete it.*PYRO_SEQ_DATA"):
        load_polyphonic("jsb", tmp_path)


def test_unknown_name(tmp_path):
    with pytest.raises(ValueError, match="no polyphonic data set 'bach': choose among 'jsb', 'nottingham'"):
        load_polyphonic("bach", tmp_path)


# The real files.

def real(name, data_dir):
    if not (data_dir / "polyphonic").is_dir():
        pytest.skip(f"no polyphonic music in {data_dir}")
    return load_polyphonic(name, data_dir)


@pytest.mark.parametrize("name, songs, steps", [
    ("jsb", (229, 76, 77), (13807, 4602, 4725)),
    ("nottingham", (694, 173, 170), (176561, 45513, 44463)),
    ("musedata", (524, 135, 124), (245202, 82755, 64339)),
    ("piano_midi", (87, 12, 25), (75911, 8540, 19036)),
])
def test_counts_of_real_data(name, songs, steps, data_dir):
    torch.set_default_dtype(torch.float32)  # MuseData is large.
    data = real(name, data_dir)
    assert tuple(split.num_sequences for split in data[1:]) == songs
    assert tuple(int(split.lengths.sum()) for split in data[1:]) == steps
    assert all(split.x["x"].shape == (split.num_sequences, split.num_steps, 88) for split in data[1:])


def test_real_npz_and_pickle_agree(data_dir, tmp_path):
    data = real("jsb", data_dir)
    songs = {split: [notes(roll) for roll in rolls(getattr(data, split))] for split in SPLITS}
    save(tmp_path, pickled_by_python2(songs), "pickle")
    again = load_polyphonic("jsb", tmp_path)
    for split in SPLITS:
        assert torch.equal(getattr(data, split).x["x"], getattr(again, split).x["x"])
        assert torch.equal(getattr(data, split).lengths, getattr(again, split).lengths)


def frequency(x):
    """Of each note being on, with half a step of each kind added."""
    return (x.sum(0) + 0.5) / (len(x) + 1)


def cost(p, x):
    return torch.nn.functional.binary_cross_entropy(p.expand_as(x), x, reduction="sum")


@pytest.mark.parametrize("name, marginal, markov", [
    ("jsb", 11.06, 10.47), ("nottingham", 10.25, 5.16), ("piano_midi", 11.05, 8.26)])
def test_counting_gives_the_known_figures(name, marginal, markov, data_dir):
    """Test nats per step when each note is independent, and when it depends on itself one step before.

    The first step has no step before it and is scored by the marginal. The figures, to two decimals, come from a separate
    count; adding one instead of a half gives the same.
    """
    data = real(name, data_dir)
    train, test = rolls(data.train), rolls(data.test)
    steps = sum(map(len, test))
    p = frequency(torch.cat(train))
    assert abs(cost(p, torch.cat(test)) / steps - marginal) < 0.005

    before, now = torch.cat([x[:-1] for x in train]), torch.cat([x[1:] for x in train])
    after_off, after_on = ((now * was).sum(0).add(0.5) / was.sum(0).add(1) for was in (1 - before, before))
    total = cost(p, torch.stack([x[0] for x in test]))
    for x in test:
        total += cost(torch.where(x[:-1] == 1, after_on, after_off), x[1:])
    assert abs(total / steps - markov) < 0.005


# MIDI.

def track(*events):
    """Of (time in ticks, event), in order."""
    now, out = 0, mido.MidiTrack()
    for time, event in events:
        out.append(event.copy(time=time - now))
        now = time
    return out


def on(note, channel=0, velocity=64):
    return mido.Message("note_on", note=note, channel=channel, velocity=velocity)


def off(note, channel=0):
    return mido.Message("note_off", note=note, channel=channel)


def pedal(value, channel=0):
    return mido.Message("control_change", control=64, value=value, channel=channel)


def write(path, *tracks, ticks_per_beat=480, kind=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    mido.MidiFile(type=kind, ticks_per_beat=ticks_per_beat, tracks=list(tracks)).save(path)
    return path


PLAIN = track((0, on(60)), (480, off(60)))


def one(folder, *tracks, step=1.0, ticks_per_beat=480, **options):
    """The notes at each step of a song read back."""
    write(folder / "train" / "song.mid", *tracks, ticks_per_beat=ticks_per_beat)
    for split in ("valid", "test"):
        write(folder / split / "other.mid", PLAIN)
    return notes(rolls(load_midi(folder, step, **options).train)[0])


TEMPO = mido.MetaMessage("set_tempo", tempo=250_000)


@pytest.mark.parametrize("tracks, expected", [
    ([PLAIN], [(60,)]),
    ([track((480, on(60)), (1440, off(60)))], [(), (60,), (60,)]),
    ([track((0, on(60)), (480, on(60, velocity=0)), (480, on(62)), (960, on(62, velocity=0)))], [(60,), (62,)]),
    ([track((0, on(60)), (0, TEMPO), (480, TEMPO), (960, off(60)))], [(60,), (60,)]),
    ([track((0, on(60)), (960, off(60))), track((480, on(64)), (1440, off(64)))], [(60,), (60, 64), (64,)]),
    ([track((0, on(60)), (960, off(60))), track((240, on(60)), (480, off(60)))], [(60,), (60,)]),
    ([track((0, on(60, 0)), (0, on(60, 1)), (480, off(60, 1)), (960, off(60, 0)))], [(60,), (60,)]),
    ([track((0, on(60)), (0, on(60)), (480, off(60)), (1440, off(60)))], [(60,), (60,), (60,)]),
    ([track((0, on(60)), (480, on(60)), (480, off(60)), (960, off(60)))], [(60,), (60,)]),
    ([track((0, on(60)), (0, on(62)), (480, off(62)), (960, TEMPO))], [(60, 62), (60,)]),
    ([track((0, off(60)), (0, on(60)), (480, off(60)), (960, off(60)))], [(60,)]),
    ([track((0, on(60)), (0, on(40, channel=9)), (480, off(60)), (1440, off(40, channel=9)))], [(60,)]),
    ([track((0, on(60)), (100, off(60)), (500, on(62)), (900, off(62)), (960, on(64)), (961, off(64)))],
     [(60,), (), (64,)]),
    ([track((0, on(21)), (0, on(108)), (480, off(21)), (480, off(108)))], [(21, 108)]),
    ([track((0, pedal(127)), (0, on(60)), (480, off(60)), (960, pedal(0)))], [(60,)]),
], ids=["one note", "rest first", "velocity 0", "tempo", "tracks", "same key, two tracks", "same key, two channels", "unison",
        "repeated", "never released", "released only", "percussion", "between instants", "outermost", "pedal ignored"])
def test_midi_is_read_exactly(tracks, expected, tmp_path):
    assert one(tmp_path, *tracks) == expected


@pytest.mark.parametrize("tracks, expected", [
    ([track((0, pedal(127)), (0, on(60)), (480, off(60)), (1440, pedal(0)), (1440, on(62)), (1920, off(62)))],
     [(60,), (60,), (60,), (62,)]),
    ([track((0, on(60)), (240, pedal(64)), (480, off(60)), (500, pedal(100)), (960, pedal(63)))], [(60,), (60,)]),
    ([track((0, on(60)), (240, pedal(127)), (300, pedal(0)), (480, off(60)), (600, pedal(127)), (960, pedal(0)))], [(60,)]),
    ([track((0, pedal(127)), (0, on(60)), (480, off(60)), (1440, TEMPO))], [(60,), (60,), (60,)]),
    ([track((0, pedal(127, channel=1)), (0, on(60)), (480, off(60)), (960, pedal(0, channel=1)))], [(60,)]),
    ([track((0, pedal(127)), (960, pedal(0))), track((0, on(60)), (480, off(60)))], [(60,), (60,)]),
    ([PLAIN], [(60,)]),
], ids=["held", "threshold", "lifted before", "never lifted", "other channel", "other track", "no pedal"])
def test_midi_pedal(tracks, expected, tmp_path):
    assert one(tmp_path, *tracks, pedal=True) == expected


@pytest.mark.parametrize("ticks_per_beat", [24, 96, 480, 1000])
@pytest.mark.parametrize("step", [0.25, 0.5, 1 / 3, 1.0, 2.0])
def test_midi_known_roll(step, ticks_per_beat, tmp_path):
    """A random roll on the grid comes back exactly, whatever the resolution."""
    if (step * ticks_per_beat) % 1 > 1e-6:
        step = 1.0
    roll = torch.rand(12, 88) < 0.2
    roll[-1, 3] = True  # The song ends with its last note.
    edge = torch.diff(roll.int(), dim=0, prepend=torch.zeros(1, 88, dtype=torch.int),
                      append=torch.zeros(1, 88, dtype=torch.int))
    events = [(round(t * step * ticks_per_beat), (on if edge[t, n] > 0 else off)(n + 21))
              for t, n in edge.nonzero().tolist()]
    assert one(tmp_path, track(*events), step=step, ticks_per_beat=ticks_per_beat) == notes(roll)


def test_midi_splits(tmp_path):
    names = [f"{name}.MID" if name == "k" else f"sub/{name}.midi" if name < "d" else f"{name}.mid" for name in "abcdefghijkl"]
    for i, name in enumerate(names):
        write(tmp_path / name, track((0, on(60 + i)), (480, off(60 + i))))
    (tmp_path / "readme.txt").write_text("not music")
    order = sorted(names)
    data = load_midi(tmp_path, 1.0, valid=0.25, test=0.1)
    assert data.name == tmp_path.name
    found = [notes(roll)[0][0] - 60 for split in data[1:] for roll in rolls(split)]
    assert [names[i] for i in found] == order
    assert [split.num_sequences for split in data[1:]] == [8, 3, 1]


def test_midi_dropped_notes_are_counted(tmp_path):
    with pytest.warns(UserWarning, match="3 notes outside MIDI 21 to 108 were dropped, in 1 files of .*song.mid"):
        assert one(tmp_path, track((0, on(60)), (0, on(20)), (0, on(109)), (0, on(0)), (480, off(60)), (960, off(20)),
                                   (960, off(109)), (960, off(0)))) == [(60,)]


@pytest.mark.parametrize("contents, message", [
    (b"", "is not a readable MIDI file: EOFError. Repair or remove it"),
    (b"not midi at all", "is not a readable MIDI file"),
    (b"MThd\0\0\0\6\0\1\0\1\1\xe0MTrk\0\0\0\x20\0\x90", "is not a readable MIDI file"),
    (b"MThd\0\0\0\6\0\1\0\0\1\xe0", "has no notes from MIDI 21 to 108: remove it"),
    (b"MThd\0\0\0\6\0\1\0\0\xe7\x28", r"counts time in seconds \(SMPTE\)"),
    (b"MThd\0\0\0\6\0\1\0\0\0\0", "counts time in seconds"),
    (b"MThd\0\0\0\6\0\2\0\0\1\xe0", "holds several independent sequences"),
], ids=["empty", "text", "truncated", "no tracks", "SMPTE", "no ticks", "type 2"])
def test_broken_midi_is_named(contents, message, tmp_path):
    for name in "abcd":
        write(tmp_path / f"{name}.mid", PLAIN)
    (tmp_path / "c.mid").write_bytes(contents)
    with pytest.raises(ValueError, match=f"{tmp_path / 'c.mid'} {message}"):
        load_midi(tmp_path)


def test_midi_without_notes_in_range(tmp_path):
    with pytest.raises(ValueError, match="song.mid has no notes from MIDI 21 to 108"):
        one(tmp_path, track((0, on(10)), (480, off(10))))


@pytest.mark.parametrize("files, options, message", [
    ([], {}, "has 0 MIDI files, too few to split in three"),
    (["a.mid", "b.mid"], {}, "has 2 MIDI files, too few"),
    (["a.mid", "b.mid", "c.mid"], {"valid": 0.5, "test": 0.5}, "valid=0.5 and test=0.5 are fractions"),
    (["a.mid", "b.mid", "c.mid"], {"valid": 0}, "valid=0 and test=0.1 are fractions"),
    (["a.mid", "b.mid", "c.mid"], {"step": 0}, "step=0: the time between frames is a positive"),
    (["a.mid", "b.mid", "c.mid"], {"step": float("nan")}, "step=nan"),
    (["a.mid", "b.mid", "c.mid"], {"step": float("inf")}, "step=inf"),
    (["train/a.mid", "test/b.mid", "c.mid"], {}, r"has a subfolder 'train', but there are no MIDI files in \['valid'\]"),
    (["train/a.mid", "test/b.mid", "valid/c.mid", "d.mid"], {}, "d.mid is in none of the subfolders"),
])
def test_midi_mistakes(files, options, message, tmp_path):
    for name in files:
        write(tmp_path / name, PLAIN)
    with pytest.raises(ValueError, match=message):
        load_midi(tmp_path, **options)


def test_midi_folder_is_absent(tmp_path):
    with pytest.raises(ValueError, match="nowhere' is not a folder"):
        load_midi(tmp_path / "nowhere")


def test_midi_without_mido(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mido", None)
    with pytest.raises(ImportError, match=r"pip install pyro-seq\[midi\]"):
        load_midi(tmp_path)


def test_data_goes_into_a_model(tmp_path):
    import pyro
    import pyro.distributions as dist

    class Chords(seq.StateSpaceModel):
        def initial(self):
            return pyro.sample("z", dist.Normal(0.0, 1.0))

        def transition(self, z):
            return pyro.sample("z", dist.Normal(z, 1.0))

        def emission(self, z, x=None):
            return pyro.sample("x", dist.Bernoulli(logits=z[..., None].expand(-1, 88) - 3).to_event(1), obs=x)

    save(tmp_path, arrays(SONGS))
    data = load_polyphonic("jsb", tmp_path)
    x, lengths = data.train.x["x"], data.train.lengths
    model = Chords()
    for arguments in ([data.train], [x, lengths], [x[:1], lengths[:1]]):
        assert torch.isfinite(pyro.poutine.trace(model).get_trace(*arguments).log_prob_sum())
