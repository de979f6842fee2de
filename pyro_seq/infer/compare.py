"""Several methods on the same data, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from tqdm import tqdm

from pyro_seq.infer.posterior import Posterior
from pyro_seq.sequences import Sequences

__all__ = ["Comparison", "compare", "require_methods"]


class Comparison(pd.DataFrame):
    """A data frame, a row a method, that keeps the posteriors it was made of."""

    _metadata = ["posteriors"]

    @property
    def _constructor(self) -> Any:
        return pd.DataFrame

    def plot_comparison(self, site: str | None = None, sequence: int = 0, axes: Any = None) -> Any:
        """The log evidence of each method, and each method's estimate of one latent site."""
        from pyro_seq.plot import plot_comparison

        return plot_comparison(self.posteriors, site=site, sequence=sequence, axes=axes)


def compare(methods: Mapping[str, Any], x: Any, lengths: Any = None, *, mask: Any = None, progress: bool = False,
            **covariates: Any) -> Comparison:
    """Run several inference objects on the same data.

    :param methods: by name, objects with a ``run``, such as :class:`~pyro_seq.KalmanFilter`,
        :class:`~pyro_seq.ParticleFilter` and :class:`~pyro_seq.Variational`; or posteriors that are already there.
    :param x: data, as accepted by :meth:`pyro_seq.Sequences.of`; so are ``lengths``, ``mask`` and the covariates.
    :returns: a data frame indexed by method: ``log_evidence`` (summed over sequences), its ``kind``, its
        ``standard_error``, ``num_samples`` and ``seconds``. Numbers of different kinds are not comparable as such: a
        bound lies below what it bounds.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class LocalLevel(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     def transition(self, z):
        ...         return pyro.sample("z", dist.Normal(z, 0.1))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> model = LocalLevel()
        >>> table = seq.compare({"kalman": seq.KalmanFilter(model), "smc": seq.ParticleFilter(model)},
        ...                     model.simulate([50])["x"])
        >>> list(table.index), list(table.kind)
        (['kalman', 'smc'], ['exact', 'log of an unbiased estimate'])
    """
    require_methods(methods)
    sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
    posteriors = {}
    for name, method in tqdm(methods.items(), disable=not progress, desc="compare"):
        if isinstance(method, Posterior) and not _same(method.sequences, sequences):
            raise ValueError(f"the posterior {name!r} is of other data: {method.sequences} instead of {sequences}")
        if not isinstance(method, Posterior) and not hasattr(method, "run"):
            raise TypeError(f"method {name!r} is a {type(method).__name__} without run(x): for a trained guide use "
                            "seq.Variational(model, guide)")
        posteriors[name] = method if isinstance(method, Posterior) else method.run(sequences)
    table = Comparison([posterior.summary() for posterior in posteriors.values()], index=list(posteriors))
    table.index.name = "method"
    table["num_samples"] = table["num_samples"].astype("Int64")
    table.posteriors = posteriors
    return table


def require_methods(methods: Any) -> None:
    """Raise unless ``methods`` is a dict of objects by name."""
    if not isinstance(methods, Mapping):
        raise TypeError(f"methods is a {type(methods).__name__}; pass a dict that names them, such as "
                        "{'kalman': KalmanFilter(model)}")
    if not methods:
        raise ValueError("no methods to compare: pass a dict such as {'kalman': KalmanFilter(model)}")
    for name, method in methods.items():
        if isinstance(method, type):
            raise TypeError(f"method {name!r} is the class {method.__name__}: make one, {method.__name__}(model)")


def _same(first: Sequences, second: Sequences) -> bool:
    return first is second or (
        first.lengths.tolist() == second.lengths.tolist() and set(first.x) == set(second.x)
        and all(first.x[k].shape == v.shape and first.x[k].dtype == v.dtype and bool(
            ((first.x[k] == v) | (v != v)).all()) for k, v in second.x.items()))
