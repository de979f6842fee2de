"""Checkpoints: written whole or not at all, checked when read, and never able to run code."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["load_checkpoint", "save_checkpoint"]

_MAGIC = b"pyro_seq checkpoint 1\n"


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them.

    The file appears under its name only when it is complete, so that a run killed while writing leaves the last one.

    Example::

        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "run.ckpt"
        >>> save_checkpoint(path, {"epoch": 3, "weights": torch.ones(2)})
        >>> load_checkpoint(path)["epoch"]
        3
    """
    path = Path(path)
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    body = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_MAGIC + hashlib.sha256(body).digest() + body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_checkpoint(path: str | Path, device: Any = "cpu") -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote.

    :param device: where the tensors go.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is not one of ours, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r}")
    content = path.read_bytes()
    if not content.startswith(_MAGIC):
        raise ValueError(f"{str(path)!r} is not a checkpoint of pyro_seq, or one of another version: it does not begin as one")
    digest, body = content[len(_MAGIC):len(_MAGIC) + 32], content[len(_MAGIC) + 32:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError(f"the checkpoint {str(path)!r} is damaged: its {len(body)} bytes do not have the checksum they were "
                         "written with. Delete it; training begins anew without it")
    try:  # weights_only: tensors and plain containers, no code.
        return torch.load(io.BytesIO(body), map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"the checkpoint {str(path)!r} holds more than tensors, numbers, strings and containers of them. "
                         "None of it was run or read; pyro_seq writes no such file") from error
