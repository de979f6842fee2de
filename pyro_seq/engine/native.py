"""Kernels in C++ of what takes an eager step of many particles its time: normal numbers, their log density, normalised weights.

Torch draws normal numbers one at a time, and takes a pass over memory for each term of a density. The kernels do at once what
can be done while a number is at hand; ``native.cpp`` is compiled when the package is installed. Without them (no compiler then,
a GPU, numbers of another type) torch does the same. The normal numbers are torch's own, bit for bit, which is tried once in
each process.
"""

from __future__ import annotations

import ctypes
import sysconfig
import threading
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["fill_normal", "normal_log_density", "normalised"]

_LEAST_DRAWN, _LEAST_SCORED = 2**14, 2**12
"""Fewer numbers take less time than what is done around the kernels."""
_MOST_THREADS = 4
"""With more of them torch's passes over memory, which it shares out among threads, take less time than the kernel's one."""

# Torch has no public names for what _is_plain asks; where these are others, torch does it all.
_CAN_TELL = all((
    hasattr(torch._C, "_len_torch_dispatch_stack"), hasattr(torch._C, "_get_tracing_state"),
    hasattr(torch._C._functorch, "peek_interpreter_stack"), hasattr(torch.autograd.forward_ad, "_current_level")))

_LOCK = threading.RLock()  # what interrupts a draw, such as a signal's handler, may draw too


def fill_normal(out: Tensor) -> Tensor:
    """``out.normal_()``: standard normal numbers of torch's default generator, in place."""
    if out.numel() < _LEAST_DRAWN or not _is_plain(out) or not out.is_contiguous() or (kernels := _kernels()) is None:
        return out.normal_()
    _draw(kernels, out, torch.default_generator)
    return out


def normal_log_density(value: Tensor, loc: Tensor, scale: Tensor) -> Tensor | None:
    """The log density of normal distributions at ``value``, without its gradient; ``None`` where there is no kernel for it.

    :param value: with ``loc`` and ``scale``, of one shape.
    """
    if value.numel() < _LEAST_SCORED or not all(part.shape == value.shape and _is_plain(part) for part in (value, loc, scale)):
        return None
    if torch.get_num_threads() > _MOST_THREADS or (kernels := _kernels()) is None:
        return None
    arguments: list[int] = []
    for part in (value, loc, scale):
        alike = not any(part.stride())
        if not alike and not part.is_contiguous():
            return None
        arguments.extend((part.data_ptr(), 0 if alike else 1))
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    kernels.normal_log_density(*arguments, out.data_ptr(), out.numel())
    return out


def normalised(log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Weights of sum one, the log of their mean, effective sample size and largest share, without gradients, of each row of log
    weights; ``None`` where there is no kernel for them.

    :param log_weights: ``(n, N)``
    """
    if log_weights.requires_grad and torch.is_grad_enabled() or not _is_plain(log_weights) or not log_weights.is_contiguous():
        return None
    if log_weights.dim() != 2 or not log_weights.numel() or torch.get_num_threads() > _MOST_THREADS or (
            kernels := _kernels()) is None:
        return None
    n, particles = log_weights.shape
    few = torch.empty(3, n, dtype=log_weights.dtype, device=log_weights.device)
    found = torch.empty_like(log_weights), *few.unbind()
    kernels.normalise(log_weights.data_ptr(), *[part.data_ptr() for part in found], n, particles)
    return found


def _is_plain(value: Tensor) -> bool:
    """Whether the kernels can take the numbers as they lie, with no transform around that would see what torch does to them."""
    if torch.compiler.is_compiling() or value.dtype != torch.float32 or value.device.type != "cpu" or not _CAN_TELL:
        return False
    return (type(value) in (Tensor, torch.nn.Parameter) and not value.is_neg() and not value._is_zerotensor()
            and torch._C._len_torch_dispatch_stack() == 0 and torch._C._functorch.peek_interpreter_stack() is None
            and torch._C._get_tracing_state() is None and torch.autograd.forward_ad._current_level < 0)


def _draw(kernels: ctypes.CDLL, out: Tensor, generator: torch.Generator) -> None:
    """Draw on a copy of the generator's state, and let it go on from there. The lock that torch has for its own draws cannot be
    had here: where another thread has drawn meanwhile, it is done again."""
    with _LOCK:
        while True:
            before = generator.get_state()
            after = before.clone()
            kernels.standard_normal(after.data_ptr(), out.data_ptr(), out.numel())
            if _bytes(generator.get_state()) == _bytes(before):  # holding Python's lock, up to the next line
                break
        generator.set_state(after)


def _bytes(state: Tensor) -> bytes:
    return state.numpy().tobytes()


@cache
def _kernels() -> ctypes.CDLL | None:
    """The kernels, if they are there and draw what torch draws."""
    path = Path(__file__).with_name(f"_native{sysconfig.get_config_var('EXT_SUFFIX')}")
    try:
        found = ctypes.CDLL(str(path))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        found.standard_normal.argtypes = [pointer, pointer, number]
        found.normal_log_density.argtypes = [pointer, number] * 3 + [pointer, number]
        found.normalise.argtypes = [pointer] * 5 + [number] * 2
        found.standard_normal.restype = found.normal_log_density.restype = found.normalise.restype = None
    except (OSError, AttributeError):  # not compiled, or of another version
        return None
    ours, theirs = (torch.Generator("cpu").manual_seed(0) for _ in range(2))
    if len(ours.get_state()) != 5056:  # another generator than the one it knows
        return None
    for count in (1000, 4096 + 17):
        numbers = torch.empty(count, dtype=torch.float32, device="cpu")
        _draw(found, numbers, ours)
        if not torch.equal(numbers, torch.empty_like(numbers).normal_(generator=theirs)):
            return None
    return found if torch.equal(ours.get_state(), theirs.get_state()) else None
