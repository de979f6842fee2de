"""Training by stochastic gradient: what surrounds the loss, resumable to the same numbers."""

from __future__ import annotations

import math
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from pyro_seq.engine.state import map_state
from pyro_seq.fit.batches import bucketed, epoch_generator, windows
from pyro_seq.fit.checkpoint import load_checkpoint, save_checkpoint
from pyro_seq.fit.parallel import agreed, rank, share, sum_gradients, world_size
from pyro_seq.infer.elbo import SequentialELBO
from pyro_seq.infer.loss import SequenceLoss
from pyro_seq.module import own_parameters, require_count, require_guide, require_model
from pyro_seq.sequences import Sequences

__all__ = ["Fit", "fit", "restore"]


class Fit(NamedTuple):
    """What training came to."""

    history: pd.DataFrame
    """A row an evaluation: ``epoch``, ``updates``, ``seconds`` of training so far, ``kl_weight`` at the epoch's last update,
    and nats per frame, lower being better: ``train``, the objective as met on the way; ``valid`` and the others, minus the
    bound with the averaged weights. Where ``kl_weight`` is below 1, the objective is not minus the bound, and lies lower."""
    best_epoch: int
    """The epoch whose averaged weights model and guide now have: the best on ``valid``, the last one without it."""
    best: float
    """Nats per frame on ``valid`` then: the least of many noisy numbers, hence optimistic, and :func:`~pyro_seq.evaluate` on
    other data is not. Without ``valid``, the last of ``train``, and NaN if the weight of the KL was still below 1."""


def fit(model: Any, guide: Any, train: Any, *, valid: Any = None, also: Mapping[str, Any] | None = None, epochs: int = 100,
        batch_size: int = 20, learning_rate: float = 1e-3, schedule: str = "cosine", warmup: int = 50, clip: float = 5.0,
        weight_decay: float = 0.0, averaging: float = 0.99, kl_annealing: int = 0, window: int | None = None,
        normalise: str = "data", every: int = 1, patience: int | None = None, loss: Any = None, seed: int = 0,
        checkpoint: str | Path | None = None, progress: bool = True) -> Fit:
    r"""Train a declared model and its guide, and leave them with the best weights.

    Adam on batches of similar length; the loss is per frame. Given the same seed the result is the same, whether or not the
    run was interrupted in between. Started by ``torchrun``, each process takes its share of every batch. Parameters that do
    not require a gradient stay as they are.

    :param train: data as accepted by :meth:`pyro_seq.Sequences.of`.
    :param valid: data that chooses the epoch whose weights are kept.
    :param also: more data by name, evaluated beside ``valid`` and used for nothing.
    :param int epochs: passes over the data.
    :param int batch_size: sequences a batch, over all processes.
    :param float learning_rate: of Adam, at its highest; about what an update may move a weight by. At most 1000.
    :param str schedule: ``"cosine"``: the rate falls to zero over the run along half a cosine; ``"constant"``.
    :param int warmup: updates over which the rate rises from zero.
    :param float clip: largest norm of an update's gradient; larger ones are scaled to it. It sees the update's loss as
        ``normalise=`` makes it: under ``"data"`` an update of more frames has a larger gradient.
    :param float weight_decay: of AdamW (Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, 2019).
    :param float averaging: decay, per update, of the exponential moving average of the weights that is evaluated and kept
        (Polyak and Juditsky, *Acceleration of Stochastic Approximation by Averaging*, 1992); 0 for none.
    :param int kl_annealing: epochs over which the weight of the latent terms rises from 0 to 1 (Bowman et al., *Generating
        Sentences from a Continuous Space*, 2016); for the ELBO alone.
    :param int window: steps between updates within a batch, for long sequences: the state is carried on, the gradient is
        not. Whole sequences when omitted.
    :param str normalise: what an update's loss is divided by. ``"data"``: the epoch's mean number of frames per update, so
        that over an epoch every frame counts the same, and the mean of the gradients is that of the loss per frame.
        ``"batch"``: the update's own frames; this keeps gradients on one scale for ``clip``, and weighs up frames that share an
        update with few others, in batches of short sequences and in the last windows.
    :param int every: epochs between evaluations.
    :param int patience: evaluations without a better ``valid`` after which training stops.
    :param loss: a :class:`~pyro_seq.SequentialELBO`, the default, :class:`~pyro_seq.IWAE`, :class:`~pyro_seq.FIVO` or
        :class:`~pyro_seq.ReweightedWakeSleep`. ``train``, ``valid`` and the others are minus its own bound, of its own
        number of particles. Over windows the weights are carried on too.
    :param int seed: of the batches and of all noise; the weights that model and guide start from are theirs.
    :param checkpoint: a file that holds the run; if it exists, the run goes on from it.
    :raises ValueError: when the bound, its gradient or a weight is not finite (the checkpoint keeps the last epoch), the
        checkpoint is damaged or of another run, or the model has global parameters with priors.

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
        >>> x = model.simulate([20] * 40)["x"]
        >>> result = seq.fit(model, seq.FilteringGuide(model), x[:30], valid=x[30:], epochs=3, progress=False)
        >>> list(result.history.columns)
        ['epoch', 'updates', 'seconds', 'kl_weight', 'train', 'valid']
    """
    require_model(model, "fit")
    require_guide(guide, model, "fit")
    for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 1), ("warmup", warmup, 0),
                               ("kl_annealing", kl_annealing, 0), ("every", every, 1), ("seed", seed, 0)):
        require_count(name, _plain(value), least)
    for name, value in (("window", window), ("patience", patience)):
        if value is not None:
            require_count(name, _plain(value), 1)
    for name, value in (("learning_rate", learning_rate), ("clip", clip), ("weight_decay", weight_decay),
                        ("averaging", averaging)):
        if not isinstance(value, Real):
            raise TypeError(f"{name}={value!r} is not a number" + "; math.inf clips nothing" * (name == "clip"))
    if normalise not in ("data", "batch"):
        raise ValueError(f"normalise={normalise!r}; it is 'data' or 'batch'")
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"schedule={schedule!r}; it is 'cosine' or 'constant'")
    if not 0 <= averaging < 1:
        raise ValueError(f"averaging={averaging}; it is the decay of an average, at least 0 and below 1")
    if not learning_rate > 0 or not clip > 0:
        raise ValueError(f"learning_rate={learning_rate} and clip={clip} are positive")
    if learning_rate > 1000:
        raise ValueError(f"learning_rate={learning_rate}; it is about what an update of Adam moves a weight by, at most 1000: "
                         "measure the data in other units")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay={weight_decay}; it is at least 0 and finite")
    if patience is not None and valid is None:
        raise ValueError("patience= counts evaluations on valid=, which was not given")
    loss = SequentialELBO() if loss is None else loss
    if not isinstance(loss, SequenceLoss):
        raise TypeError(f"loss is a {type(loss).__name__}; fit takes a SequentialELBO, IWAE, FIVO or ReweightedWakeSleep: for "
                        "others use pyro.infer.SVI")
    if kl_annealing and not isinstance(loss, SequentialELBO):
        raise ValueError(f"kl_annealing={kl_annealing} weighs the latent terms of the ELBO, and a bound by weights, here the "
                         f"{loss.kind}, has none apart: leave kl_annealing=0")
    if window is not None and getattr(loss, "sleep", 0) > 0:
        raise ValueError(f"window={window} with {loss!r}, whose sleep phase dreams whole sequences: train without window=, or "
                         "with sleep=0")
    if drawn := model.global_sites():
        raise ValueError(f"{type(model).__name__} has the global parameters {drawn}, whose terms belong to the whole data set "
                         "and not to each batch: train it with pyro.infer.SVI and plate_size=, or make them parameters")
    if train is None:
        raise TypeError("train is None; it is the data, as Sequences.of takes it")
    if also is not None and not isinstance(also, Mapping):
        raise TypeError(f"also is a {type(also).__name__}; it is data by name, such as {{'test': x}}")
    if checkpoint is not None and Path(checkpoint).is_dir():
        raise ValueError(f"checkpoint={str(checkpoint)!r} is a folder; it is the name of a file")
    train = Sequences.of(train)
    held_out = {name: Sequences.of(data) for name, data in {"valid": valid, **(also or {})}.items() if data is not None}
    if clash := sorted({"epoch", "updates", "seconds", "kl_weight", "train", "valid"} & set(also or {})):
        raise ValueError(f"also= has the names {clash}, which the history uses itself: rename them")
    for name, part in {"train": train, **held_out}.items():
        if part.x and all(bool((value.isnan() if key not in part.observed else ~part.observed[key]).all())
                          for key, value in part.x.items()):
            raise ValueError(f"{name} has no observed entry: all of it is NaN or masked")
    settings = dict(epochs=int(epochs), batch_size=int(batch_size), learning_rate=float(learning_rate), schedule=schedule,
                    warmup=int(warmup), clip=float(clip), weight_decay=float(weight_decay), averaging=float(averaging),
                    kl_annealing=int(kl_annealing), window=int(window or 0), normalise=normalise, every=int(every),
                    patience=int(patience or 0), seed=int(seed), processes=world_size(),
                    loss=[type(loss).__name__, *loss.options().values()],
                    data=[[name, part.num_sequences, int(part.lengths.sum()), checksum(part)] for name, part in
                          {"train": train, **held_out}.items()])
    run = _Run(model, guide, loss, settings)
    if checkpoint is not None and Path(checkpoint).exists():
        run.load(checkpoint)
    devices = [train.device] if train.device.type == "cuda" else []
    kl_weight = loss.kl_weight
    try:
        with torch.random.fork_rng(devices), own_parameters(model, guide), warnings.catch_warnings(), tqdm(
                total=epochs, initial=run.epoch, disable=not progress or rank() > 0, desc="fit", unit="epoch") as bar:
            # Pyro says so of every frozen parameter of a plain module; they are meant to be.
            warnings.filterwarnings("ignore", ".* was not registered in the param store because requires_grad=False")
            while run.epoch < epochs and not run.stopped:
                run.one_epoch(train, held_out)
                bar.update()
                latest = run.history[-1] if run.history else {}
                bar.set_postfix({k: f"{v:.3f}" for k, v in latest.items() if k in ("train", *held_out)})
                if checkpoint is not None and rank() == 0:
                    run.save(checkpoint)
    finally:
        loss.kl_weight = kl_weight  # Annealing set it.
    return run.finish()


def restore(model: Any, guide: Any, checkpoint: str | Path) -> Fit:
    """Give model and guide the best weights of a checkpoint that :func:`fit` wrote.

    :raises ValueError: if it is damaged, of another model or guide, or of a run that has not been evaluated yet.

    Example::

        >>> import tempfile
        >>> import pyro_seq as seq
        >>> from pyro_seq.models import VRNN, VRNNInference
        >>> model = VRNN(observed=4, latent=2, hidden=4)
        >>> guide, path = VRNNInference(model), Path(tempfile.mkdtemp()) / "vrnn.ckpt"
        >>> x = model.simulate([5] * 4)["x"]
        >>> _ = seq.fit(model, guide, x, epochs=1, checkpoint=path, progress=False)
        >>> seq.restore(model, guide, path).best_epoch
        1
    """
    require_model(model, "restore")
    require_guide(guide, model, "restore")
    run = _Run(model, guide, SequentialELBO(), None)
    run.load(checkpoint)
    if not run.history:
        raise ValueError(f"the run of {str(checkpoint)!r} stands at epoch {run.epoch} and is first evaluated after epoch "
                         f"{min(run.settings['every'], run.settings['epochs'])}: let fit go on until then")
    return run.finish()


class _Run:
    """The state of a run between two epochs."""

    def __init__(self, model: Any, guide: Any, loss: Any, settings: dict[str, Any] | None):
        self.model, self.guide, self.loss, self.settings = model, guide, loss, settings
        # Each once, where the guide shares some of the model's.
        self.parameters = list(dict.fromkeys([*model.parameters(), *guide.parameters()]))
        if not self.parameters or settings is not None and not any(p.requires_grad for p in self.parameters):
            raise ValueError(f"neither {type(model).__name__} nor {type(guide).__name__} has parameters to train")
        self.buffers = [*model.buffers(), *guide.buffers()]
        agreed([*(p.data for p in self.parameters), *self.buffers])
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1.0, weight_decay=(settings or {}).get("weight_decay", 0.0))
        self.average = [p.detach().clone() for p in self.parameters]
        self.best: dict[str, Any] = {"value": math.inf, "epoch": 0, "weights": self.average, "buffers": self.buffers}
        self.history: list[dict[str, float]] = []
        self.epoch = self.updates = self.waited = 0
        self.seconds = 0.0

    @property
    def stopped(self) -> bool:
        return 0 < self.settings["patience"] <= self.waited

    def one_epoch(self, train: Sequences, held_out: Mapping[str, Sequences]) -> None:
        begun, settings = time.perf_counter(), self.settings
        batches = bucketed(train.lengths, settings["batch_size"], epoch_generator(settings["seed"], self.epoch))
        # Every epoch and every process has its own noise, which depends on nothing that came before.
        torch.manual_seed(epoch_generator(settings["seed"], self.epoch, rank(), 1).initial_seed())
        self.model.train(), self.guide.train()
        parts = [windows(int(train.lengths[batch].max()), settings["window"] or None) for batch in batches]
        frames = int(train.lengths.sum())
        total = 0.0
        for index, batch in enumerate(batches):
            mine = share(batch)
            sequences = train.select(mine) if mine else None
            lengths = train.lengths[batch]
            state = None
            for window in parts[index]:
                self._set_rates(index / len(batches))
                if settings["normalise"] == "batch":
                    divisor = (lengths.clamp(max=window.stop) - window.start + 1).clamp(min=0).sum()
                else:  # One number for the whole epoch.
                    divisor = frames / sum(map(len, parts))
                for p in self.parameters:
                    p.grad = None
                value = torch.zeros((), dtype=torch.double)
                if sequences is not None and window.start <= sequences.num_steps:
                    window = window._replace(stop=min(window.stop, sequences.num_steps), state=state)
                    with self._refusing_loose_parameters():
                        nats, state = self.loss.window_loss(self.model, self.guide, sequences, window)
                    (nats / divisor).backward()
                    value = nats.detach().double().cpu()
                    state = map_state(lambda leaf: leaf.detach(), state)
                sum_gradients(self.parameters)
                self._update()
                total += float(value)
        if not all(bool(p.isfinite().all()) for p in self.parameters):
            raise ValueError(f"some weights are not finite after epoch {self.epoch + 1}: a smaller learning_rate or "
                             "weight_decay may help. The checkpoint, if any, holds the epoch before")
        self.epoch += 1
        self.seconds += time.perf_counter() - begun
        total = torch.tensor(total, dtype=torch.double, device=train.device)
        if world_size() > 1:
            torch.distributed.all_reduce(total)
        if self.epoch % settings["every"] == 0 or self.epoch == settings["epochs"]:
            self._evaluate(float(total) / frames, held_out)

    def _set_rates(self, within: float) -> None:
        settings, done = self.settings, self.epoch + within
        rate = settings["learning_rate"] * min(1.0, (self.updates + 1) / max(1, settings["warmup"]))
        if settings["schedule"] == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * done / settings["epochs"]))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if settings["kl_annealing"]:
            self.loss.kl_weight = min(1.0, done / settings["kl_annealing"])

    def _update(self) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings["clip"])
        if not bool(norm.isfinite()):
            raise ValueError(f"the gradient is {norm.item()} at update {self.updates + 1}, in epoch {self.epoch + 1}: a "
                             "smaller learning_rate or clip may help. Nothing was updated, and the checkpoint, if any, holds "
                             "the last epoch")
        self.optimizer.step()
        self.updates += 1
        # Early on the average is over fewer updates.
        decay = min(self.settings["averaging"], self.updates / (self.updates + 9))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    def _evaluate(self, train: float, held_out: Mapping[str, Sequences]) -> None:
        now = [p.detach().clone() for p in self.parameters]
        self._put(self.average)
        self.model.eval(), self.guide.eval()
        annealed, self.loss.kl_weight = self.loss.kl_weight, 1.0
        torch.manual_seed(epoch_generator(self.settings["seed"], self.epoch, 2).initial_seed())
        row = {"epoch": self.epoch, "updates": self.updates, "seconds": self.seconds, "kl_weight": annealed,
               "train": train}
        for name, data in held_out.items():
            row[name] = nats_per_frame(self.loss, self.model, self.guide, data)
        self.loss.kl_weight = annealed
        self._put(now)
        chooses = torch.tensor(row.get("valid", -self.epoch), dtype=torch.double, device=self.parameters[0].device)
        agreed([chooses])
        self.history.append(row)
        self.waited += 1
        if float(chooses) < self.best["value"]:
            self.waited = 0
            self.best = {"value": float(chooses), "epoch": self.epoch, "weights": [a.clone() for a in self.average],
                         "buffers": [b.clone() for b in self.buffers]}

    def _put(self, weights: list[Tensor]) -> None:
        with torch.no_grad():
            for p, w in zip(self.parameters, weights, strict=True):
                p.copy_(w)

    @contextmanager
    def _refusing_loose_parameters(self) -> Iterator[None]:
        if self.updates > 0:
            yield
            return
        with poutine.trace(param_only=True) as met:
            yield
        mine = {id(p) for p in self.parameters}
        sites = [met.trace.nodes[name] for name in met.trace.param_nodes]
        loose = sorted(site["name"] for site in sites if id(_unconstrained(site["value"])) not in mine)
        if loose:
            raise ValueError(f"{loose} are pyro.param statements, which fit does not see: make them attributes of the model or "
                             "guide (PyroParam), or train with pyro.infer.SVI")

    def finish(self) -> Fit:
        self._put(self.best["weights"])
        for buffer, value in zip(self.buffers, self.best["buffers"], strict=True):  # the running moments of a normalisation
            buffer.copy_(value)
        self.model.eval(), self.guide.eval()
        history = pd.DataFrame(self.history)
        last = self.history[-1]
        best = self.best["value"] if "valid" in last else last["train"] if last["kl_weight"] >= 1 else math.nan
        return Fit(history, self.best["epoch"], float(best))

    def save(self, path: str | Path) -> None:
        save_checkpoint(path, {
            "settings": self.settings, "epoch": self.epoch, "updates": self.updates, "waited": self.waited,
            "seconds": self.seconds, "history": self.history, "best": self.best, "average": self.average,
            "model": dict(self.model.state_dict()), "guide": dict(self.guide.state_dict()),
            "optimizer": self.optimizer.state_dict()})

    def load(self, path: str | Path) -> None:
        state = load_checkpoint(path, self.parameters[0].device)
        kept = ("epoch", "updates", "waited", "seconds", "history", "best", "average")
        if set(state) != {*kept, "settings", "model", "guide", "optimizer"}:
            raise ValueError(f"the checkpoint {str(path)!r} was not written by fit: it holds {sorted(state)}")
        if self.settings is not None and state["settings"] != self.settings:
            differ = {k: (state["settings"].get(k), v) for k, v in self.settings.items() if state["settings"].get(k) != v}
            raise ValueError(f"the checkpoint {str(path)!r} is of a run with other settings (there, here): {differ}. Use the "
                             "same ones to go on, or another file to begin anew")
        both = (("model", self.model), ("guide", self.guide))
        for what, module in both:  # before anything is loaded, so that nothing is when it does not fit
            here, there = ({k: tuple(v.shape) for k, v in found.items()} for found in (module.state_dict(), state[what]))
            if differ := [f"{k} {there.get(k, 'missing')}, here {here.get(k, 'missing')}"
                          for k in sorted({*here, *there}) if here.get(k) != there.get(k)]:
                raise ValueError(f"the checkpoint {str(path)!r} is of another {what} than this {type(module).__name__}: it has "
                                 f"{'; '.join(differ[:5])}")
        for what, module in both:
            module.load_state_dict(state[what])
        if self.settings is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.settings = state["settings"]
        for name in kept:
            setattr(self, name, state[name])


def checksum(data: Sequences) -> int:
    """Tells the data of one run from that of another."""
    total = 0
    for value in (data.lengths, *data.x.values(), *data.covariates.values(), *data.observed.values()):
        total = zlib.crc32(value.cpu().contiguous().view(torch.uint8).numpy(), total)
    return total


def _plain(value: Any) -> Any:
    """An integer of numpy as one of Python."""
    return int(value) if isinstance(value, np.integer) else value


def _unconstrained(value: Tensor) -> Tensor:
    """The parameter behind the value of a param site."""
    return value.unconstrained() if hasattr(value, "unconstrained") else value


def nats_per_frame(loss: Any, model: Any, guide: Any, data: Sequences, batch_size: int = 100) -> float:
    """Minus the bound per frame, without gradients, in batches of like length."""
    order = data.lengths.argsort()
    return sum(loss.loss(model, guide, data.select(part)) for part in order.split(batch_size)) / int(data.lengths.sum())
