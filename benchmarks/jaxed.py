"""The same computations by hand in JAX, jitted: one training step of three models, and a bootstrap particle filter.

What a training step need not do within its scan over time is done outside, for all times at once: the encodings of the data
and all scores. Weights are those of the torch modules, and noise that of torch's generator, so that :func:`check` can hold loss
and gradients against ours. Everything is float32. Where JAX is not installed, :func:`training_step` and
:func:`particle_filter` return ``None``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

import pyro_seq as seq
from benchmarks import elbo, filters
from pyro_seq.models import SRNN, VRNN

__all__ = ["check", "particle_filter", "training_step"]

Trained = Callable[[], tuple[float, dict[str, Any]]]
"""A training step: the loss, and its gradients by parameter, matrices as ``(inputs, outputs)``."""


def training_step(model: Any, guide: seq.FilteringGuide, x: torch.Tensor) -> Trained | None:
    """Loss and gradients of a model's bound (one sample, no analytic KL), compiled when it is first called.

    The noise is drawn by torch's generator, the same numbers as ours draws one step at a time, and faster than by JAX's own.

    :param model: a :class:`benchmarks.elbo.DeepMarkov`, ``VRNN`` or ``SRNN``, whose weights now are the step's.
    :param guide: not residual; with a GRU over the data or without.
    :param x: ``(B, T, notes)`` of zeros and ones.
    """
    try:
        import jax
    except ImportError:
        return None
    bound = {elbo.DeepMarkov: _deep_markov, VRNN: _vrnn, SRNN: _srnn}[type(model)]
    units = _Units(*(_affine(module) for module in (guide.frame_units, guide.state_units, guide.parameter_units["z"])))
    weights = {name: jax.numpy.asarray(_turned(name, value.detach())) for name, value in _parameters(model, guide).items()}
    by_time = x.transpose(0, 1).contiguous()
    data, shape = jax.numpy.asarray(by_time.numpy()), (*by_time.shape[:2], len(guide.parameter_units["z"].center) // 2)
    step = jax.jit(jax.value_and_grad(lambda w, x, noise: bound(w, x, noise, units)))

    def run() -> tuple[float, dict[str, Any]]:
        loss, gradients = jax.block_until_ready(step(weights, data, torch.empty(shape).normal_().numpy()))
        return float(loss), gradients

    return run


def check(step: Trained, loss: seq.SequentialELBO, model: Any, guide: seq.FilteringGuide, x: torch.Tensor) -> None:
    """Hold a training step against ours, from the same noise.

    :raises ValueError: if the losses differ by more than 1e-4 of theirs, or a gradient by more than 1e-3 of its norm.
    """
    parameters = _parameters(model, guide)
    for parameter in parameters.values():
        parameter.grad = None
    torch.manual_seed(0)
    ours = loss.loss_and_grads(model, guide, seq.Sequences.of(x))
    torch.manual_seed(0)
    theirs, gradients = step()
    name = type(model).__name__
    if not abs(theirs - ours) < 1e-4 * abs(ours):
        raise ValueError(f"{name}: the loss is {ours} in torch and {theirs} in JAX")
    for key, parameter in parameters.items():
        found = np.zeros_like(gradients[key]) if parameter.grad is None else _turned(key, parameter.grad)
        difference, norm = np.linalg.norm(found - gradients[key]), np.linalg.norm(found)
        if not difference <= 1e-3 * norm + 1e-5:
            raise ValueError(f"{name}: the gradients of {key} differ by {difference}, of {norm} in torch")


class _Units(NamedTuple):
    """The affine maps of the guide, each as ``(shift, scale, center, spread)``; ``None`` for the identity."""

    frame: tuple | None
    state: tuple | None
    parameters: tuple | None


def _affine(module: Any) -> tuple | None:
    return None if module.unit else tuple(v.numpy() for v in (module.shift, module.scale, module.center, module.spread))


def _parameters(model: Any, guide: Any) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": value for prefix, module in (("model", model), ("guide", guide))
            for name, value in module.named_parameters()}


def _turned(name: str, value: torch.Tensor) -> np.ndarray:
    """Matrices as ``(inputs, outputs)``."""
    return np.ascontiguousarray(value.numpy().T if "weight" in name else value.numpy())


def _in(units: tuple | None, value: Any) -> Any:
    return value if units is None else units[0] + value * units[1]


def _out(units: tuple | None, value: Any) -> Any:
    return value if units is None else units[2] + value * units[3]


def _linear(w: dict[str, Any], name: str, value: Any) -> Any:
    return value @ w[f"{name}.weight"] + w[f"{name}.bias"]


def _mlp(w: dict[str, Any], name: str, value: Any, layers: int = 1) -> Any:
    from jax.nn import relu

    for layer in range(layers):
        value = relu(_linear(w, f"{name}.{2 * layer}", value))
    return _linear(w, f"{name}.{2 * layers}", value)


def _scan(step: Callable, carry: Any, inputs: Any) -> Any:
    """The outputs of a scan over time. Four steps a turn were fastest of 1, 4 and 10; gathering the gradients of the weights in
    one product over all times, instead of one a step, gained nothing."""
    import jax

    return jax.lax.scan(step, carry, inputs, unroll=4)[1]


def _gru(w: dict[str, Any], name: str, x: Any, suffix: str = "_l0") -> Any:
    """``(T, B, hidden)`` from ``(T, B, inputs)``."""
    import jax.numpy as jnp

    gates = x @ w[f"{name}.weight_ih{suffix}"] + w[f"{name}.bias_ih{suffix}"]

    def step(h: Any, gates: Any) -> tuple[Any, Any]:
        h = _gru_cell(gates, h @ w[f"{name}.weight_hh{suffix}"] + w[f"{name}.bias_hh{suffix}"], h)
        return h, h

    start = jnp.zeros((x.shape[1], gates.shape[2] // 3), "float32")
    return _scan(step, start, gates)


def _gru_cell(from_input: Any, from_state: Any, h: Any) -> Any:
    import jax.numpy as jnp
    from jax.nn import sigmoid

    r, u, n = jnp.split(from_input, 3, -1)
    r_h, u_h, n_h = jnp.split(from_state, 3, -1)
    u = sigmoid(u + u_h)
    return (1 - u) * jnp.tanh(n + sigmoid(r + r_h) * n_h) + u * h


def _encoded(w: dict[str, Any], x: Any, units: _Units) -> Any:
    """What the data adds to the guide's head, at all times."""
    import jax.numpy as jnp

    frames = jnp.concatenate([_in(units.frame, x), jnp.ones((*x.shape[:2], 1), "float32")], -1)
    if "guide.rnn.weight_hh_l0" in w:
        frames = jnp.concatenate([frames, _gru(w, "guide.rnn", frames)], -1)
    return _linear(w, "guide.heads.site_z.known", frames)


def _draw(w: dict[str, Any], prepared: Any, noise: Any, units: _Units) -> tuple[Any, Any]:
    """A latent and the logarithm of its scale, of the head's first layer."""
    import jax.numpy as jnp
    from jax.nn import elu

    hidden, direct = jnp.split(prepared, [prepared.shape[-1] - 2 * noise.shape[-1]], -1)
    loc, log_scale = jnp.split(_out(units.parameters, direct + elu(hidden) @ w["guide.heads.site_z.output"]), 2, -1)
    return loc + jnp.exp(log_scale) * noise, log_scale


def _moments(w: dict[str, Any], name: str, value: Any) -> tuple[Any, Any]:
    """Of a hidden layer and a ``NormalHead``."""
    import jax.numpy as jnp
    from jax.nn import relu, softplus

    loc, spread = jnp.split(_linear(w, f"{name}.2.linear", relu(_linear(w, f"{name}.0", value))), 2, -1)
    return loc, softplus(spread)


def _loss(z: Any, noise: Any, log_scale: Any, prior: tuple[Any, Any], logits: Any, x: Any) -> Any:
    import jax.numpy as jnp
    from jax.nn import softplus

    loc, scale = prior
    log_p = -0.5 * ((z - loc) / scale) ** 2 - jnp.log(scale)
    log_q = -0.5 * noise ** 2 - log_scale
    return (log_q - log_p).sum() + (softplus(logits) - x * logits).sum()


def _deep_markov(w: dict[str, Any], x: Any, noise: Any, units: _Units) -> Any:
    import jax.numpy as jnp
    from jax.nn import relu, sigmoid, softplus

    def step(features: Any, now: tuple) -> tuple[Any, Any]:
        prepared, noise = now
        z, log_scale = _draw(w, prepared + features @ w["guide.heads.site_z.added_state"], noise, units)
        return _in(units.state, z), (z, log_scale)

    z, log_scale = _scan(step, jnp.zeros_like(noise[0]), (_encoded(w, x, units), noise))
    before = z[:-1]
    gate, proposed = sigmoid(_mlp(w, "model.gated.gate", before)), _mlp(w, "model.gated.proposed", before)
    loc = (1 - gate) * _linear(w, "model.gated.linear", before) + gate * proposed
    scale = softplus(_linear(w, "model.gated.spread", relu(proposed))) + 1e-3
    first = jnp.broadcast_to(w["model.loc"], z[:1].shape), jnp.broadcast_to(jnp.exp(w["model.log_scale"]), z[:1].shape)
    prior = tuple(jnp.concatenate(parts) for parts in zip(first, (loc, scale), strict=True))
    return _loss(z, noise, log_scale, prior, _mlp(w, "model.decoder", z, layers=2), x)


def _vrnn(w: dict[str, Any], x: Any, noise: Any, units: _Units) -> Any:
    import jax.numpy as jnp
    from jax.nn import relu

    features = relu(_linear(w, "model.embed_x.0", x))
    hidden = features.shape[-1]
    gates = features @ w["model.gru.weight_ih"][:hidden] + w["model.gru.bias_ih"]

    def step(h: Any, now: tuple) -> tuple[Any, Any]:
        prepared, gates, noise = now
        z, log_scale = _draw(w, prepared + _in(units.state, h) @ w["guide.heads.site_z.added_state"], noise, units)
        embedded = relu(_linear(w, "model.embed_z.0", z))
        gates = gates + embedded @ w["model.gru.weight_ih"][hidden:]
        after = _gru_cell(gates, h @ w["model.gru.weight_hh"] + w["model.gru.bias_hh"], h)
        return after, (h, z, log_scale, embedded)

    start = jnp.broadcast_to(w["model.h_0"], (x.shape[1], hidden))
    h, z, log_scale, embedded = _scan(step, start, (_encoded(w, x, units), gates, noise))
    logits = _mlp(w, "model.emit.network", jnp.concatenate([embedded, h], -1))
    return _loss(z, noise, log_scale, _moments(w, "model.prior", h), logits, x)


def _srnn(w: dict[str, Any], x: Any, noise: Any, units: _Units) -> Any:
    import jax.numpy as jnp

    d = _gru(w, "model.gru", jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]]))
    hidden = d.shape[-1]
    of_d, of_z = (None, None) if units.state is None else (
        tuple(v[:hidden] for v in units.state), tuple(v[hidden:] for v in units.state))
    added = w["guide.heads.site_z.added_state"]
    prepared = _encoded(w, x, units) + _in(of_d, d) @ added[:hidden]

    def step(before: Any, now: tuple) -> tuple[Any, Any]:
        prepared, noise = now
        z, log_scale = _draw(w, prepared + _in(of_z, before) @ added[hidden:], noise, units)
        return z, (before, z, log_scale)

    before, z, log_scale = _scan(step, jnp.zeros_like(noise[0]), (prepared, noise))
    prior = _moments(w, "model.prior", jnp.concatenate([before, d], -1))
    return _loss(z, noise, log_scale, prior, _mlp(w, "model.emit.network", jnp.concatenate([z, d], -1)), x)


def particle_filter(num_particles: int, data: np.ndarray) -> Callable[[], tuple[Any, Any, Any]] | None:
    """The bootstrap filter of ``benchmarks/filters.py``: log evidence, and the filtering mean and variance of every step.

    :param data: ``(T,)``.
    :returns: a compiled run, with random numbers of its own.
    """
    try:
        import jax
    except ImportError:
        return None
    import jax.numpy as jnp

    def weigh(z: Any, log_weight: Any, mass: Any, x: Any) -> tuple[Any, Any]:
        """The weights after a frame, the largest at zero; and what is kept of the step."""
        log_weight = log_weight - 0.5 * (x * x * jnp.exp(-z) + z + math.log(2 * math.pi))
        largest = log_weight.max()
        log_weight = log_weight - largest
        weight = jnp.exp(log_weight)
        total = weight.sum()
        mean = (weight * z).sum() / total
        variance = (weight * (z - mean) ** 2).sum() / total
        size = total ** 2 / (weight * weight).sum()
        return (z, log_weight, weight, total, size), (largest + jnp.log(total / mass), mean, variance)

    def systematic(weight: Any, uniform: Any) -> Any:
        """Where each particle's slots end, counted and summed up; to search for the slots took 25 times as long."""
        edges = weight.cumsum()
        ends = jnp.ceil(edges * (num_particles / edges[-1]) - uniform).astype("int32").at[-1].set(num_particles)
        ended = jnp.zeros(num_particles + 1, "int32").at[ends].add(1, indices_are_sorted=True)
        return ended.cumsum()[:-1]

    def step(carry: Any, now: tuple) -> tuple[Any, Any]:
        x, key = now
        z, log_weight, weight, total, size = carry
        first, second = jax.random.split(key)
        count = jnp.float32(num_particles)
        z, log_weight, mass = jax.lax.cond(
            size < count / 2,
            lambda: (z[systematic(weight, jax.random.uniform(first, (), "float32"))], jnp.zeros_like(z), count),
            lambda: (z, log_weight, total))
        noise = jax.random.normal(second, z.shape, "float32")
        return weigh(filters.MU + filters.RHO * (z - filters.MU) + filters.SIGMA * noise, log_weight, mass, x)

    @jax.jit
    def run(key: Any, x: Any) -> tuple[Any, Any, Any]:
        keys = jax.random.split(key, len(x))
        noise = jax.random.normal(keys[0], (num_particles,), "float32")
        z = filters.MU + filters.SIGMA / math.sqrt(1 - filters.RHO ** 2) * noise
        carry, first = weigh(z, jnp.zeros_like(z), jnp.float32(num_particles), x[0])
        rest = jax.lax.scan(step, carry, (x[1:], keys[1:]))[1]
        evidence, mean, variance = (jnp.concatenate([a[None], b]) for a, b in zip(first, rest, strict=True))
        return evidence.sum(), mean, variance

    x, keys = jnp.asarray(data, "float32"), iter(jax.random.split(jax.random.key(0), 100_000))
    return lambda: jax.block_until_ready(run(next(keys), x))
