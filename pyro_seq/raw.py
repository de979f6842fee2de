"""What users pass as data, as tensors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

__all__ = ["as_tensor", "check_lengths", "continued", "index_of", "pad_with_last", "present_of", "right"]


def right(flag: Tensor, like: Tensor) -> Tensor:
    return flag.reshape(flag.shape + (1,) * (like.dim() - flag.dim()))


def as_tensor(name: str, value: Any, lengths: Any) -> tuple[Tensor, Any]:
    """One input as ``(B, T, ...)`` and the lengths, known when the input is a ragged list."""
    if isinstance(value, pd.DataFrame):
        bad = [str(c) for c in value.columns if not pd.api.types.is_numeric_dtype(value[c])]
        if bad:
            raise TypeError(f"{name!r}: columns {bad} are not numeric; select or encode them first")
        return _from_numpy(value.to_numpy(dtype=float, na_value=np.nan))[None], lengths
    if isinstance(value, pd.Series):
        if not pd.api.types.is_numeric_dtype(value):
            raise TypeError(f"{name!r} is a Series of type {value.dtype}, not numeric; encode it first")
        return _from_numpy(value.to_numpy(dtype=float, na_value=np.nan))[None], lengths
    if isinstance(value, (list, tuple)) and value and not all(np.isscalar(v) for v in value):
        parts = [as_tensor(name, v, None)[0][0] if isinstance(v, (pd.Series, pd.DataFrame)) else
                 v if isinstance(v, Tensor) else _numeric(name, v) for v in value]
        events = {tuple(p.shape[1:]) for p in parts}
        if len(events) > 1 or any(p.dim() == 0 for p in parts):
            raise ValueError(f"{name!r}: the sequences have frames of different shapes {sorted(events)}")
        if any(len(p) == 0 for p in parts):
            empty = [i for i, p in enumerate(parts) if len(p) == 0]
            raise ValueError(f"{name!r}: sequences {empty} are empty; every sequence needs at least one frame")
        ragged = torch.tensor([len(p) for p in parts], device="cpu")
        if lengths is None:
            lengths = ragged
        elif list(lengths) != ragged.tolist():
            raise ValueError(f"{name!r} is a list of sequences of lengths {ragged.tolist()}, but lengths="
                             f"{list(lengths)} was given: leave lengths out")
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), lengths
    if not isinstance(value, Tensor):
        value = _numeric(name, value)
    if value.is_complex():
        raise TypeError(f"{name!r} is complex; pass real and imaginary parts as two dimensions")
    if value.dim() == 0:
        raise ValueError(f"{name!r} is a single number; sequences have shape (B, T, ...) or, for one series, (T,). If it is "
                         "meant as an option, this function has none of that name")
    if value.is_inference():  # no gradient could be taken of what is computed from it
        value = value.clone()
    return (value[None] if value.dim() == 1 else value), lengths


def _numeric(name: str, value: Any) -> Tensor:
    try:
        return _from_numpy(np.asarray(value))
    except (TypeError, ValueError) as error:
        what = ("holds None (NoneType), which is not numeric" if value is None else
                f"of type {type(value).__name__} is not numeric data")
        raise TypeError(f"{name!r} {what}: pass a tensor, an array, a list of sequences, or a pandas Series or DataFrame, "
                        "with NaN (float('nan'), not None) where a value is missing") from error


def index_of(value: Any) -> tuple[pd.Index, ...]:
    """The indices of pandas objects, unless they only count from zero."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(part, (pd.Series, pd.DataFrame)) for part in parts):
        return ()
    for part in parts:
        if isinstance(part.index, (pd.DatetimeIndex, pd.PeriodIndex)) and not part.index.is_monotonic_increasing:
            raise ValueError(f"the dates of a {type(part).__name__} are not in order, from {part.index[0]} to {part.index[-1]}"
                             ": frames are taken one after the other as they stand, so sort them, x.sort_index()")
    return () if all(part.index.equals(pd.RangeIndex(len(part))) for part in parts) else tuple(part.index for part in parts)


def continued(index: pd.Index, count: int) -> pd.Index | None:
    """``count`` more entries of an index with a fixed step."""
    if isinstance(index, pd.PeriodIndex):
        return pd.period_range(index[-1], periods=count + 1)[1:]
    if isinstance(index, pd.DatetimeIndex):
        with warnings.catch_warnings():  # of pandas, that what it returns, of either type, will be of the other
            warnings.simplefilter("ignore")
            step = index.freq or index.inferred_freq
        return None if step is None else pd.date_range(index[-1], periods=count + 1, freq=step)[1:]
    if not pd.api.types.is_numeric_dtype(index) or len(index) < 2 or len(steps := set(np.diff(index))) > 1:
        return None
    return pd.Index(index[-1] + steps.pop() * np.arange(1, count + 1))


def _from_numpy(array: np.ndarray) -> Tensor:
    """Arrays take torch's default floating type, since numpy's is float64 whatever the model's."""
    tensor = torch.from_numpy(np.array(array, order="C"))
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def check_lengths(values: Mapping[str, Tensor], lengths: Any) -> tuple[int, int, Tensor]:
    name, value = next(iter(values.items()), (None, None))
    if value is None and lengths is None:
        raise ValueError("no data was given, and nothing tells how many sequences of what length to simulate: pass x to infer, "
                         "or lengths to simulate, e.g. model(lengths=[100] * 8)")
    if value is not None and (value.shape[0] == 0 or value.shape[1] == 0):
        raise ValueError(f"{name!r} has shape {tuple(value.shape)}: the batch or the time dimension is empty")
    if lengths is None:
        lengths = torch.full((value.shape[0],), value.shape[1], dtype=torch.long, device="cpu")
    try:
        lengths = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"lengths={lengths!r} is not a list of integers, one per sequence") from error
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths has dtype {lengths.dtype}; integers are expected")
    if lengths.dim() == 0:
        lengths = lengths[None]
    if lengths.dim() != 1 or len(lengths) == 0:
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}; one integer per sequence, (B,), is expected")
    batch = len(lengths) if value is None else value.shape[0]
    if len(lengths) != batch:
        raise ValueError(f"lengths has {len(lengths)} entries but {name!r} of shape {tuple(value.shape)} "
                         f"holds {batch} sequences")
    limit = int(lengths.max()) if value is None else value.shape[1]
    bad = ((lengths < 1) | (lengths > limit)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"lengths must lie between 1 and T = {limit}: sequence {bad[0]} has "
                         f"length {int(lengths[bad[0]])}")
    return batch, int(lengths.max()), lengths.long()


def pad_with_last(value: Tensor, last: Tensor) -> Tensor:
    return value.gather(1, right(last, value).expand(value.shape))


def present_of(name: str, mask: Any, value: Tensor, steps: int, full: int) -> Tensor | None:
    """``mask`` for one input as booleans of the shape of ``value``; padding is taken as observed."""
    mask = mask.get(name) if isinstance(mask, Mapping) else mask
    if mask is None:
        return None
    mask = torch.as_tensor(mask, device=value.device)
    if mask.dim() == 1 and value.shape[0] == 1:
        mask = mask[None]
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"mask has dtype {mask.dtype} and entries other than 0 and 1: it is True where {name!r} is "
                         "observed")
    if mask.dim() < 2:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; for {name!r} of shape {tuple(value.shape)} it is "
                         f"{tuple(value.shape[:2])} (whole frames): the same for every sequence is mask.expand(B, T)")
    longer = mask.dim() > 1 and mask.shape[1] > full
    mask = mask if longer else mask.bool()[:, :steps]
    if mask.dim() not in (2, value.dim()) or mask.shape != value.shape[:mask.dim()]:
        single = f" or {tuple(value.shape)} (single entries)" if value.dim() > 2 else ""
        raise ValueError(f"mask has shape {tuple(mask.shape)}; for {name!r} of shape {tuple(value.shape)} it is "
                         f"{tuple(value.shape[:2])} (whole frames){single}")
    return right(mask, value).expand(value.shape)
