"""Where data lives, and how a file gets there: whole and verified, or not at all."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen
from uuid import uuid4

from tqdm import tqdm

__all__ = ["data_folder", "download"]

_CHUNK = 1 << 16  # bytes


def data_folder() -> Path:
    """The folder of the data sets: ``$PYRO_SEQ_DATA`` if that is set, else ``pyro_seq`` in the user's cache.

    The cache is ``$XDG_CACHE_HOME`` or ``~/.cache``, ``~/Library/Caches`` on macOS, ``%LOCALAPPDATA%`` on Windows. The
    folder in the cache need not exist yet.

    :raises ValueError: if ``PYRO_SEQ_DATA`` is not a folder, since a misspelt one would be filled without notice.

    Example::

        >>> from pyro_seq.data.locate import data_folder
        >>> print(data_folder())  # doctest: +SKIP
        /home/user/.cache/pyro_seq
    """
    if chosen := os.environ.get("PYRO_SEQ_DATA"):
        folder = Path(chosen).expanduser()
        if not folder.is_dir():
            raise ValueError(f"PYRO_SEQ_DATA={chosen!r} is not a folder: create it, correct the path, or unset the variable")
        return folder
    return _cache() / "pyro_seq"


def _cache() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return xdg if xdg.is_absolute() else Path.home() / ".cache"  # The XDG specification has relative paths ignored.


def download(url: str, path: Path, checksum: str | None = None, timeout: float = 30.0) -> None:
    """Bring a file from the network to ``path``, which then holds all of it or is untouched.

    :param url: the address.
    :param path: where the file goes; its folder is made.
    :param checksum: ``"sha256:"`` and 64 hexadecimal digits, or ``"git:"`` and the 40 by which git names the content,
        shown by ``git ls-tree``. Not verified when omitted.
    :param timeout: seconds without an answer after which to give up.
    :raises ConnectionError: if the address cannot be read to its end.
    :raises ValueError: if what came does not match the checksum.

    Example::

        >>> from pathlib import Path
        >>> from pyro_seq.data.locate import download
        >>> download("https://example.org/songs.zip", Path("songs.zip"))  # doctest: +SKIP
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is atomic only within one file system; and a name of its own, since several
    # processes may be downloading.
    part = path.parent / f".{path.name}.{uuid4().hex}.part"
    try:
        with open(part, "wb") as file:
            for chunk in _chunks(url, path, timeout):
                file.write(chunk)
        if checksum is not None and (found := _checksum(part, checksum)) != checksum:
            raise ValueError(f"{url} has the checksum {found}, but {checksum} is expected: the file was changed on its way "
                             f"or at its source, and was not kept. Try again, or put the right file at {path}")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _chunks(url: str, path: Path, timeout: float) -> Iterator[bytes]:
    try:
        with urlopen(url, timeout=timeout) as response:
            length = response.headers.get("Content-Length")
            expected = None if length is None else int(length)
            # disable=None: no bar where nobody sees it.
            with tqdm(total=expected, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
                while chunk := response.read(_CHUNK):
                    bar.update(len(chunk))
                    expected = None if expected is None else expected - len(chunk)
                    yield chunk
        if expected:
            raise ConnectionError(f"the connection was closed {expected} bytes before the end")
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, HTTPError):
            error.close()  # It holds the connection.
        raise ConnectionError(
            f"could not download {url}: {error}. Without a network, bring the file from elsewhere and put it at {path}, or "
            "set PYRO_SEQ_DATA to a folder that holds the data") from error


def _checksum(path: Path, like: str) -> str:
    """The checksum of a file, of the same kind as another."""
    kind = like.partition(":")[0]
    if kind == "git":  # git hashes the content after a header.
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    else:
        digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return f"{kind}:{digest.hexdigest()}"
