"""Recurrent networks over inputs alone, as a guide's encoder has, by the compiled loop.

On a CPU torch has no fused kernel for those that learn: it runs one small operator after the other, as many on the way back,
and at each step a product for the gradient of the weights. Here the steps are compiled, and that product is done once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_seq.engine.compiled.compiler import Run
from pyro_seq.engine.compiled.padding import filled
from pyro_seq.engine.compiled.products import linear
from pyro_seq.engine.compiled.rollout import roll
from pyro_seq.engine.generators import generator_states, set_generators

__all__ = ["encoded"]

_KINDS = {torch.gru: "gru", torch.lstm: "lstm", torch.rnn_tanh: "tanh", torch.rnn_relu: "relu"}
_DERIVATIVES = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}
_OWN_GRADIENTS = "own gradients"
"""What a guide is declined for that takes gradients while it encodes."""


def encoded(run: Run, fn: Callable[[], Any], device: torch.device) -> Any:
    """What a guide encodes, ``fn()``, on ``device``, with compiled networks where that makes no difference."""
    if run.declined(_OWN_GRADIENTS):
        return fn()
    generators = generator_states(device)
    try:
        with _Networks(run):
            return fn()
    except _Differentiated:
        run.decline(_OWN_GRADIENTS)
        set_generators(generators, device)
        return fn()


class _Differentiated(Exception):
    """A derivative is taken, and compiled networks have one once."""


class _Networks(TorchFunctionMode):
    """Inside, on a CPU, torch's recurrent networks run compiled, and its large linear maps by the fastest product there is."""

    def __init__(self, run: Run):
        super().__init__()
        self.run = run
        self.cell: _Cell = run.compiler.cells.setdefault(run.modules, _Cell())
        self.cell.live = run.live
        self.places = {id(value): place for place, value in enumerate(run.live) if value.is_leaf}

    def __torch_function__(self, fn: Any, kinds: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if fn in _DERIVATIVES:
            raise _Differentiated
        if fn is nn.functional.linear and not _is_watched():
            return linear(*arguments, **(keywords or {}))
        if fn in _KINDS and not keywords and not _is_watched() and self.can_run(*arguments):
            found = self.network(_KINDS[fn], *arguments)
            if found is not None:
                return found
        return fn(*arguments, **(keywords or {}))

    def can_run(self, inputs: Tensor, hidden: Any, weights: Any, *options: Any) -> bool:
        """Whether it is a plain network of the guide's, over a padded batch."""
        if not isinstance(options[0], bool):  # a packed sequence, whose second argument is its sizes
            return False
        has_biases, layers, dropout, training, both_ways, _ = options
        count = layers * (2 if both_ways else 1) * (4 if has_biases else 2)
        return (inputs.device.type == "cpu" and inputs.dim() == 3 and 0 not in inputs.shape and len(weights) == count
                and not (training and dropout and layers > 1) and not torch.is_autocast_enabled("cpu")
                and all(id(value) in self.places for value in weights))

    def network(self, kind: str, inputs: Tensor, hidden: Any, weights: list[Tensor], has_biases: bool, layers: int,
                dropout: float, training: bool, both_ways: bool, batch_first: bool) -> tuple[Tensor, ...] | None:
        """What torch's function of that kind gives; ``None`` where the step cannot be compiled."""
        inputs = inputs.transpose(0, 1) if batch_first else inputs
        starts = hidden if kind == "lstm" else (hidden,)
        directions, each = 2 if both_ways else 1, 4 if has_biases else 2
        lasts: list[tuple[Tensor, ...]] = []
        for layer in range(layers):
            outputs = []
            for direction in range(directions):
                place = layer * directions + direction
                found = self.layer(kind, inputs.flip(0) if direction else inputs, tuple(part[place] for part in starts),
                                   weights[place * each:(place + 1) * each])
                if found is None:
                    return None
                outputs.append(found[0].flip(0) if direction else found[0])
                lasts.append(found[1])
            inputs = torch.cat(outputs, -1) if both_ways else outputs[0]
        return (inputs.transpose(0, 1) if batch_first else inputs,
                *(torch.stack(parts) for parts in zip(*lasts, strict=True)))

    def layer(self, kind: str, inputs: Tensor, start: tuple[Tensor, ...], weights: list[Tensor]
              ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """:returns: the outputs ``(T, B, hidden)``, and the state after the last step."""
        steps, batch = inputs.shape[:2]
        places = tuple(self.places[id(value)] for value in weights[1::2])
        name = f"layer {self.cell.numbers.setdefault(places, len(self.cell.numbers) + 1)} of the recurrent networks"
        size = self.run.size(name, batch)
        known = linear(inputs, weights[0], *weights[2:3])
        if batch < size:
            known = filled(known.transpose(0, 1), size).transpose(0, 1)
            start = tuple(filled(value, size) for value in start)
        rolled = roll(self.run, name, self.cell, start, (known, kind, places), [size] * steps)
        if rolled is None:
            return None
        states = tuple(value.reshape(steps, size, -1)[:, :batch] for value in rolled.found)
        return states[0], tuple(value[-1] for value in states)


def _is_watched() -> bool:
    """Whether something stands around that compiled code knows nothing of: transforms of functions (``torch.func``), hooks on
    the tensors that are kept for gradients (``torch.utils.checkpoint``)."""
    # Torch has no public names for these two questions.
    return (torch._C._functorch.peek_interpreter_stack() is not None
            or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None)


class _Cell:
    """One step of a recurrent network."""

    live: list[Tensor]

    def __init__(self) -> None:
        self.numbers: dict[tuple[int, ...], int] = {}
        """By its weights' places, the number of a layer, which is compiled apart."""

    def __call__(self, state: tuple[Tensor, ...], known: Tensor, kind: str, places: tuple[int, ...]
                 ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The state after the step, to go on with and to be kept.

        :param known: ``(B, gates)`` what the inputs add.
        :param places: of the hidden weights and biases among the live tensors.
        """
        hidden, weight = state[0], self.live[places[0]]
        added = torch.addmm(self.live[places[1]], hidden, weight.T) if len(places) > 1 else hidden @ weight.T
        if kind == "gru":
            (reset, update, new), (more_reset, more_update, more_new) = known.chunk(3, -1), added.chunk(3, -1)
            new = torch.tanh(new + torch.sigmoid(reset + more_reset) * more_new)
            after = (new + torch.sigmoid(update + more_update) * (hidden - new),)
        elif kind == "lstm":
            enter, forget, content, leave = (known + added).chunk(4, -1)
            memory = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(content)
            after = torch.sigmoid(leave) * torch.tanh(memory), memory
        else:
            after = (torch.tanh(known + added) if kind == "tanh" else torch.relu(known + added),)
        return after, after
