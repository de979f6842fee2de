"""Compiled functions with gradients: forward, then backward, as two graphs or three."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from pyro_seq.engine.compiled.compiler import Run
from pyro_seq.engine.compiled.joint import Parts, cut
from pyro_seq.engine.compiled.nest import put_together, take_apart
from pyro_seq.engine.compiled.padding import filled, rounded
from pyro_seq.engine.compiled.trace import Graph, Noise, Untraceable, trace, unchanged_generator, unvalidated

__all__ = ["OWN_NOISE", "TWICE", "Differentiable", "Joint", "Weights", "call", "joint_of", "running_rows", "zeros"]


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


def joint_of(run: Run, fn: Callable[..., Any], plan: Any, inputs: list[Tensor], wanted: list[bool]) -> Joint:
    """
    :param wanted: for each of the inputs, whether its gradient is asked for.
    """
    learned = [index for index, value in enumerate(run.live) if value.requires_grad]
    found: dict[str, Any] = {}

    def outputs_of(given: tuple[Tensor, ...]) -> list[Tensor]:
        tensors: list[Tensor] = []
        found["plan"] = take_apart(fn(*put_together(plan, iter(given))), tensors)
        return tensors

    with run.leaves() as leaves:
        with unchanged_generator(inputs), unvalidated(), torch.enable_grad():
            probe = outputs_of(tuple(value.detach().requires_grad_(want) for value, want in zip(inputs, wanted, strict=True)))
        differentiable = [place for place, value in enumerate(probe) if value.requires_grad]
        given = [torch.zeros_like(probe[place]) for place in differentiable]
        reached: list[bool] = []

        def both(*arguments: Tensor) -> list[Tensor]:
            with torch.enable_grad():
                values = [value.detach().requires_grad_() if want else value
                          for value, want in zip(arguments, wanted, strict=False)]
                outputs = outputs_of(tuple(values))
                targets = [value for value, want in zip(values, wanted, strict=True) if want] + [leaves[i] for i in learned]
                gradients: Any = [None] * len(targets)
                if differentiable and targets:
                    gradients = torch.autograd.grad([outputs[place] for place in differentiable], targets,
                                                    list(arguments[len(inputs):]), allow_unused=True)
            reached[:] = [gradient is not None for gradient in gradients]
            return [*[value.detach() for value in outputs], *[gradient for gradient in gradients if gradient is not None]]

        graph = trace(both, [*(value.detach() for value in inputs), *given], leaves)
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


def _values(run: Run, joint: Joint, inputs: list[Tensor]) -> dict[str, Tensor]:
    """The values of inputs, live tensors and noise, by name."""
    with unchanged_generator(inputs):
        noise = [part.draw() for part in joint.graph.noise]
    live = [run.live[index].detach() for index in joint.graph.live]
    return dict(zip(joint.names, [*(value.detach() for value in inputs), *live, *noise], strict=False))


def _taken(module: fx.GraphModule) -> list[str]:
    return [node.name for node in module.graph.nodes if node.op == "placeholder"]


def zeros(like: Tensor) -> Tensor:
    """As many, in the order of the shape."""
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


class _Part(NamedTuple):
    """One compiled graph, and where its arguments are found: inputs, live tensors, noise, saved values, gradients of outputs,
    deltas, one after the other."""

    call: Callable[..., Any]
    taken: list[int]

    def __call__(self, pool: list[Tensor]) -> Any:
        return self.call(*[pool[index] for index in self.taken])


class Differentiable:
    """A function that has been compiled with its gradients.

    :param wanted: for each of the inputs, whether its gradient is asked for.
    """

    def __init__(self, run: Run, fn: Callable[..., Any], plan: Any, inputs: list[Tensor], wanted: list[bool]):
        self.joint = joint = joint_of(run, fn, plan, inputs, wanted)
        self.noise: list[Noise] = joint.graph.noise
        self.plan, self.outputs, self.deltas = joint.plan, joint.outputs, len(joint.parts.deltas)
        values = _values(run, joint, inputs)

        def compiled(module: fx.GraphModule) -> tuple[_Part, Any]:
            names = _taken(module)
            arguments = [values[name] for name in names]
            part = _Part(run.compiler.build(module, arguments), [joint.names.index(name) for name in names])
            with torch.no_grad():  # compiled code lays out its results as it likes
                return part, part.call(*arguments)

        self.forward, results = compiled(joint.parts.forward)
        values.update(zip(joint.parts.saved, results[self.outputs:], strict=True))
        values.update((name, zeros(results[place])) for name, place in zip(joint.gradients, joint.differentiable, strict=True))
        self.states, found = compiled(joint.parts.states)
        values.update(zip(joint.parts.deltas, found[len(found) - self.deltas:], strict=True))
        self.weights, _ = compiled(joint.parts.weights)

    def pool(self, run: Run, inputs: list[Tensor], noise: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Run it: the outputs, and all that the backward parts may need."""
        pool = [*inputs, *[run.live[index] for index in self.joint.graph.live], *noise]
        results = self.forward(pool)
        pool.extend(results[self.outputs:])
        return results[:self.outputs], pool


class Weights:
    """The gradients of parameters, from the values of all steps of a loop together.

    Compiled for the first two numbers of rows exactly, then for every eighth of a power of two.
    """

    def __init__(self, run: Run, fn: Callable[..., Any], plan: Any, inputs: list[Tensor], wanted: list[bool], joint: Joint):
        self.fn, self.plan, self.wanted, self.joint = fn, plan, wanted, joint
        self.forms = [(tuple(value.shape[1:]), value.dtype, value.device) for value in inputs]
        self.rows = inputs[0].shape[0]
        self.live = dict(zip(joint.names[len(inputs):], range(len(joint.graph.live)), strict=False))
        self.linear = {*joint.gradients, *joint.parts.deltas}
        """Names of what the result is linear in."""
        self.known: dict[int, Callable[..., Any] | None] = {}

    def __call__(self, run: Run, values: Mapping[str, Sequence[Tensor] | Tensor], counts: list[int]) -> list[Tensor | None]:
        """:param values: by name, of each step ``(rows, ...)``."""
        names = self.joint.parts.for_weights
        live = {name: run.live[self.joint.graph.live[index]].detach() for name, index in self.live.items()}
        total = sum(counts)
        size = total if total in self.known or len(self.known) < 2 else rounded(total)
        call = self._at(run, size)
        if call is None:  # other operations at so many rows: step by step
            call, sums = self._at(run, self.rows), None
            for place in range(len(counts)):
                part = call(*[live[name] if name in live else values[name][place].contiguous() for name in names])
                sums = list(part) if sums is None else [a if b is None else a + b for a, b in zip(sums, part, strict=True)]
            return sums
        given = []
        for name in names:
            if name in live:
                given.append(live[name])
                continue
            value = running_rows(values[name], counts, self.rows)
            if total < size and name in self.linear:
                value = torch.cat([value, value.new_zeros(size - total, *value.shape[1:])])
            value = filled(value, size)
            given.append(value.contiguous())
        return list(call(*given))

    def _at(self, run: Run, rows: int) -> Callable[..., Any] | None:
        if rows not in self.known:
            if rows != self.rows and not run.unchanged():
                return None  # traced now, it would read other values than the run did
            inputs = [torch.zeros((rows, *shape), dtype=dtype, device=device) for shape, dtype, device in self.forms]
            joint = self.joint if rows == self.rows else joint_of(run, self.fn, self.plan, inputs, self.wanted)
            same = joint.names == self.joint.names and joint.parts.for_weights == self.joint.parts.for_weights
            values = _values(run, joint, inputs)
            with torch.no_grad(), unchanged_generator(inputs):
                results = joint.parts.forward(*[values[name] for name in _taken(joint.parts.forward)])
                values.update(zip(joint.parts.saved, results[joint.outputs:], strict=True))
                values.update((name, zeros(results[place])) for name, place in zip(
                    joint.gradients, joint.differentiable, strict=True))
                found = joint.parts.states(*[values[name] for name in _taken(joint.parts.states)])
            values.update(zip(joint.parts.deltas, found[len(found) - len(joint.parts.deltas):], strict=True))
            examples = [values[name] if name in self.live else values[name].contiguous()
                        for name in _taken(joint.parts.weights)]
            by_rows = all(value.shape[:1] == (rows,) for name, value in values.items()
                          if name in joint.parts.for_weights and name not in self.live)
            usable = rows == self.rows or same and by_rows
            self.known[rows] = run.compiler.build(joint.parts.weights, examples) if usable else None
        return self.known[rows]


def running_rows(value: Sequence[Tensor] | Tensor, counts: list[int], rows: int) -> Tensor:
    """Of steps ``(rows, ...)`` each, the running rows of one after the other."""
    if min(counts) == rows:
        return value[:len(counts)].flatten(0, 1) if isinstance(value, Tensor) else torch.cat(value[:len(counts)])
    return torch.cat([value[place][:count] for place, count in enumerate(counts)])


OWN_NOISE = "own noise"
"""What a model is declined for that draws beside its sites."""
TWICE = "compiled steps go backward once: for backward(retain_graph=True), leave compile=True out"


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
        results = _apart(results, [*inputs, *ctx.pool])
        # The results themselves would keep this node, and it them, alive.
        ctx.forms = {place: (results[place].shape, results[place].dtype, results[place].device)
                     for place in job.joint.differentiable}
        ctx.mark_non_differentiable(*[value for place, value in enumerate(results) if place not in job.joint.differentiable])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # a derivative of the derivative is asked for
            return None, None, None, *_as_written(ctx.job, *ctx.written, ctx.inputs, ctx.saved_tensors, gradients)
        job, pool, ctx.pool = ctx.job, ctx.pool, None
        if pool is None:
            raise RuntimeError(TWICE)
        for place in job.joint.differentiable:
            gradient = gradients[place]
            if gradient is None:
                shape, dtype, device = ctx.forms[place]
                gradient = torch.zeros(shape, dtype=dtype, device=device)
            pool.append(gradient.contiguous())
        found = job.states(pool)
        split = len(found) - job.deltas
        pool.extend(found[split:])
        return None, None, None, *found[:split], *job.weights(pool)


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


def call(run: Run, name: str, fn: Callable[..., Any], *arguments: Any, fill: bool = False) -> Any:
    """``fn(*arguments)``, compiled, with gradients if they are enabled; as written where it cannot be.

    :param fill: arguments and results have rows, whose number changes from call to call, and nothing is drawn: they are filled
        up to a number that is known.
    """
    inputs: list[Tensor] = []
    plan = take_apart(arguments, inputs)
    rows = inputs[0].shape[0]
    size = run.size(name, rows) if fill else rows
    if rows < size:
        inputs = [filled(value, size) for value in inputs]
    learning = torch.is_grad_enabled()
    wanted = [learning and value.requires_grad for value in inputs]
    key = run.key(name, (plan, tuple(wanted)), inputs)

    def make() -> Any:
        made = Differentiable(run, fn, plan, inputs, wanted) if learning else run.compiled(fn, plan, inputs)
        if fill and (made.noise or (made.joint.graph.random if learning else made.drawn_inside)):
            run.decline(OWN_NOISE)
            raise Untraceable("it draws random numbers of its own, which a site of pyro.sample would make its latents")
        return made

    job = run.look_up(name, key, make, True)
    if job is None:
        return fn(*arguments)
    if learning:
        tracked = [value for value in inputs if value.requires_grad] + [run.live[index] for index in job.joint.learned]
        results = _Called.apply(job, (run, fn, plan, wanted), [value.detach() for value in inputs], *tracked)
    else:
        results = job.call(*inputs, *[run.live[index] for index in job.live], *[part.draw() for part in job.noise])
    return put_together(job.plan, iter([value[:rows] for value in results] if rows < size else results))
