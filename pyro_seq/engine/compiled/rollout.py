"""The loop that only draws, compiled, and its way back.

Forward, the compiled step is run without gradients. Backward, a second graph takes the gradient from each step to the one
before, and what the parameters' gradients need is left where it lies: they are products over the rows of all steps, done once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_seq.engine.compiled.compiler import Compiled, Run
from pyro_seq.engine.compiled.gradients import Differentiable
from pyro_seq.engine.compiled.nest import put_together, take_apart
from pyro_seq.engine.compiled.trace import Noise

__all__ = ["Rollout", "roll"]


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


class _Job(NamedTuple):
    step: Compiled | Differentiable
    run: Run
    inputs: list[list[Tensor]]
    """By step: what it reads beside the state."""
    counts: list[int]
    """Rows that run, by step."""
    width: int
    """Leaves of the state."""
    select: Callable[[int, list[Tensor] | None], Tensor | None]


def roll(run: Run, name: str, fn: Callable[..., Any], state: Any, steps: list[tuple[Any, ...]], counts: list[int],
         select: Select | None = None) -> Rollout | None:
    """``state, found = fn(state, *step)`` for one step after the other.

    :param state: of as many rows as the first step has.
    :param steps: arguments of each, of so many rows too: those of sequences that have ended are run on, and not looked at.
    :param counts: how many rows run at each step.
    :param select: between the steps.
    :returns: ``None`` where the step cannot be compiled.
    """
    learning, rows = torch.is_grad_enabled(), counts[0]
    start: list[Tensor] = []
    state_plan, width = take_apart(state, start), len(start)
    plan = take_apart((state, *steps[0]), [])
    start = [value.contiguous() for value in start]  # as those of later steps are
    by_step = [[value.contiguous() for value in take(arguments)] for arguments in steps]
    inputs = [*start, *by_step[0]]
    wanted = [value.is_floating_point() and learning and (index < width or value.requires_grad)
              for index, value in enumerate(inputs)]
    key = run.key(name, (plan, tuple(wanted)), inputs)
    step = run.look_up(name, key, lambda: (
        Differentiable(run, fn, plan, inputs, wanted, True) if learning else run.compiled(fn, plan, inputs)), True)
    if step is None or min(counts) < rows and not _by_rows(step, rows):
        return None

    def chosen(place: int, results: list[Tensor] | None) -> Tensor | None:
        if select is None:
            return None
        return select(place, None if results is None else put_together(step.plan, iter(results))[1])

    job = _Job(step, run, by_step, counts, width, chosen)
    if learning:
        tracked = [value for value in start if value.is_floating_point()]
        tracked += [value for arguments in by_step for value, want in zip(arguments, wanted[width:], strict=True) if want]
        tracked += [run.live[index] for index in step.joint.learned]
        results = list(_Rolled.apply(job, [value.detach() for value in start], wanted, *tracked))
    else:
        results, *_ = _forward(job, start)
    after, found = put_together(step.plan, iter(results[width:]))
    return Rollout(put_together(state_plan, iter(results[:width])), found, after)


def take(nest: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    take_apart(nest, tensors)
    return tensors


def _by_rows(step: Compiled | Differentiable, rows: int) -> bool:
    """Whether the noise of the running rows can be told from that of the others."""
    if step.joint.graph.random if isinstance(step, Differentiable) else step.drawn_inside:
        return False
    return all(part.shape[:1] == (rows,) and rows not in part.shape[1:] for part in step.noise)


def _draw(part: Noise, count: int) -> Tensor:
    drawn = part.draw(count)
    return torch.cat([drawn, drawn.new_zeros(part.shape[0] - count, *part.shape[1:])])


def _forward(job: _Job, state: list[Tensor]
             ) -> tuple[list[Tensor], list[list[Tensor]], list[list[Tensor]], list[Tensor | None]]:
    """The results of all rows: states before, the state after, what was found; and by step the outputs, the pools, and the rows
    that were selected before."""
    step, run, rows = job.step, job.run, job.counts[0]
    learning, pools, outputs = isinstance(step, Differentiable), [], []
    before: list[list[Tensor]] = []
    live = None if learning else [run.live[index] for index in step.live]
    selected: list[Tensor | None] = []
    for place, (inputs, count) in enumerate(zip(job.inputs, job.counts, strict=True)):
        selected.append(job.select(place, outputs[-1] if outputs else None))
        if selected[-1] is not None:
            state = [value.index_select(0, selected[-1]) for value in state]
        noise = [part.draw() if count == rows else _draw(part, count) for part in step.noise]
        before.append(state)
        if learning:
            found, pool = step.pool(run, [*state, *inputs], noise)
            pools.append(pool)
        else:
            found = step.call(*state, *inputs, *live, *noise)
        outputs.append(found)
        state = [value.contiguous() for value in found[:job.width]]
    flat = [_flat(parts, job.counts) for parts in zip(*before, strict=True)]
    flat += state
    flat += [_flat(parts, job.counts) for parts in zip(*(found[job.width:] for found in outputs), strict=True)]
    return flat, outputs, pools, selected


def _flat(parts: tuple[Tensor, ...], counts: list[int]) -> Tensor:
    """The running rows of all steps."""
    return torch.cat([part if part.shape[0] == count else part[:count] for part, count in zip(parts, counts, strict=True)])


class _Rolled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Job, start: list[Tensor], wanted: list[bool], *tracked: Tensor) -> tuple[Tensor, ...]:
        results, outputs, ctx.pools, ctx.selected = _forward(job, start)
        ctx.job, ctx.wanted, ctx.like = job, wanted, outputs[0]
        ctx.set_materialize_grads(False)
        width, has = job.width, set(job.step.joint.differentiable)
        fixed = [value for value in results[:width] if not value.is_floating_point()] + results[width:2 * width]
        fixed += [value for place, value in enumerate(results[2 * width:], start=width) if place not in has]
        ctx.mark_non_differentiable(*fixed)
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        job, step, pools, width = ctx.job, ctx.job.step, ctx.pools, ctx.job.width
        ctx.pools = None
        rows, counts, joint = job.counts[0], job.counts, step.joint
        floating = [place for place in range(width) if ctx.wanted[place]]
        of_before = [None if gradients[place] is None else gradients[place].split(counts) for place in range(width)]
        of_found = {place: None if gradients[place + width] is None else gradients[place + width].split(counts)
                    for place in joint.differentiable if place >= width}
        zeros = {place: torch.zeros(like.shape, dtype=like.dtype, device=like.device)
                 for place in joint.differentiable for like in [ctx.like[place]]}
        adjoint: dict[int, Tensor | None] = dict.fromkeys(range(width))
        to_inputs: list[list[Tensor]] = []
        number = sum(ctx.wanted)
        weights: list[Tensor | None] | None = None
        for t in reversed(range(len(counts))):
            count = counts[t]
            for place in joint.differentiable:
                if place < width:
                    given = adjoint[place]
                else:
                    given = None if of_found[place] is None else _whole(of_found[place][t], rows)
                pools[t].append(zeros[place] if given is None else given.contiguous())
            found = step.backward(pools[t])
            pools[t].extend(found[number:])
            if not step.by_rows:  # step by step
                weights = _sum(weights, step.weights_of(job.run, rows)(pools[t]))
            for index, place in enumerate(floating):
                gradient, direct = found[index], of_before[place]
                if count < rows and gradient is not None:
                    gradient = _whole(gradient[:count], rows)
                if direct is not None:
                    direct = _whole(direct[t], rows)
                    gradient = direct if gradient is None else gradient + direct
                if gradient is not None and ctx.selected[t] is not None:
                    gradient = torch.zeros_like(gradient).index_add_(0, ctx.selected[t], gradient)
                adjoint[place] = gradient
            others = found[len(floating):number]
            to_inputs.append(list(others) if count == rows else [
                None if value is None else _whole(value[:count], rows) for value in others])
        if step.by_rows:
            weights = _of_weights(job, pools)
        inputs = [value for parts in reversed(to_inputs) for value in parts]
        return None, None, None, *[adjoint[place] for place in floating], *inputs, *weights


def _sum(total: list[Tensor | None] | None, part: Any) -> list[Tensor | None]:
    if total is None:
        return list(part)
    return [a if b is None else a + b for a, b in zip(total, part, strict=True)]


def _whole(value: Tensor, rows: int) -> Tensor:
    """With zeros for the rows that do not run."""
    count = value.shape[0]
    return value.contiguous() if count == rows else torch.cat([value, value.new_zeros(rows - count, *value.shape[1:])])


def _of_weights(job: _Job, pools: list[list[Tensor]]) -> list[Tensor | None]:
    """The gradients of the parameters, from the values of all steps together."""
    step, total = job.step, sum(job.counts)
    part = step.weights_of(job.run, total)
    if part is None:  # another graph at so many rows: step by step
        one, sums = step.weights_of(job.run, job.counts[0]), None
        for pool in pools:
            sums = _sum(sums, one(pool))
        return sums
    size = part.rows
    given = []
    first, last = len(step.wanted), len(step.wanted) + len(step.joint.graph.live)
    for index in part.taken:
        if first <= index < last:
            given.append(pools[0][index])
            continue
        value = _flat(tuple(pool[index] for pool in pools), job.counts).contiguous()
        if total < size:
            more = (size - total, *value.shape[1:])
            value = torch.cat([value, value.new_zeros(more) if index >= step.linear else value[:1].expand(more)])
        given.append(value)
    return list(part.call(*given))
