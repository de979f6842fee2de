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
            self.outputs = self.joint.outputs
        else:
            self.joint = None
            graph, self.plan = run.traced(fn, plan, [value.detach() for value in inputs])
            module = graph.module
            self.outputs = len(module.graph.output_node().args[0])
        self.noise, self.live, self.random = graph.noise, graph.live, graph.random
        self.results = len(module.graph.output_node().args[0])
        """Of each step: what it gives, the state after it first, and what the way back needs."""
        # Steps beyond the end would draw what comes after it.
        self.steps = 1 if one_by_one or graph.random else max(1, min(_MOST, _NODES // len(module.graph.nodes)))
        state, given = [value.detach() for value in inputs[:width]], [value.detach() for value in inputs[width:]]
        live = [run.live[index].detach() for index in self.live]
        noise = [torch.zeros(part.shape, dtype=part.dtype, device=part.device) for part in self.noise]
        built, turned = chain.forward(module, self.steps, width, len(given), len(live))
        holders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self.turned = [[node.name for node in holders].index(name) - len(inputs) for name in turned]
        """Which of the live tensors the way forward takes turned over, too."""
        own = [*holders[width:len(inputs)], *holders[len(inputs) + len(live):]]
        self.read = {place for place, node in enumerate(own) if node.users}
        """Which of inputs and noise are looked at, step by step."""
        examples = [*state, *live, *_turned(live, self.turned), *[*given, *noise] * self.steps]
        self.forward = run.compiler.build(built, examples)
        if self.joint is not None:
            with torch.no_grad():
                results = self.by_step(self.forward(*examples))
            states = [state, *[step[:width] for step in results]]
            self._build_backward(run, live, [[*before, *given, *noise, *step[self.outputs:]]
                                             for before, step in zip(states, results, strict=False)], results[0])
            self.weights = Weights(run, fn, plan, inputs, wanted, self.joint)

    def _build_backward(self, run: Run, live: list[Tensor], values: list[list[Tensor]], found: list[Tensor]) -> None:
        """:param values: of each step, by :attr:`names`."""
        joint, width = self.joint, self.width
        inputs = len(self.wanted)
        self.names = [*joint.names[:inputs], *joint.names[inputs + len(live):inputs + len(live) + len(values[0]) - inputs]]
        """Of the state before a step, inputs, noise and saved values."""
        self.floating = [place for place in range(width) if self.wanted[place]]
        self.gradients = dict(zip(joint.differentiable, joint.gradients, strict=True))
        self.of_found = [place for place in joint.differentiable if place >= width]
        self.kept = [leaf for leaf, place in enumerate(self.floating) if self.gradients.get(place) in joint.parts.for_weights]
        built = chain.backward(
            joint.parts.states, self.steps, joint.names[inputs:inputs + len(live)],
            [self.gradients.get(place) for place in self.floating], [self.gradients[place] for place in self.of_found],
            len(joint.parts.deltas), self.kept)
        self.reached = built.reached
        self.needed = [self.names.index(name) for name in built.values]
        self.read |= {index - width for index in self.needed}
        self.needed_live, self.needed_turned = (
            [joint.names.index(name) - inputs for name in names] for names in (built.live, built.turned))
        running = torch.ones(self.rows, dtype=torch.bool, device=found[0].device)
        adjoint = [zeros(values[0][place]) for place in self.floating]
        examples = [*adjoint, *[live[index] for index in self.needed_live], *_turned(live, self.needed_turned)]
        for step in values:
            examples += [running, *[step[index] for index in self.needed], *[zeros(found[place]) for place in self.of_found],
                         *adjoint]
        self.backward = run.compiler.build(built.module, examples)

    def by_step(self, results: list[Tensor]) -> list[list[Tensor]]:
        """The results of a call of :attr:`forward`."""
        return [list(results[start:start + self.results]) for start in range(0, len(results), self.results)]

    def draw(self, counts: list[int]) -> list[Tensor]:
        """The noise of so many steps ``(T, ...)``, drawn in the order in which the steps draw it."""
        made = torch.empty if min(counts) == self.rows else torch.zeros
        drawn = [made((len(counts), *noise.shape), dtype=noise.dtype, device=noise.device) for noise in self.noise]
        if len(drawn) == 1 and min(counts) == self.rows and self.noise[0].is_divisible:
            return [self.noise[0].fill(drawn[0])]
        for place, count in enumerate(counts):
            for noise, stack in zip(self.noise, drawn, strict=True):
                noise.fill(stack[place] if count == self.rows else stack[place, :count])
        return drawn


def _turned(live: list[Tensor], which: list[int]) -> list[Tensor]:
    return [live[index].t().contiguous() for index in which]


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

    :param state: of as many rows as the first step has, or more.
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
    learning = torch.is_grad_enabled()
    wanted = [learning and value.is_floating_point() for value in start] + [learning and v.requires_grad for v in given]
    examples = [*start, *[value[0] for value in given]]
    rows = examples[0].shape[0]
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

    values: list[list[Tensor]]
    """Of each step, by :attr:`_Steps.names`; of a last call that goes beyond the end, of more steps than there are."""
    whole: list[Tensor]
    """Inputs and noise, of all steps ``(T, rows, ...)``."""
    selected: list[Tensor | None]
    found: list[Tensor]
    """Of a step."""


def _walk(job: _Job, state: list[Tensor]) -> tuple[list[Tensor], _Walked]:
    """The results: running rows of the states before, the state after, running rows of what was found."""
    steps, counts, size = job.steps, job.counts, job.steps.steps
    width, total = steps.width, len(counts)
    live = [job.run.live[index].detach() for index in steps.live]
    live += _turned(live, steps.turned)
    whole = [*job.inputs, *(steps.draw(counts) if job.select is None else [])]
    by_time = [value.unbind(0) if place in steps.read else [value[0]] * total for place, value in enumerate(whole)]
    given = [list(values) for values in zip(*by_time, strict=True)] if whole else [[]] * total
    before, after, selected = [], [], []
    for start in range(0, total, size):
        if job.select is not None:
            chosen = job.select(start, after[-1][:steps.outputs] if after else None)
            selected.append(chosen)
            if chosen is not None:
                state = [value.index_select(0, chosen) for value in state]
            given[start] = [*given[start], *[value[0] for value in steps.draw(counts[start:start + 1])]]
        # Beyond the end, the last step again.
        now = [value for t in range(start, start + size) for value in given[min(t, total - 1)]]
        results = steps.by_step(steps.forward(*state, *live, *now))
        before += [state, *[step[:width] for step in results[:-1]]]
        after += results
        state = [value.contiguous() for value in results[-1][:width]]
    flat = [running_rows([step[place] for step in before], counts, steps.rows) for place in range(width)]
    flat += [running_rows([step[place] for step in after], counts, steps.rows) for place in range(width, steps.outputs)]
    last = [value.clone() for value in after[total - 1][:width]]
    values = [[*then, *given[min(t, total - 1)], *step[steps.outputs:]]
              for t, (then, step) in enumerate(zip(before, after, strict=True))] if steps.learning else []
    return [*flat[:width], *last, *flat[width:]], _Walked(values, whole, selected, after[0][:steps.outputs])


def _by_step(value: Tensor | None, counts: list[int], like: Tensor, total: int) -> list[Tensor]:
    """From running rows to each step's, with zeros for the rest."""
    if value is None:
        return [zeros(like)] * total
    shape = (len(counts), *like.shape)
    if value.shape[0] == shape[0] * shape[1]:
        found = value.contiguous().view(shape)
    else:
        found = value.new_zeros(shape)
        for place, part in enumerate(value.split(counts)):
            found[place, :counts[place]] = part
    return [*found.unbind(0), *[zeros(like)] * (total - len(counts))]


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
        counts, size, rows, values = job.counts, steps.steps, steps.rows, walked.values
        device, total = walked.found[0].device, len(values)
        by_found = [_by_step(gradients[width + place], counts, walked.found[place], total) for place in steps.of_found]
        direct = [_by_step(gradients[place], counts, values[0][place], total) for place in steps.floating]
        running = (torch.arange(rows, device=device) < torch.tensor([*counts, *[0] * (total - len(counts))], device=device)[
            :, None]).unbind(0)
        live = [job.run.live[index].detach() for index in steps.live]
        shared = [*[live[index] for index in steps.needed_live], *_turned(live, steps.needed_turned)]
        adjoint = [zeros(values[0][place]) for place in steps.floating]
        calls: list[list[list[Tensor]]] = []
        for start in reversed(range(0, total, size)):
            now = [value for t in range(start, start + size) for value in (
                running[t], *[values[t][index] for index in steps.needed], *[part[t] for part in by_found],
                *[part[t] for part in direct])]
            results = steps.backward(*adjoint, *shared, *now)
            first, each = len(adjoint), (len(results) - len(adjoint)) // size
            adjoint = [value.contiguous() for value in results[:first]]
            if walked.selected and walked.selected[start] is not None:
                adjoint = [torch.zeros_like(value).index_add_(0, walked.selected[start], value) for value in adjoint]
            calls.append([list(results[first + place * each:first + (place + 1) * each]) for place in range(size)])
        found = [step for call in reversed(calls) for step in call]
        by_place = [list(parts) for parts in zip(*found[:len(counts)], strict=True)]
        inputs = [torch.stack(by_place[sum(steps.reached[:place])]) if reached else None
                  for place, reached in enumerate(steps.reached)]
        names = [*(steps.gradients[place] for place in steps.of_found), *steps.joint.parts.deltas,
                 *(steps.gradients[steps.floating[leaf]] for leaf in steps.kept)]
        by_name = dict(zip(names, [*by_found, *by_place[sum(steps.reached):]], strict=True))
        by_name.update((name, [step[index] for step in values]) for index, name in enumerate(steps.names))
        by_name.update(zip(steps.names[width:], walked.whole, strict=False))
        return None, None, *adjoint, *inputs, *steps.weights(job.run, by_name, counts)
