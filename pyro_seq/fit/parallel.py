"""Data-parallel training: each process takes a share of every batch, and gradients are summed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as distributed
from torch import Tensor

__all__ = ["agreed", "launched", "rank", "share", "sum_gradients", "world_size"]


def world_size() -> int:
    """The number of processes that train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """This process's number among them."""
    return distributed.get_rank() if world_size() > 1 else 0


@contextmanager
def launched(device: torch.device) -> Iterator[None]:
    """Join the processes that ``torchrun`` has started, if it has: through gloo on CPUs and nccl on GPUs."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized()
    if not alone:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        if not alone:
            distributed.destroy_process_group()


def share(index: Sequence[int]) -> list[int]:
    """This process's part of a batch."""
    return list(index[rank()::world_size()])


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Add up the gradients of all processes, in one message. A parameter that none has a gradient for is left without, since
    an optimiser would move it by its momentum."""
    if world_size() == 1:
        return
    present = parameters[0].new_tensor([p.grad is not None for p in parameters])
    flat = torch.cat([present, *((torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters)])
    distributed.all_reduce(flat)
    present, *parts = flat.split([len(parameters), *(p.numel() for p in parameters)])
    for p, found, part in zip(parameters, present.tolist(), parts, strict=True):
        p.grad = part.view_as(p) if found else None


def agreed(values: Sequence[Tensor]) -> None:
    """Give every process the tensors of the first."""
    if world_size() > 1:
        for value in values:
            distributed.broadcast(value, 0)
