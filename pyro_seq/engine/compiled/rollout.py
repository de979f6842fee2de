"""The loop over time, compiled, and its way back.

Forward, several steps are one graph, run without gradients. Backward, another one takes the gradient from each step to the one
before, and what the parameters' gradients need is left where it lies: they are products over the rows of all steps, done once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_seq.engine.compiled import chain
from pyro_seq.engine.compiled.compiler import Run
from pyro_seq.engine.compiled.gradients import TWICE, Joint, Weights, joint_of, running_rows, zeros
from pyro_seq.engine.compiled.nest import put_together, take_apart

__all__ = ["Rollout", "Select", "roll"]

_NODES, _MOST = 200, 8
"""Of a graph of several steps: about how many operators, and the most steps."""

Select = Callable[[int, Any], Tensor | None]
"""Given the place of a step and what the step before found (``None`` at the first): the rows of the state ``(rows,)`` that it
starts from; ``None``, each from itself."""


class Rollout(NamedTuple):
    """Rows of all steps, one step after the other, those of the running sequences only."""

    before: Any
    """The state that each step started from."""
    found: Any
    """What the steps gave beside their states."""
    state: Any
    """After the last step, all rows."""


class _Steps:
    """A step, compiled for several of them at a time.

    :param wanted: for the leaves of the state and the other arguments, whether their gradients are asked for.
    """

    def __init__(self, run: Run, fn: Callable[..., Any], plan: Any, inputs: list[Tensor], width: int, wanted: list[bool],
                 one_by_one: bool):
        self.width, self.wanted = width, wanted
        self.rows, self.learning = inputs[0].shape[0], any(wanted)
        if self.learning:
            self.joint: Joint | None = joint_of(run, fn, plan, inputs, wanted)
            graph, module, self.plan = self.joint.graph, self.joint.parts.forward, self.joint.plan
            self.found = self.joint.outputs - width
        else:
            self.joint = None
            graph, self.plan = run.traced(fn, plan, [value.detach() for value in inputs])
            module = graph.module
            self.found = len(module.graph.output_node().args[0]) - width
        self.noise, self.live, self.random = graph.noise, graph.live, graph.random
        # Steps beyond the end would draw what comes after it.
        self.steps = 1 if one_by_one or graph.random else max(1, min(_MOST, _NODES // len(module.graph.nodes)))
        live = [run.live[index].detach() for index in self.live]
        stacks = [value[None].expand(self.steps, *value.shape).contiguous() for value in inputs[width:]]
        noise = [torch.zeros((self.steps, *part.shape), dtype=part.dtype, device=part.device) for part in self.noise]
        built = chain.forward(module, self.steps, width, len(stacks), len(live))
        state = [value.detach() for value in inputs[:width]]
        self.forward = run.compiler.build(built, [*state, *stacks, *live, *noise])
        if self.joint is not None:
            with torch.no_grad():
                results = self.forward(*state, *stacks, *live, *noise)
            self._build_backward(run, results, stacks, live, noise)
            self.weights = Weights(run, fn, plan, inputs, wanted, self.joint)

    def _build_backward(self, run: Run, results: list[Tensor], stacks: list[Tensor], live: list[Tensor], noise: list[Tensor]
                        ) -> None:
        joint, width = self.joint, self.width
        self.floating = [place for place in range(width) if self.wanted[place]]
        gradients = dict(zip(joint.differentiable, joint.gradients, strict=True))
        self.of_found = [place for place in joint.differentiable if place >= width]
        self.kept = [leaf for leaf, place in enumerate(self.floating) if gradients.get(place) in joint.parts.for_weights]
        built = chain.backward(
            joint.parts.states, self.steps, joint.names[len(self.wanted):len(self.wanted) + len(self.live)],
            [gradients.get(place) for place in self.floating], [gradients[place] for place in self.of_found],
            len(joint.parts.deltas), self.kept)
        self.reached = built.reached
        places = {name: index for index, name in enumerate(joint.names)}
        self.needed_live = [places[name] - len(self.wanted) for name in built.live]
        # Stacked values in the order of names: states before, inputs, (live), noise, saved.
        self.needed = [places[name] - (len(live) if places[name] >= len(self.wanted) else 0) for name in built.values]
        values = self.stacked(results, stacks, noise)
        before, found = results[width:2 * width], results[2 * width:2 * width + self.found]
        examples = [
            *[torch.zeros_like(results[place]).contiguous() for place in self.floating],
            torch.ones(self.steps, self.rows, dtype=torch.bool, device=results[0].device),
            *[live[index] for index in self.needed_live], *[values[index].contiguous() for index in self.needed],
            *[zeros(found[place - width]) for place in self.of_found], *[zeros(before[place]) for place in self.floating]]
        self.backward = run.compiler.build(built.module, examples)

    def stacked(self, results: list[Tensor], stacks: list[Tensor], noise: list[Tensor]) -> list[Tensor]:
        """States before, inputs, noise and saved values of some steps."""
        return [*results[self.width:2 * self.width], *stacks, *noise, *results[2 * self.width + self.found:]]

    def by_name(self, values: list[Tensor], by_found: list[Tensor], last: list[Tensor]) -> dict[str, Tensor]:
        """Stacked values by name: those of :meth:`stacked`, gradients by what was found, deltas, gradients by states after."""
        joint, first = self.joint, len(self.wanted)
        gradients = dict(zip(joint.differentiable, joint.gradients, strict=True))
        names = [*joint.names[:first], *joint.names[first + len(self.live):first + len(self.live) + len(values) - first],
                 *(gradients[place] for place in self.of_found), *joint.parts.deltas,
                 *(gradients[self.floating[leaf]] for leaf in self.kept)]
        return dict(zip(names, [*values, *by_found, *last], strict=True))

    def draw(self, counts: list[int]) -> list[list[Tensor]]:
        """The noise of all steps, stacked for each call, drawn in the order in which the steps draw it."""
        calls = []
        for start in range(0, len(counts), self.steps):
            part = counts[start:start + self.steps]
            whole = len(part) == self.steps and min(part) == self.rows
            made = torch.empty if whole else torch.zeros
            stacks = [made((self.steps, *noise.shape), dtype=noise.dtype, device=noise.device) for noise in self.noise]
            calls.append(stacks)
            for place, count in enumerate(part):
                for noise, stack in zip(self.noise, stacks, strict=True):
                    noise.fill(stack[place] if count == self.rows else stack[place, :count])
        return calls


class _Job(NamedTuple):
    steps: _Steps
    run: Run
    inputs: list[Tensor]
    """What the steps read beside the state, ``(T, rows, ...)``."""
    counts: list[int]
    """Rows that run, by step."""
    select: Callable[[int, list[Tensor] | None], Tensor | None] | None


def roll(run: Run, name: str, fn: Callable[..., Any], state: Any, inputs: Any, counts: list[int], select: Select | None = None
         ) -> Rollout | None:
    """``state, found = fn(state, *arguments)`` for one step after the other.

    :param state: of as many rows as the first step has.
    :param inputs: a tuple of the steps' arguments, their tensors ``(T, rows, ...)``: those of sequences that have ended are run
        on, and not looked at.
    :param counts: how many rows run at each step.
    :param select: between the steps.
    :returns: ``None`` where the step cannot be compiled.
    """
    start: list[Tensor] = []
    state_plan, width = take_apart(state, start), len(start)
    start = [value.contiguous() for value in start]  # as those of later steps are
    given: list[Tensor] = []
    plan = (tuple, (state_plan, *take_apart(inputs, given)[1]))
    given = [value.contiguous() for value in given]
    learning, rows = torch.is_grad_enabled(), counts[0]
    wanted = [learning and value.is_floating_point() for value in start] + [learning and v.requires_grad for v in given]
    examples = [*start, *[value[0] for value in given]]
    key = run.key(name, (plan, tuple(wanted), select is None), examples)
    steps = run.look_up(name, key, lambda: _Steps(run, fn, plan, examples, width, wanted, select is not None), True)
    if steps is None or min(counts) < rows and (steps.random or any(
            part.shape[:1] != (rows,) or rows in part.shape[1:] for part in steps.noise)):
        return None

    def chosen(place: int, results: list[Tensor] | None) -> Tensor | None:
        return select(place, None if results is None else put_together(steps.plan, iter(results))[1])

    job = _Job(steps, run, [value.detach() for value in given], counts, None if select is None else chosen)
    if steps.learning:
        tracked = [value for value, want in zip([*start, *given], wanted, strict=True) if want]
        tracked += [run.live[index] for index in steps.joint.learned]
        results = list(_Rolled.apply(job, [value.detach() for value in start], *tracked))
    else:
        results = _walk(job, start)[0]
    after, found = put_together(steps.plan, iter(results[width:]))
    return Rollout(put_together(state_plan, iter(results[:width])), found, after)


class _Walked(NamedTuple):
    """What the way back needs."""

    values: list[Tensor]
    """Stacked values of all steps, ``(T, rows, ...)``; of a last call that goes beyond the end, more of them."""
    selected: list[Tensor | None]
    found: list[Tensor]


def _walk(job: _Job, state: list[Tensor]) -> tuple[list[Tensor], _Walked]:
    """The results: running rows of the states before, the state after, running rows of what was found."""
    steps, counts, size = job.steps, job.counts, job.steps.steps
    width, total = steps.width, len(counts)
    live = [job.run.live[index] for index in steps.live]
    noise = None if job.select else steps.draw(counts)
    calls, noises, selected = [], [], []
    for call, start in enumerate(range(0, total, size)):
        if job.select is not None:
            last = calls[-1] if calls else None
            chosen = job.select(start, None if last is None else [
                *last[:width], *[value[0] for value in last[2 * width:2 * width + steps.found]]])
            selected.append(chosen)
            if chosen is not None:
                state = [value.index_select(0, chosen) for value in state]
        drawn = steps.draw(counts[start:start + 1])[0] if noise is None else noise[call]
        results = steps.forward(*state, *[_part(value, start, size) for value in job.inputs], *live, *drawn)
        calls.append(results)
        noises.append(drawn)
        state = [value.contiguous() for value in results[:width]]
    joined = _all_joined(list(zip(*calls, strict=True))[width:])
    last = state if total % size == 0 else [value[total] for value in joined[:width]]
    flat = [running_rows(value, counts, steps.rows) for value in joined[:width + steps.found]]
    walked = _Walked([], selected, joined[width:width + steps.found])
    if steps.learning:
        inputs = [value if total % size == 0 else _joined([_part(value, start, size) for start in range(0, total, size)])
                  for value in job.inputs]
        walked = walked._replace(values=[*joined[:width], *inputs, *map(_joined, zip(*noises, strict=True)),
                                         *joined[width + steps.found:]])
    return [*flat[:width], *last, *flat[width:]], walked


def _part(value: Tensor, start: int, size: int) -> Tensor:
    """Some steps; beyond the end, the last one again."""
    part = value[start:start + size]
    return part if part.shape[0] == size else torch.cat([part, part[-1:].expand(size - part.shape[0], *part.shape[1:])])


def _all_joined(stacks: list[Any]) -> list[Tensor]:
    """What several calls gave, joined; what is the same is joined once."""
    known: dict[int, Tensor] = {}
    for parts in stacks:
        if id(parts[0]) not in known:
            known[id(parts[0])] = _joined(parts)
    return [known[id(parts[0])] for parts in stacks]


def _joined(parts: Any) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def _by_step(value: Tensor, counts: list[int], shape: torch.Size) -> Tensor:
    """The reverse, with zeros for the rest."""
    if value.numel() == shape.numel():
        return value.reshape(shape)
    out = value.new_zeros(shape)
    if min(counts) == shape[1]:
        out[:len(counts)] = value.reshape(len(counts), *shape[1:])
    else:
        for place, part in enumerate(value.split(counts)):
            out[place, :counts[place]] = part
    return out


class _Rolled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Job, start: list[Tensor], *tracked: Tensor) -> tuple[Tensor, ...]:
        results, ctx.walked = _walk(job, start)
        ctx.job = job
        ctx.set_materialize_grads(False)
        steps, width = job.steps, job.steps.width
        fixed = [results[place] for place in range(width) if not steps.wanted[place]] + results[width:2 * width]
        fixed += [value for place, value in enumerate(results[2 * width:], start=width) if place not in steps.of_found]
        ctx.mark_non_differentiable(*fixed)
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        job, steps, walked, width = ctx.job, ctx.job.steps, ctx.walked, ctx.job.steps.width
        ctx.walked = None
        if walked is None:
            raise RuntimeError(TWICE)
        counts, size, rows = job.counts, steps.steps, steps.rows
        total = -(-len(counts) // size) * size
        live = [job.run.live[index] for index in steps.live]

        def stacked(gradient: Tensor | None, like: Tensor) -> Tensor:
            shape = torch.Size((total, *like.shape[1:]))
            return like.new_zeros(shape) if gradient is None else _by_step(gradient.contiguous(), counts, shape)

        by_found = [stacked(gradients[width + place], walked.found[place - width]) for place in steps.of_found]
        direct = [stacked(gradients[place], walked.values[place]) for place in steps.floating]
        running = torch.arange(rows, device=walked.values[0].device) < torch.tensor(
            [*counts, *[0] * (total - len(counts))], device=walked.values[0].device)[:, None]
        adjoint = [torch.zeros_like(part[0]) for part in direct]
        needed = [walked.values[index] for index in steps.needed]
        shared = [live[index] for index in steps.needed_live]
        calls: list[list[Tensor]] = []
        for start in reversed(range(0, total, size)):
            part = slice(start, start + size)
            found = steps.backward(*adjoint, running[part], *shared, *[value[part] for value in needed],
                                   *[value[part] for value in by_found], *[value[part] for value in direct])
            adjoint = [value.contiguous() for value in found[:len(adjoint)]]
            if walked.selected and walked.selected[start] is not None:
                adjoint = [torch.zeros_like(value).index_add_(0, walked.selected[start], value) for value in adjoint]
            calls.append(found[len(adjoint):])
        joined = _all_joined(list(zip(*reversed(calls), strict=True)))
        others = iter(joined)
        inputs = [next(others)[:len(counts)] if reached else None for reached in steps.reached]
        weights = steps.weights(job.run, steps.by_name(walked.values, by_found, list(others)), counts)
        return None, None, *adjoint, *inputs, *weights
