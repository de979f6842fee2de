"""Compiled functions with gradients: forward, then backward, as two graphs or three."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from pyro_seq.engine.compiled.compiler import Run, rounded
from pyro_seq.engine.compiled.joint import Parts, cut
from pyro_seq.engine.compiled.nest import put_together, take_apart
from pyro_seq.engine.compiled.trace import Graph, Noise, trace, unchanged_generator

__all__ = ["Differentiable", "call"]


class _Part(NamedTuple):
    """One compiled graph, and where its arguments are found: inputs, live tensors, noise, saved values, gradients of outputs,
    deltas, one after the other."""

    call: Callable[..., Any]
    taken: list[int]
    rows: int = 0

    def __call__(self, pool: list[Tensor]) -> Any:
        return self.call(*[pool[index] for index in self.taken])


class Joint(NamedTuple):
    """A function and its gradients, traced and cut."""

    graph: Graph
    parts: Parts
    plan: Any
    outputs: int
    differentiable: list[int]
    """Which of the outputs have a gradient."""
    learned: list[int]
    """Which of the live tensors have one."""
    names: list[str]
    """Of the inputs, live tensors, noise, saved values, gradients of outputs and deltas."""
    gradients: list[str]


class Differentiable:
    """A function that has been compiled with its gradients.

    :param wanted: for each of the inputs, whether its gradient is asked for.
    :param deferred: leave the gradients of parameters to :meth:`weights`.
    """

    def __init__(self, run: Run, fn: Callable[..., Any], plan: Any, inputs: list[Tensor], wanted: list[bool], deferred: bool):
        self.fn, self.input_plan, self.wanted, self.deferred = fn, plan, wanted, deferred
        self.joint = joint = _traced(run, fn, plan, inputs, wanted)
        self.rows = inputs[0].shape[0]
        self.forms = [(tuple(value.shape[1:]), value.dtype, value.device) for value in inputs]
        self.noise: list[Noise] = joint.graph.noise
        self.plan, self.outputs = joint.plan, joint.outputs
        values = {name: value for name, value in zip(joint.names, _pool(run, joint, inputs), strict=False)}
        self.forward = _compiled(run, joint, joint.parts.forward, values)
        self.saved = len(joint.parts.saved)
        with torch.no_grad():  # compiled code lays out its results as it likes
            results = self.forward.call(*[values[name] for name in _taken(joint.parts.forward)])
        values.update(zip(joint.parts.saved, results[self.outputs:], strict=True))
        values.update((name, torch.zeros(results[place].shape, dtype=results[place].dtype, device=results[place].device))
                      for name, place in zip(joint.gradients, joint.differentiable, strict=True))
        self.backward = _compiled(run, joint, joint.parts.states, values)
        self.linear = len(joint.names) - len(joint.parts.deltas) - len(joint.gradients)
        """Where, of the values by name, those begin that the parameters' gradients are linear in."""
        self.deltas = len(joint.parts.deltas)
        with torch.no_grad():
            found = self.backward.call(*[values[name] for name in _taken(joint.parts.states)])
        values.update(zip(joint.parts.deltas, found[len(found) - self.deltas:], strict=True))
        self.by_rows = self._can_defer(values)
        self.of_weights: dict[int, _Part | None] = {}
        if not deferred or not self.by_rows:
            self.of_weights[self.rows] = _compiled(run, joint, joint.parts.weights, values)._replace(rows=self.rows)

    def _can_defer(self, values: dict[str, Tensor]) -> bool:
        """Whether the values that the parameters' gradients need all have rows, by their first dimension."""
        joint = self.joint
        live = set(joint.names[len(self.wanted):len(self.wanted) + len(joint.graph.live)])
        return all(values[name].shape[:1] == (self.rows,) for name in joint.parts.for_weights if name not in live)

    def weights_of(self, run: Run, rows: int) -> _Part | None:
        """The part for the parameters' gradients, compiled for at least so many rows: for the first two sizes exactly, then
        for every eighth of a power of two. ``None`` if the function has other operations there."""
        if rows not in self.of_weights and rows != self.rows and len(self.of_weights) >= 2:
            rows = rounded(rows)
        if rows not in self.of_weights:
            inputs = [torch.zeros((rows, *shape), dtype=dtype, device=device) for shape, dtype, device in self.forms]
            joint = _traced(run, self.fn, self.input_plan, inputs, self.wanted)
            values = dict(zip(joint.names, _pool(run, joint, inputs), strict=False))
            results = joint.parts.forward(*[values[name] for name in _taken(joint.parts.forward)])
            values.update(zip(joint.parts.saved, results[self.outputs:], strict=True))
            values.update((name, torch.zeros_like(results[place])) for name, place in zip(
                joint.gradients, joint.differentiable, strict=True))
            found = joint.parts.states(*[values[name] for name in _taken(joint.parts.states)])
            values.update(zip(joint.parts.deltas, found[len(found) - self.deltas:], strict=True))
            if joint.names != self.joint.names or joint.parts.for_weights != self.joint.parts.for_weights:
                self.of_weights[rows] = None
                return None
            live = set(joint.names[len(inputs):len(inputs) + len(joint.graph.live)])
            values = {name: value if name in live else value.contiguous() for name, value in values.items()}
            self.of_weights[rows] = _compiled(run, joint, joint.parts.weights, values)._replace(rows=rows)
        return self.of_weights[rows]

    def pool(self, run: Run, inputs: list[Tensor], noise: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Run it: the outputs, and all that the backward parts may need."""
        pool = [*inputs, *[run.live[index] for index in self.joint.graph.live], *noise]
        results = self.forward(pool)
        pool.extend(results[self.outputs:])
        return results[:self.outputs], pool


def _traced(run: Run, fn: Callable[..., Any], plan: Any, inputs: list[Tensor], wanted: list[bool]) -> Joint:
    learned = [index for index, value in enumerate(run.live) if value.requires_grad]
    found: dict[str, Any] = {}

    def outputs_of(given: tuple[Tensor, ...]) -> list[Tensor]:
        tensors: list[Tensor] = []
        found["plan"] = take_apart(fn(*put_together(plan, iter(given))), tensors)
        return tensors

    with unchanged_generator(inputs), torch.enable_grad():
        probe = outputs_of(tuple(value.detach().requires_grad_(want) for value, want in zip(inputs, wanted, strict=True)))
    differentiable = [place for place, value in enumerate(probe) if value.requires_grad]
    given = [torch.zeros_like(probe[place]) for place in differentiable]
    reached: list[bool] = []

    def both(*arguments: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            values = [value.detach().requires_grad_() if want else value
                      for value, want in zip(arguments, wanted, strict=False)]
            outputs = outputs_of(tuple(values))
            targets = [value for value, want in zip(values, wanted, strict=True) if want] + [run.live[i] for i in learned]
            gradients: Any = [None] * len(targets)
            if differentiable and targets:
                gradients = torch.autograd.grad([outputs[place] for place in differentiable], targets,
                                                list(arguments[len(inputs):]), allow_unused=True)
        reached[:] = [gradient is not None for gradient in gradients]
        return [*[value.detach() for value in outputs], *[gradient for gradient in gradients if gradient is not None]]

    graph = trace(both, [*(value.detach() for value in inputs), *given], run.live)
    module = graph.module
    holders = [node for node in module.graph.nodes if node.op == "placeholder"]
    count = len(inputs)
    gradients = holders[count:count + len(given)]
    noise = holders[len(holders) - len(graph.noise):] if graph.noise else []
    live = holders[count + len(given):len(holders) - len(noise)]
    results = list(module.graph.output_node().args[0])
    after = iter(results[len(probe):])
    full = [next(after) if there else None for there in reached]
    module.graph.output_node().args = ([*results[:len(probe)], *full],)
    parts = cut(module, len(probe), sum(wanted), gradients, [*holders[:count], *noise])
    names = [node.name for node in (*holders[:count], *live, *noise)] + parts.saved + [node.name for node in gradients]
    return Joint(graph, parts, found["plan"], len(probe), differentiable, learned, names + parts.deltas,
                 [node.name for node in gradients])


def _pool(run: Run, joint: Joint, inputs: list[Tensor]) -> Iterator[Tensor]:
    yield from (value.detach() for value in inputs)
    yield from (run.live[index].detach() for index in joint.graph.live)
    with unchanged_generator(inputs):
        yield from [part.draw() for part in joint.graph.noise]


def _taken(module: fx.GraphModule) -> list[str]:
    return [node.name for node in module.graph.nodes if node.op == "placeholder"]


def _compiled(run: Run, joint: Joint, module: fx.GraphModule, values: dict[str, Tensor]) -> _Part:
    names = _taken(module)
    return _Part(run.compiler.build(module, [values[name] for name in names]), [joint.names.index(name) for name in names])


class _Called(torch.autograd.Function):
    """One call, with a gradient."""

    @staticmethod
    def forward(ctx: Any, job: Differentiable, how: tuple[Any, ...], inputs: list[Tensor], *tracked: Tensor
                ) -> tuple[Tensor, ...]:
        run, *ctx.written = how
        results, ctx.pool = job.pool(run, inputs, [part.draw() for part in job.noise])
        ctx.job, ctx.inputs = job, inputs
        ctx.save_for_backward(*tracked)
        ctx.set_materialize_grads(False)
        ctx.like = results = _apart(results, inputs)
        ctx.mark_non_differentiable(*[value for place, value in enumerate(results) if place not in job.joint.differentiable])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        job, pool = ctx.job, list(ctx.pool)
        if torch.is_grad_enabled():  # a derivative of the derivative is asked for
            return None, None, None, *_as_written(job, *ctx.written, ctx.inputs, ctx.saved_tensors, gradients)
        for place in job.joint.differentiable:
            gradient = gradients[place]
            like = ctx.like[place]
            pool.append(torch.zeros(like.shape, dtype=like.dtype, device=like.device) if gradient is None
                        else gradient.contiguous())
        found = job.backward(pool)
        split = len(found) - job.deltas
        pool.extend(found[split:])
        weights = job.of_weights[job.rows](pool)
        return None, None, None, *found[:split], *weights


def _as_written(job: Differentiable, fn: Callable[..., Any], plan: Any, wanted: list[bool], inputs: list[Tensor],
                tracked: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Gradients with a graph of their own."""
    if job.noise or job.joint.learned:
        raise RuntimeError("a compiled function that draws random numbers or reads parameters has no second derivative: leave "
                           "compile=True out")
    tracked = tuple([value.view_as(value) for value in tracked])  # one may be computed from another
    given = iter(tracked)
    inputs = [next(given) if want else value for value, want in zip(inputs, wanted, strict=True)]
    outputs: list[Tensor] = []
    take_apart(fn(*put_together(plan, iter(inputs))), outputs)
    reached = [(outputs[place], gradients[place]) for place in job.joint.differentiable if gradients[place] is not None]
    values, weights = zip(*reached, strict=True)
    return torch.autograd.grad(values, tracked, weights, create_graph=True, allow_unused=True)


def _apart(results: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    """The same values, none of them the same object as another."""
    seen, found = {id(value) for value in others}, []
    for value in results:
        found.append(value.view_as(value) if id(value) in seen else value)
        seen.add(id(found[-1]))
    return found


def call(run: Run, name: str, fn: Callable[..., Any], *arguments: Any) -> Any:
    """``fn(*arguments)``, compiled, with gradients if they are enabled; as written where it cannot be.

    Arguments and results have rows, whose number may change from call to call: they are filled up to one that is known.
    """
    inputs: list[Tensor] = []
    plan = take_apart(arguments, inputs)
    rows = inputs[0].shape[0]
    size = run.size(name, rows)
    if rows < size:
        inputs = [torch.cat([value, value[:1].expand(size - rows, *value.shape[1:])]) for value in inputs]
    learning = torch.is_grad_enabled()
    wanted = [learning and value.requires_grad for value in inputs]
    key = run.key(name, (plan, tuple(wanted)), inputs)
    job = run.look_up(name, key, lambda: (Differentiable(run, fn, plan, inputs, wanted, False) if learning else
                                          run.compiled(fn, plan, inputs)), True)
    if job is None:
        return fn(*arguments)
    if learning:
        tracked = [value for value in inputs if value.requires_grad] + [run.live[index] for index in job.joint.learned]
        results = _Called.apply(job, (run, fn, plan, wanted), [value.detach() for value in inputs], *tracked)
    else:
        results = job.call(*inputs, *[run.live[index] for index in job.live], *[part.draw() for part in job.noise])
    return put_together(job.plan, iter([value[:rows] for value in results] if rows < size else results))
