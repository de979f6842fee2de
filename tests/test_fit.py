"""Training, checkpoints, evaluation and the commands, against small cases worked out here."""

import copy
import hashlib
import io
import math
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import Bayesian, DeepMarkov, LocalLevel, TwoSites, ragged
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from test_models import MODELS, OWN, built, frames
from torch import nn
from torch.distributions import constraints

import pyro_seq as seq
from pyro_seq.__main__ import main
from pyro_seq.data import load_polyphonic
from pyro_seq.engine.loop import Window
from pyro_seq.engine.state import leaves, map_state
from pyro_seq.fit import commands
from pyro_seq.fit import train as training
from pyro_seq.fit.batches import bucketed, epoch_generator, windows
from pyro_seq.fit.checkpoint import load_checkpoint, save_checkpoint
from pyro_seq.models import SRNN, VRNN, DeepMarkovModel, SRNNInference, StructuredInference, VRNNInference

LENGTHS = [4, 7, 1, 5, 7, 2, 6]

# Windows.


def summed(loss, model, guide, batch, size, detach=True):
    """The losses of all windows, each begun from the last one's state."""
    total, state = 0.0, None
    for window in windows(batch.num_steps, size):
        nats, state = loss.window_loss(model, guide, batch, window._replace(state=state))
        total = total + nats
        state = training.map_state(lambda leaf: leaf.detach() if detach else leaf, state)
    return total


WINDOWED = {
    **{f"{model} {guide}": lambda model=model, guide=guide: (*built(model, guide, frames(4, 7, 3)), frames(7, 7, 3))
       for model in MODELS for guide in (*OWN[model], "filtering", "smoothing", "avf", "avf paper", "prior")},
    "local level": lambda: (lambda m: (m, seq.SmoothingGuide(m, hidden=4), torch.randn(7, 7)))(LocalLevel(0.0, 1.0, 0.1, 1.0)),
    "two sites": lambda: (lambda m, x: (m, seq.FilteringGuide(m, like=x, hidden=4), x))(TwoSites(), torch.randn(7, 7, 3)),
    "deep Markov": lambda: (lambda m: (m, seq.FilteringGuide(m, hidden=4), torch.randn(7, 7, 4)))(DeepMarkov(gaussian=True)),
}


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("name", WINDOWED)
def test_windows_add_up_to_the_whole(name, particles, row_noise):
    model, guide, x = WINDOWED[name]()
    x = ragged(x, LENGTHS)
    x = x.clamp(max=1) if "level" not in name else x
    x[1, 3], x[4, 5] = torch.nan, torch.nan
    batch = seq.Sequences.of(x, LENGTHS)
    loss = seq.SequentialELBO(particles)
    whole = loss.differentiable_loss(model, guide, batch)
    for size in (1, 5) if particles == 1 else (3,):
        torch.testing.assert_close(summed(loss, model, guide, batch, size), whole, rtol=1e-10, atol=1e-10)
    cut = guide.reads_future  # at the end of each window
    if not cut and not name.endswith(("avf", "prior")) and "paper" not in name and not (
            model.missing_feeds_state and "two" not in name):
        # With the gradient let through the borders, it is that of the whole too.
        parameters = [*model.parameters(), *guide.parameters()]
        found, expected = (torch.autograd.grad(value, parameters, allow_unused=True) if parameters else [] for value in (
            summed(loss, model, guide, batch, 3, detach=False), whole))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["own past", "filtering", "avf"])
def test_a_window_encodes_its_own_frames_alone(name, monkeypatch):
    """Or the cost of an epoch would grow with the square of the length."""
    model, guide = built("DMM", name)
    read, encode = [], type(guide).stream_rows

    def stream_rows(self, sequences, carry):
        read.append(sequences.num_steps)
        return encode(self, sequences, carry)

    monkeypatch.setattr(type(guide), "stream_rows", stream_rows)
    summed(seq.SequentialELBO(), model, guide, seq.Sequences.of(frames(2, 7, 3)), 3)
    assert read == [3, 3, 1]


@pytest.mark.parametrize("name", ["own future", "own both", "smoothing"])
def test_windows_of_a_guide_that_reads_the_future_say_what_the_whole_does(name):
    model, guide = built("DMM", name)
    batch = seq.Sequences.of(frames(4, 7, 3), [7, 3, 5, 2])
    whole, carry = guide.prepare_rows(batch), None
    for start, stop in ((1, 3), (4, 6), (7, 7)):
        found, carry = guide.window_rows(batch, start, stop, carry)
        for a, b in zip(leaves(found), leaves(whole), strict=True):
            inside = batch.active[:, start - 1:stop]
            torch.testing.assert_close(a[inside], b[:, start - 1:stop][inside], rtol=1e-10, atol=1e-10)
        carry = map_state(torch.Tensor.detach, carry)


@pytest.mark.parametrize("window, says", [
    (Window(0, 3), r"0\.\.3 does not lie within the steps 1\.\.7"), (Window(3, 2), r"3\.\.2"), (Window(2, 8), r"2\.\.8"),
    (Window(3, 4), r"3\.\.4 has no state to begin from")])
def test_impossible_windows(window, says):
    model, guide = built("DMM", "own past")
    with pytest.raises(ValueError, match=says):
        seq.SequentialELBO().window_loss(model, guide, seq.Sequences.of(frames(2, 7, 3)), window)


# Training.


def data(seed=0, count=14):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    lengths = torch.randint(2, 10, (count,), generator=generator)
    return seq.Sequences.of(torch.bernoulli(torch.full((count, 9, 3), 0.4), generator=generator), lengths)


def pair(seed=0, make=SRNN, guide=SRNNInference):
    torch.manual_seed(seed)
    model = make(3, 2, 4)
    return model, guide(model)


OPTIONS = dict(epochs=6, batch_size=5, window=4, kl_annealing=3, averaging=0.9, warmup=4, every=2, weight_decay=0.1,
               progress=False)


def trained(model=None, guide=None, **options):
    """History without seconds, and all weights."""
    model, guide = pair() if model is None else (model, guide)
    result = seq.fit(model, guide, data(), valid=data(1, 6), also={"test": data(2, 5)}, **{**OPTIONS, **options})
    return result, [*(p.detach().clone() for p in (*model.parameters(), *guide.parameters()))]


def same(first, second):
    drop = [result.history.drop(columns="seconds") for result, _ in (first, second)]
    return drop[0].equals(drop[1]) and first[0][1:] == second[0][1:] and all(
        torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_the_same_seed_gives_the_same_run():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    pair_of = [pair() for _ in range(3)]
    torch.set_rng_state(before)
    first = trained(*pair_of[0], seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(7)
    assert same(first, trained(*pair_of[1], seed=3))
    assert not same(first, trained(*pair_of[2], seed=4))
    assert list(first[0].history["epoch"]) == [2, 4, 6]
    assert list(first[0].history.columns) == ["epoch", "updates", "seconds", "kl_weight", "train", "valid", "test"]


def test_a_run_that_is_interrupted_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    """Killed at ten random updates, in the middle of windows, batches and epochs."""
    expected = trained()
    total = int(expected[0].history["updates"].iloc[-1])
    update, moments, done = training._Run._update, torch.randperm(total)[:10].tolist(), []

    def killed(run):
        if moments and run.updates >= moments[0]:
            done.append(moments.pop(0))
            raise KeyboardInterrupt
        update(run)

    moments.sort()
    monkeypatch.setattr(training._Run, "_update", killed)
    while True:
        try:
            found = trained(checkpoint=tmp_path / "run")
            break
        except KeyboardInterrupt:
            torch.randn(3)
    assert len(done) == 10 and same(found, expected)
    # A run that is complete is not trained again, and its weights can be had without the data.
    assert same(trained(checkpoint=tmp_path / "run"), expected)
    model, guide = pair(9)
    assert seq.restore(model, guide, tmp_path / "run").best_epoch == expected[0].best_epoch
    assert all(torch.equal(a, b) for a, b in zip([*model.parameters(), *guide.parameters()], expected[1]))
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


@pytest.fixture
def recorded(monkeypatch):
    """What every update saw: the rate, the KL weight, the gradient's norm, and the weights after it."""
    seen = []
    step, window_loss = torch.optim.AdamW.step, seq.SequentialELBO.window_loss

    def spied(self, *args, **kwargs):
        parameters = self.param_groups[0]["params"]
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))
        step(self, *args, **kwargs)
        seen.append({"rate": self.param_groups[0]["lr"], "norm": norm, "kl": weight[-1],
                     "weights": [p.detach().clone() for p in parameters]})

    weight = []

    def weighed(self, *args, **kwargs):
        if torch.is_grad_enabled():
            weight.append(self.kl_weight)
        return window_loss(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    monkeypatch.setattr(seq.SequentialELBO, "window_loss", weighed)
    return seen


def test_rates_annealing_clipping_and_averaging(recorded):
    loss = seq.SequentialELBO(kl_weight=0.7)
    model, guide = pair()
    seq.fit(model, guide, data(), epochs=5, batch_size=5, learning_rate=0.02, warmup=4, kl_annealing=3, clip=0.05,
            averaging=0.6, loss=loss, progress=False)
    assert loss.kl_weight == 0.7
    assert len(recorded) == 15  # three batches an epoch
    average = [p.detach().clone() for module in pair() for p in module.parameters()]
    for i, seen in enumerate(recorded):
        epochs = i / 3
        assert seen["rate"] == pytest.approx(0.02 * min(1, (i + 1) / 4) * 0.5 * (1 + math.cos(math.pi * epochs / 5)))
        assert seen["kl"] == pytest.approx(min(1, epochs / 3))
        assert seen["norm"] <= 0.05 * (1 + 1e-6)
        decay = min(0.6, (i + 1) / (i + 10))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, seen["weights"])]
    for a, p in zip(average, (*model.parameters(), *guide.parameters())):
        torch.testing.assert_close(a, p.detach(), rtol=1e-12, atol=1e-12)
    assert max(seen["norm"] for seen in recorded) > 0.0499


def test_constant_rate_whole_weight_and_no_average(recorded):
    model, guide = pair()
    seq.fit(model, guide, data(), epochs=2, batch_size=5, learning_rate=0.02, schedule="constant", averaging=0.0, warmup=0,
            kl_annealing=0,
            loss=seq.SequentialELBO(kl_weight=0.5), progress=False)
    assert {seen["rate"] for seen in recorded} == {0.02} and {seen["kl"] for seen in recorded} == {0.5}
    assert all(torch.equal(a, p) for a, p in zip(recorded[-1]["weights"], (*model.parameters(), *guide.parameters())))


@pytest.mark.parametrize("normalise", ["data", "batch"])
def test_one_epoch_written_out(normalise, row_noise):
    """AdamW on the loss of each window by its frames or the epoch's mean, the state carried on without its gradient."""
    x = data()
    model, guide = pair()
    seq.fit(model, guide, x, epochs=1, batch_size=5, learning_rate=0.02, schedule="constant", averaging=0.0, window=3,
            warmup=0, kl_annealing=0, clip=math.inf, weight_decay=0.3, normalise=normalise, seed=2, progress=False)
    updates = sum(math.ceil(int(x.lengths[index].max()) / 3) for index in bucketed(x.lengths, 5, epoch_generator(2, 0)))
    other, proposer = pair()
    pyro.clear_param_store()
    parameters = [*other.parameters(), *proposer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.3)
    for index in bucketed(x.lengths, 5, epoch_generator(2, 0)):
        batch, state = x.select(index), None
        for start in range(1, batch.num_steps + 1, 3):
            stop = min(start + 2, batch.num_steps)
            nats, state = seq.SequentialELBO().window_loss(other, proposer, batch, Window(start, stop, state))
            optimizer.zero_grad()
            frames_here = batch.active[:, start - 1:stop].sum() if normalise == "batch" else x.lengths.sum() / updates
            (nats / frames_here).backward()
            optimizer.step()
            state = map_state(lambda leaf: leaf.detach(), state)
    for a, b in zip(parameters, (*model.parameters(), *guide.parameters())):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class Shifted(seq.StateSpaceModel):
    """Independent draws around a location, the latents idle: with the prior as guide, the bound is the likelihood."""

    def __init__(self):
        super().__init__()
        self.mu, self.log_scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def initial(self):
        return pyro.sample("z", dist.Normal(0.0, 1.0))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(torch.zeros_like(z), 1.0))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(self.mu + torch.zeros_like(z), self.log_scale.exp()), obs=x)


def one_long():
    """Ones in the one long sequence, zeros in nine short ones: the mean of the frames is 20 / 38."""
    x = torch.zeros(10, 20)
    x[0] = 1
    return seq.Sequences.of(x, [20] + [2] * 9)


UPDATES = {"whole": (dict(), 1), "windows": (dict(window=2), 10), "batches": (dict(batch_size=5), 2),
           "windows of batches": (dict(batch_size=3, window=7), 6)}


@pytest.mark.parametrize("name", UPDATES)
def test_every_frame_counts_the_same(name):
    """The maximum of the likelihood is found, however the frames fall into updates.

    Adam's scale, the root of a mean of squares with decay 0.999, shrinks by at most 0.999 ** 0.5 an update. Where the rate
    goes to zero, the sum of an epoch's U gradients over their scales does, so the sum of the gradients, 38 (mu - ML), is at
    most 1 - 0.999 ** ((U - 1) / 2) < 0.0045 of the sum of their sizes, here at most 38 * 0.45. That is 0.002 in mu; as much
    again is for the end of the schedule. Weighing updates alike instead is off by 0.39 with windows, 0.17 with batches and
    0.03 with both.
    """
    options, updates = UPDATES[name]
    model = Shifted()
    model.log_scale.requires_grad_(False)
    result = seq.fit(model, seq.PriorGuide(model), one_long(), epochs={1: 150, 2: 100}.get(updates, 40), learning_rate=0.05,
                     warmup=0, averaging=0.0, progress=False, **options)
    assert result.history["updates"].iloc[-1] == updates * len(result.history)
    assert model.mu.item() == pytest.approx(20 / 38, abs=0.004) and model.log_scale.item() == 0


@pytest.mark.parametrize("name", UPDATES)
def test_the_mean_gradient_of_an_epoch_is_that_of_the_loss_per_frame(name, monkeypatch):
    options, updates = UPDATES[name]
    seen, step = [], torch.optim.AdamW.step

    def spied(self):
        seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    model = Shifted()
    guide = seq.PriorGuide(model)
    expected = torch.autograd.grad(seq.SequentialELBO().differentiable_loss(model, guide, one_long()) / 38, model.parameters())
    seq.fit(model, guide, one_long(), epochs=1, learning_rate=1e-30, clip=math.inf, progress=False, **options)
    assert len(seen) == updates
    for gradients, whole in zip(zip(*seen, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.stack(gradients).mean(0), whole, rtol=1e-12, atol=1e-12)


class Parts(seq.StateSpaceModel):
    """Parameters of each kind that Pyro stores in a way of its own."""

    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.tensor(0.5))
        self.scale = PyroParam(torch.tensor(0.7), constraints.positive)
        self.plain = nn.Linear(1, 1)
        self.nested = PyroModule()
        self.nested.shift = nn.Parameter(torch.tensor(0.3))

    def initial(self):
        return pyro.sample("z", dist.Normal(0.0, 1.0))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(self.own * z, self.scale))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(self.plain(z[..., None])[..., 0] + self.nested.shift, 1.0), obs=x)


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")  # Pyro, of plain modules, outside of fit
@pytest.mark.parametrize("how", ["fit", "SVI"])
@pytest.mark.parametrize("frozen", ["own", "scale_unconstrained", "plain.weight", "nested.shift"])
def test_frozen_parameters_stay_as_they_are(frozen, how):
    model, x = Parts(), torch.randn(4, 6) * 3
    model.get_parameter(frozen).requires_grad_(False)
    guide = seq.FilteringGuide(model, hidden=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if how == "fit":
        seq.fit(model, guide, x, epochs=2, weight_decay=0.5, averaging=0.5, progress=False)
    else:
        svi = SVI(model, guide, Adam({"lr": 0.1}), seq.SequentialELBO())
        for _ in range(3):
            svi.step(x)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {frozen}
    assert {name for name, p in model.named_parameters() if torch.equal(p, before[name])} == {frozen}


def test_weights_that_are_destroyed_by_the_last_update(monkeypatch, tmp_path):
    """The epoch is named, and the checkpoint keeps the one before."""
    update = training._Run._update

    def destroyed(run):
        update(run)
        if run.epoch == 1:
            run.parameters[0].data.fill_(math.inf)

    monkeypatch.setattr(training._Run, "_update", destroyed)
    with pytest.raises(ValueError, match="weights are not finite after epoch 2: a smaller learning_rate or weight_decay"):
        seq.fit(*pair(), data(), epochs=2, checkpoint=tmp_path / "run", progress=False)
    assert seq.restore(*pair(), tmp_path / "run").best_epoch == 1


def test_what_is_annealed_is_not_taken_for_the_bound():
    result = trained(kl_annealing=3, every=1)[0]
    assert list(result.history["kl_weight"][:3]) == pytest.approx([2 / 9, 5 / 9, 8 / 9])  # at the third of three batches
    assert list(result.history["kl_weight"][3:]) == [1, 1, 1]
    for annealing, loss, known in ((2, None, False), (1, None, True), (0, seq.SequentialELBO(kl_weight=0.5), False)):
        fit = seq.fit(*pair(), data(), epochs=2, kl_annealing=annealing, loss=loss, progress=False)
        assert fit.best_epoch == 2 and (fit.best == fit.history["train"].iloc[-1] if known else math.isnan(fit.best))


def test_patience_stops_and_the_best_weights_are_kept(monkeypatch, recorded):
    scores = iter([3.0, 2.0, 2.5, 2.0, 1.0])
    monkeypatch.setattr(training, "nats_per_frame", lambda *args: next(scores))
    model, guide = pair()
    result = seq.fit(model, guide, data(), valid=data(1), epochs=20, batch_size=20, averaging=0.0, patience=2, every=2,
                     progress=False)
    assert list(result.history["epoch"]) == [2, 4, 6, 8] and list(result.history["valid"]) == [3.0, 2.0, 2.5, 2.0]
    assert result.best_epoch == 4 and result.best == 2.0
    assert all(torch.equal(a, p) for a, p in zip(recorded[3]["weights"], (*model.parameters(), *guide.parameters())))


def test_evaluations_come_every_so_often_and_change_nothing():
    often, seldom = (trained(every=every) for every in (1, 4))
    assert list(often[0].history["epoch"]) == [1, 2, 3, 4, 5, 6] and list(seldom[0].history["epoch"]) == [4, 6]
    assert often[0].history["valid"].iloc[-1] == seldom[0].history["valid"].iloc[-1]
    model, guide = pair()
    alone = seq.fit(model, guide, data(), **{**OPTIONS, "every": 6})
    assert alone.best_epoch == 6 and alone.best == alone.history["train"].iloc[-1] == seldom[0].history["train"].iloc[-1]
    whole, parts = (trained(window=size)[0].history["updates"].iloc[-1] for size in (None, 2))
    lengths = data().lengths
    assert whole == 18
    assert parts == sum(len(windows(int(lengths[b].max()), 2)) for e in range(6) for b in bucketed(
        lengths, 5, epoch_generator(0, e)))


def test_parameters_of_others_in_pyros_store_are_left_alone():
    other = pyro.param("other", torch.ones(2))
    pair()[0].simulate([3])
    expected = trained()
    pyro.clear_param_store()
    assert same(trained(), expected) and torch.equal(other, torch.ones(2))


def test_training_lowers_the_bound():
    """Frames that alternate: a marginal model would need 3 log 2 nats."""
    x = torch.zeros(30, 8, 3)
    x[:15, ::2] = 1.0
    x[15:, 1::2] = 1.0
    model, guide = pair(make=VRNN, guide=VRNNInference)
    result = seq.fit(model, guide, x, epochs=60, batch_size=10, learning_rate=0.03, warmup=5, kl_annealing=5, progress=False)
    assert result.history["train"].iloc[-1] < 1.0 < 3 * math.log(2) < result.history["train"].iloc[0]


class Normalised(VRNNInference):
    """Its features have running moments, which belong to the weights of their epoch."""

    def __init__(self, model):
        super().__init__(model)
        self.normalise = nn.BatchNorm1d(4)

    def prepare(self, x, lengths):
        return self.normalise(super().prepare(x, lengths).transpose(1, 2)).transpose(1, 2)


def test_running_moments_are_kept_with_the_best_weights(monkeypatch, tmp_path):
    scores = iter([2.0, 3.0, 4.0])
    monkeypatch.setattr(training, "nats_per_frame", lambda *args: next(scores))
    kept = []
    evaluate = training._Run._evaluate

    def seen(run, *args):
        kept.append(run.guide.normalise.running_mean.clone())
        evaluate(run, *args)

    monkeypatch.setattr(training._Run, "_evaluate", seen)
    model, guide = pair(make=VRNN, guide=Normalised)
    seq.fit(model, guide, data(), valid=data(1), epochs=3, checkpoint=tmp_path / "run", progress=False)
    assert not torch.equal(kept[0], kept[2]) and torch.equal(guide.normalise.running_mean, kept[0])
    other, fresh = pair(1, make=VRNN, guide=Normalised)
    seq.restore(other, fresh, tmp_path / "run")
    assert torch.equal(fresh.normalise.running_mean, kept[0])


# Checkpoints.


@pytest.fixture
def checkpoint(tmp_path):
    trained(epochs=2, checkpoint=tmp_path / "run")
    return tmp_path / "run"


def damaged(content, how):
    return {"flipped": content[:2000] + bytes([content[2000] ^ 1]) + content[2001:], "half": content[:len(content) // 2],
            "header": content[:30], "longer": content + b"x", "empty": b"", "foreign": b"PK\x03\x04" + content}[how]


@pytest.mark.parametrize("how", ["flipped", "half", "header", "longer", "empty", "foreign"])
def test_damaged_checkpoints_are_refused(how, checkpoint):
    checkpoint.write_bytes(damaged(checkpoint.read_bytes(), how))
    says = "is damaged.*checksum" if how in ("flipped", "half", "header", "longer") else "is not a checkpoint of pyro_seq"
    model, guide = pair(4)
    before = copy.deepcopy(model.state_dict())
    for use in (lambda: seq.restore(model, guide, checkpoint), lambda: trained(model, guide, epochs=2, checkpoint=checkpoint)):
        with pytest.raises(ValueError, match=says):
            use()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def refusal(kind, says, use):
    with pytest.raises(kind, match=says):
        use()


def test_checkpoints_of_other_runs_are_refused(checkpoint, tmp_path):
    for options, says in (({"learning_rate": 0.5}, r"other settings \(there, here\): {'learning_rate': \(0\.\d+, 0.5\)}"),
                          ({"loss": seq.SequentialELBO(3)}, "other settings.*'loss'"), ({"seed": 1}, r"'seed': \(0, 1\)"),
                          ({"normalise": "batch"}, r"'normalise': \('data', 'batch'\)}")):
        refusal(ValueError, says, lambda o=options: trained(**{"epochs": 2, "checkpoint": checkpoint, **o}))
    model, guide = pair()
    flipped = seq.Sequences({"x": 1 - data().x["x"]}, data().lengths)
    refusal(ValueError, "other settings.*'data'", lambda: seq.fit(
        model, guide, flipped, valid=data(1, 6), also={"test": data(2, 5)}, **{**OPTIONS, "epochs": 2}, checkpoint=checkpoint))
    for other, what in ((VRNN(3, 2, 4), VRNNInference), (SRNN(3, 2, 5), SRNNInference)):
        before = copy.deepcopy(other.state_dict())
        refusal(ValueError, "of another model than this (VRNN|SRNN): it has .*here", lambda o=other, g=what: seq.restore(
            o, g(o), checkpoint))
        assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())
    model = SRNN(3, 2, 4)
    before = copy.deepcopy(model.state_dict())
    refusal(ValueError, "of another guide than this SRNNInference", lambda: seq.restore(
        model, SRNNInference(model, smoothing=False), checkpoint))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    refusal(FileNotFoundError, "there is no checkpoint", lambda: seq.restore(model, SRNNInference(model), tmp_path / "none"))
    save_checkpoint(tmp_path / "other", {"weights": torch.ones(2)})
    refusal(ValueError, r"was not written by fit: it holds \['weights'\]", lambda: seq.restore(
        model, SRNNInference(model), tmp_path / "other"))


def test_a_checkpoint_from_before_the_first_evaluation(tmp_path, monkeypatch):
    save = training._Run.save

    def interrupted(run, path):
        save(run, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(training._Run, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(checkpoint=tmp_path / "run")
    refusal(ValueError, "stands at epoch 1 and is first evaluated after epoch 2", lambda: seq.restore(
        *pair(), tmp_path / "run"))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_checkpoint_runs_nothing(tmp_path):
    buffer = io.BytesIO()
    torch.save({"settings": Bomb(tmp_path / "ran")}, buffer)
    body = buffer.getvalue()
    (tmp_path / "bomb").write_bytes(b"pyro_seq checkpoint 1\n" + hashlib.sha256(body).digest() + body)
    refusal(ValueError, "holds more than tensors, numbers, strings.*None of it was run", lambda: seq.restore(
        *pair(), tmp_path / "bomb"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_checkpoint_is_written_whole_or_not_at_all(fails, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "run", {"epoch": 1})

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, fails, full)
        refusal(OSError, "No space left", lambda: save_checkpoint(tmp_path / "run", {"epoch": 2, "w": torch.ones(1000)}))
    assert load_checkpoint(tmp_path / "run") == {"epoch": 1} and list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_numbers_of_numpy_in_the_options(tmp_path):
    model, guide = pair()
    for _ in range(2):
        seq.fit(model, guide, data(), epochs=np.int64(1), window=np.int32(9), learning_rate=np.float64(1e-3),
                clip=np.float32(2.0), progress=False, checkpoint=tmp_path / "run")
    assert seq.restore(model, guide, tmp_path / "run").best_epoch == 1


# Several processes.

PROCESSES = """
import sys, zlib, torch
import pyro_seq as seq
from pyro_seq.engine import loop, sites
from pyro_seq.fit.parallel import launched, rank, world_size
from pyro_seq.models import DeepMarkovModel, StructuredInference

torch.set_default_dtype(torch.float64)

def draw(fn, name, frame):  # noise that belongs to the sequence, whatever process has it
    rows = []
    for b in frame.sequence.tolist():
        key = zlib.crc32(frame.whole.x["x"][b, 0].numpy().tobytes() + name.encode()) + int(frame.t)
        rows.append(torch.randn(2, generator=torch.Generator().manual_seed(key)))
    return fn.base_dist.loc + fn.base_dist.scale * torch.stack(rows)

sites.draw = loop.draw = draw
generator = torch.Generator().manual_seed(0)
x = torch.randn(7, 9, 3, generator=generator)
lengths = torch.tensor([9, 2, 5, 7, 1, 9, 4])
with launched(torch.device("cpu")):
    torch.manual_seed(rank() + 1 if "--differ" in sys.argv else 1)  # the first one's weights are everyone's
    model = DeepMarkovModel(3, 2, 4, 5, emission="normal")
    guide = StructuredInference(model, reads="both", hidden=4)
    seen = []
    step = torch.optim.AdamW.step
    def spied(self, *args, **kwargs):
        seen.append([None if p.grad is None else p.grad.clone() for p in self.param_groups[0]["params"]])
        return step(self, *args, **kwargs)
    torch.optim.AdamW.step = spied
    result = seq.fit(model, guide, seq.Sequences.of(x, lengths), valid=x[:3], epochs=3, batch_size=3, window=3,
                     weight_decay=0.1, averaging=0.5, kl_annealing=2, learning_rate=0.02, progress=False)
    torch.save({"world": world_size(), "gradients": seen, "train": result.history["train"].tolist(),
                "weights": [p.detach() for p in (*model.parameters(), *guide.parameters())]}, f"{sys.argv[1]}-{rank()}")
"""


def launch(script, arguments, world):
    """As torchrun would: one process a rank, told so by the environment."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
              "WORLD_SIZE": str(world)}
    running = [subprocess.Popen([sys.executable, script, *arguments], env={**shared, "RANK": str(rank)},
                                stderr=subprocess.PIPE, text=True) for rank in range(world)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def test_two_processes_train_as_one(tmp_path):
    """Shards are uneven, the last batch has one sequence for two processes, and short ones end windows early."""
    script = tmp_path / "script.py"
    script.write_text(PROCESSES)
    launch(script, [str(tmp_path / "one")], 1)
    launch(script, [str(tmp_path / "two"), "--differ"], 2)
    one, *two = (torch.load(tmp_path / name) for name in ("one-0", "two-0", "two-1"))
    assert (one["world"], two[0]["world"]) == (1, 2) and len(one["gradients"]) > 10
    for other in two:
        for first, second in zip(one["gradients"], other["gradients"], strict=True):
            for a, b in zip(first, second, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        for a, b in zip(one["weights"], other["weights"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        assert other["train"] == pytest.approx(one["train"], abs=1e-10)


# Evaluation.


class Notes(seq.SequentialModel):
    """Each note a Markov chain of its own, counted; before the first frame there is silence."""

    def __init__(self, train):
        super().__init__()
        on, total = torch.full((2, train[0].shape[-1]), 0.5), torch.ones(2, train[0].shape[-1])
        for song in train:
            before = torch.cat([torch.zeros_like(song[:1]), song[:-1]])
            for value in (0, 1):
                on[value] += ((before == value) & (song == 1)).sum(0)
                total[value] += (before == value).sum(0)
        self.register_buffer("logits", torch.logit(on / total))

    def start(self, rows):
        return self.logits.new_zeros(rows, self.logits.shape[1])

    def step(self, before, x=None):
        logits = torch.where(before == 1, self.logits[1], self.logits[0])
        return pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


class IdleNotes(Notes):
    """The same, with a latent that says nothing."""

    def step(self, before, x=None):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        return super().step(before, x)


def songs(sequences):
    return [sequences.x["x"][b, :n] for b, n in enumerate(sequences.lengths.tolist())]


def counted(model, test):
    """``(all frames, by sequence, without the first)`` nats per frame, a song at a time."""
    parts = []
    for song in test:
        before = torch.cat([torch.zeros_like(song[:1]), song[:-1]])
        p = torch.sigmoid(torch.where(before == 1, model.logits[1], model.logits[0]))
        parts.append(-(song * p.log() + (1 - song) * (1 - p).log()).sum(1))
    return (torch.cat(parts).mean().item(), torch.stack([part.mean() for part in parts]).mean().item(),
            torch.cat([part[1:] for part in parts]).mean().item())


COLUMNS = ["nats per frame", "by sequence", "skip first"]


def test_the_protocol_of_evaluation():
    test = songs(data(3, 9)) + [frames(1, 3)]
    model, idle = Notes(songs(data(0, 9))), IdleNotes(songs(data(0, 9)))
    expected = counted(model, test)
    for rows in (2000, 7, 1):
        table = seq.evaluate(model, seq.PriorGuide(model), test, num_samples=3, num_particles=4, batch_rows=rows)
        assert list(table.index) == ["log likelihood"] and list(table["samples"]) == [0]
        assert table.loc["log likelihood", COLUMNS].tolist() == pytest.approx(expected, rel=1e-12)
        assert math.isnan(table.loc["log likelihood", "standard error"])
        # A latent that nothing depends on leaves the likelihood as it is, and makes bounds of it.
        table = seq.evaluate(idle, seq.PriorGuide(idle), test, num_samples=3, num_particles=4, batch_rows=rows)
        assert list(table.index) == ["ELBO", "particle bound"] and list(table["samples"]) == [3, 4]
        for row in table.index:
            assert table.loc[row, COLUMNS].tolist() == pytest.approx(expected, rel=1e-12)
        assert table.loc["ELBO", "standard error"] == pytest.approx(0, abs=1e-12)
        assert math.isnan(table.loc["particle bound", "standard error"])
    alone = seq.evaluate(model, seq.PriorGuide(model), [test[-1]])
    assert list(alone.index) == ["log likelihood"] and math.isnan(alone.loc["log likelihood", "skip first"])


def test_what_is_exact_is_called_so():
    """Of a model without latents the likelihood, unless it reads what is missing; a gap at the end is no such thing."""
    torch.manual_seed(0)
    for model in (seq.models.RecurrentNetwork(3, hidden=4), seq.models.CausalConvolution(3, hidden=4, dilations=(1, 2))):
        x = model.simulate([6, 4])["x"]
        exact = seq.ExactLikelihood(model).run(x, [6, 4]).total_log_evidence
        table = seq.evaluate(model, seq.PriorGuide(model), seq.Sequences.of(x, [6, 4]))
        assert list(table.index) == ["log likelihood"]
        assert table.loc["log likelihood", "nats per frame"] == pytest.approx(-exact / 10, rel=1e-6)
        observed = torch.ones(2, 6, 3, dtype=torch.bool)
        observed[0, 5] = False
        assert list(seq.evaluate(model, seq.PriorGuide(model), seq.Sequences.of(x, [6, 4], mask=observed)).index) == [
            "log likelihood"]
        observed[0, 2] = False
        assert list(seq.evaluate(model, seq.PriorGuide(model), seq.Sequences.of(x, [6, 4], mask=observed)).index) == [
            "ELBO", "particle bound"]


def test_padding_is_not_scored():
    """Padding changes nothing; taken for frames, it would make the numbers absurdly good."""
    test = songs(data(3, 9))
    lengths = torch.tensor([len(song) for song in test])
    model, guide = pair()
    chain = Notes(songs(data(0, 9)))
    right = []
    for declared, proposer in ((chain, seq.PriorGuide(chain)), (model, guide)):
        padded = nn.utils.rnn.pad_sequence(test, batch_first=True)
        longer = torch.cat([padded, torch.ones(9, 30, 3)], 1)
        tables = [seq.evaluate(declared, proposer, batch, num_samples=4, num_particles=4)
                  for batch in (test, seq.Sequences.of(padded, lengths), seq.Sequences.of(longer, lengths))]
        assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])
        right.append(tables[0]["nats per frame"].iloc[0])
    silent = torch.cat([nn.utils.rnn.pad_sequence(test, batch_first=True), torch.zeros(9, 30, 3)], 1)
    wrong = seq.evaluate(chain, seq.PriorGuide(chain), silent).loc["log likelihood", "nats per frame"]
    assert wrong < 0.85 * right[0]


def test_notes_of_bach(data_dir):
    """Per-note first-order Markov chains need 10.47 nats a frame on JSB; with its padding counted as frames, 6.03."""
    jsb = load_polyphonic("jsb", data_dir)
    model = Notes(songs(jsb.train))
    table = seq.evaluate(model, seq.PriorGuide(model), jsb.test)
    assert table.loc["log likelihood", COLUMNS].tolist() == pytest.approx(counted(model, songs(jsb.test)), rel=1e-10)
    assert table.loc["log likelihood", "nats per frame"] == pytest.approx(10.47, abs=0.01)
    padded = nn.utils.rnn.pad_sequence(songs(jsb.test), batch_first=True)
    wrong = seq.evaluate(model, seq.PriorGuide(model), padded)
    assert wrong.loc["log likelihood", "nats per frame"] < 0.6 * table.loc["log likelihood", "nats per frame"]


def test_both_bounds_of_the_same_model():
    """The standard error is that of repetitions (60 of them: 9%, five times that), and the particle bound is tighter."""
    model, guide = built("DMM", "own past")
    x = model.simulate([6, 3, 5])["x"]
    x = seq.Sequences.of(x, [6, 3, 5])
    model.train()
    state = torch.get_rng_state()
    tables = [seq.evaluate(model, guide, x, num_samples=10, num_particles=0, seed=s) for s in range(60)]
    assert torch.equal(torch.get_rng_state(), state) and model.training
    means = torch.tensor([t.loc["ELBO", "nats per frame"] for t in tables])
    stated = torch.tensor([t.loc["ELBO", "standard error"] for t in tables]).square().mean().sqrt()
    assert means.std() / stated == pytest.approx(1, abs=0.45)
    exact = -seq.ParticleFilter(model, 5000, num_runs=10).run(x).log_evidence.sum().item() / 14
    table = seq.evaluate(model, guide, x, num_samples=2000, num_particles=500)
    elbo, particles = table["nats per frame"]
    assert exact - 0.01 < particles < elbo + 5 * table.loc["ELBO", "standard error"]
    assert particles == pytest.approx(exact, abs=0.05)
    assert seq.evaluate(model, guide, x, seed=1).equals(seq.evaluate(model, guide, x, seed=1))


@pytest.mark.parametrize("runs", [1, 4])
def test_the_evidence_of_steps_sums_to_that_of_sequences(runs):
    model, guide = built("SRNN", "own filtering")
    x = frames(3, 6, 3)
    found = seq.ParticleFilter(model, 20, num_runs=runs, guide=guide, ess_threshold=0.9).run(x, [6, 1, 4])
    torch.testing.assert_close(found.log_evidence_by_step.sum(1), found.log_evidence)
    torch.testing.assert_close(found.log_evidence_by_step[1, 1:], torch.zeros(5), rtol=0, atol=1e-12)


# Commands.


def write_npz(folder, seed=0):
    """Three splits of short songs on five keys, as the data folder has them."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, 12, 24)
    rolls = np.zeros((lengths.sum(), 88), np.uint8)
    rolls[:, 40:45] = generator.random((lengths.sum(), 5)) < 0.4
    (folder / "polyphonic").mkdir(parents=True)
    np.savez(folder / "polyphonic" / "jsb_chorales.npz", rolls=np.packbits(rolls, axis=1), lengths=lengths,
             split=np.repeat([0, 1, 2], 8), split_names=np.array(["train", "valid", "test"]), low_midi=21, n_notes=88)


FIT = ["fit", "--model", "dmm", "--model-option", "latent=2", "--model-option", "hidden=4", "--model-option",
       "emission_hidden=4", "--guide-option", "hidden=4", "--epochs", "2", "--batch-size", "3", "--samples", "2",
       "--particles", "4"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_npz(tmp_path / "data")
    monkeypatch.setenv("PYRO_SEQ_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    return tmp_path


def test_fit_and_evaluate_from_the_command_line(folder, capsys):
    assert main([*FIT, "--seeds", "0", "3"]) == 0
    first = capsys.readouterr().out
    assert "dmm with guide own on jsb, test split" in first and "particle bound" in first and "std over seeds" in first
    run = folder / "runs" / "jsb-dmm-own"
    assert sorted(path.name for path in run.iterdir()) == ["seed-0.ckpt", "seed-0.csv", "seed-3.ckpt", "seed-3.csv",
                                                           "settings.json"]
    history = pd.read_csv(run / "seed-3.csv")
    assert list(history.columns) == ["epoch", "updates", "seconds", "kl_weight", "train", "valid"]
    assert list(history["epoch"]) == [1, 2]
    assert main(["evaluate", str(run), "--samples", "2", "--particles", "4"]) == 0
    assert capsys.readouterr().out == first
    assert main([*FIT, "--seeds", "0", "3"]) == 0  # nothing is left to do, and the same comes out
    assert capsys.readouterr().out == first
    assert main(["evaluate", str(run), "--split", "valid", "--particles", "0"]) == 0
    out = capsys.readouterr().out
    assert "valid split" in out and "particle bound" not in out


@pytest.mark.parametrize("model", ["dmm", "dmm-aug", "vrnn", "srnn"])
@pytest.mark.parametrize("guide", ["own", "filtering", "smoothing", "avf"])
def test_every_model_with_every_guide_from_the_command_line(model, guide, folder, capsys):
    options = ["--model-option", "latent=2", "--model-option", "hidden=4"]
    options += [] if guide == "own" else ["--guide-option", "hidden=4"]
    assert main(["fit", "--model", model, "--guide", guide, "--epochs", "1", "--output", "run", "--samples", "1",
                 "--particles", "2", "--window", "4", "--kl-annealing", "0", "--patience", "3", *options]) == 0
    assert f"{model} with guide {guide}" in capsys.readouterr().out


def test_fit_on_a_folder_of_midi_files(folder, capsys):
    mido = pytest.importorskip("mido")
    (folder / "midi").mkdir()
    for name in range(5):
        song = mido.MidiFile(ticks_per_beat=480)
        song.tracks.append(mido.MidiTrack([mido.Message("note_on", note=60 + name, time=0),
                                           mido.Message("note_off", note=60 + name, time=960 + 480 * name)]))
        song.save(folder / "midi" / f"{name}.mid")
    assert main([*FIT, "--data", "midi", "--guide", "own"]) == 0
    assert "on midi, test split" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, says", [
    ([*FIT, "--data", "bach"], "no polyphonic data set 'bach': choose among"),
    ([*FIT, "--model-option", "layers=3"], r"['layers'] is not an option of DeepMarkovModel"),
    ([*FIT, "--guide-option", "reads='present'"], "reads='present'; it is 'past'"),
    ([*FIT, "--guide", "avf", "--guide-option", "cell=tcn"], "cell='tcn'"),
    ([*FIT, "--model-option", "latent=-1"], "latent=-1; it is at least 1"),
    ([*FIT, "--epochs", "0"], "epochs=0; it is at least 1"),
    ([*FIT, "--averaging", "1"], "averaging=1.0; it is the decay of an average"),
    ([*FIT, "--seeds", "-1"], "seed=-1; it is at least 0"),
    ([*FIT, "--learning-rate", "1e30"], "learning_rate=1e+30; it is about what an update of Adam moves a weight by"),
    ([*FIT, "--samples", "0"], "samples=0; it is at least 1"),
    ([*FIT, "--particles", "-3"], "particles=-3; it is at least 0"),
    ([*FIT, "--device", "foo"], "--device foo: it is cpu, cuda, or one GPU of several"),
    ([*FIT, "--device", "cuda:99"], "--device cuda:99: torch finds"),
    ([*FIT, "--guide-option", "residual=maybe"], "residual='maybe' for StructuredInference; it is True or False"),
    ([*FIT, "--output", "file"], "--output file is a file; it is the folder of the run"),
    (["evaluate", "nothing"], "nothing has no settings.json: it is not a folder that `pyro-seq fit` made"),
    (["evaluate", "file"], "file has no settings.json: it is not a folder that `pyro-seq fit` made"),
    (["evaluate", "nothing", "--device", "foo"], "--device foo: it is"),
])
def test_mistakes_on_the_command_line(arguments, says, folder, capsys):
    (folder / "file").touch()
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("pyro-seq: ") and says in message and "Traceback" not in message
    if says.startswith(("no polyphonic", "samples", "particles", "--device")):
        assert not (folder / "runs").exists()


@pytest.mark.parametrize("arguments, says", [
    ([*FIT, "--model-option", "latent"], "'latent' is not NAME=VALUE"), ([*FIT, "--model-option", "=2"], "not NAME=VALUE"),
    (["fit", "--model", "lstm"], "invalid choice: 'lstm'"), ([*FIT, "--epochs", "many"], "invalid int value"),
    (["evaluate"], "required: folder"), ([], "required: command")])
def test_arguments_that_cannot_be_parsed(arguments, says, folder, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and says in capsys.readouterr().err


def test_a_folder_belongs_to_one_run(folder, capsys):
    extra = ["--output", "run", "--model-option", "emission='bernoulli'"]
    assert main([*FIT, *extra]) == 0
    assert main([*FIT, *extra, "--epochs", "3"]) == 2
    assert "run holds a run with other settings: training.epochs is 2 there, 3 here. Use" in capsys.readouterr().err
    (folder / "run" / "seed-best.ckpt").touch()  # not one of ours
    assert main(["evaluate", "run", "--samples", "1", "--particles", "0"]) == 0
    (folder / "run" / "seed-0.ckpt").write_bytes(b"")
    assert main(["evaluate", "run"]) == 2
    assert "is not a checkpoint of pyro_seq" in capsys.readouterr().err
    (folder / "run" / "seed-0.ckpt").unlink()
    assert main(["evaluate", "run"]) == 2
    assert "holds no checkpoint seed-N.ckpt yet" in capsys.readouterr().err
    for text, says in (("{", "settings.json is damaged"), ("{}", "is not as `pyro-seq fit` writes it"), ("[]", "is not as")):
        (folder / "run" / "settings.json").write_text(text)
        assert main(["evaluate", "run"]) == 2
        assert says in capsys.readouterr().err


def test_data_that_have_changed_since(folder, capsys):
    """By one note of the test split, which the checkpoint knows nothing of."""
    assert main([*FIT, "--output", "run"]) == 0
    path = folder / "data" / "polyphonic" / "jsb_chorales.npz"
    found = dict(np.load(path))
    found["rolls"][-1, 5] ^= 16
    np.savez(path, **found)
    capsys.readouterr()
    assert main(["evaluate", "run"]) == 2
    assert "those that run was trained on: the checksums of ['test'] differ. Bring" in capsys.readouterr().err
    assert main([*FIT, "--output", "run"]) == 2
    message = capsys.readouterr().err
    assert "other settings: checksums.test is" in message and "train" not in message


def test_a_mistaken_option_leaves_the_folder_usable(folder):
    for wrong in (["--epochs", "0"], ["--model-option", "latent=-1"]):
        assert main([*FIT, *wrong]) == 2
    assert main(FIT) == 0


def test_a_folder_with_the_name_of_a_data_set(folder, capsys):
    (folder / "jsb").mkdir()
    assert main(FIT) == 0
    assert "on jsb, test split" in capsys.readouterr().out
    assert main([*FIT, "--data", "./jsb"]) == 2


def test_a_run_of_the_folder_one_stands_in_has_its_name(folder, monkeypatch):
    claimed = []
    monkeypatch.setattr(commands, "_load", lambda name: load_polyphonic("jsb"))
    monkeypatch.setattr(commands, "_claim", lambda where, settings: claimed.append(where.name) or refuse())
    assert main([*FIT, "--data", "."]) == 2
    assert claimed == [f"{folder.name}-dmm-own"]


def refuse():
    raise ValueError


def test_help_says_each_default_once(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "(default: runs/DATA-MODEL-GUIDE) (default" not in out
    assert "--schedule {cosine,constant}" in out and "--normalise {data,batch}" in out


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_run_with_a_line(number, status, folder, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(commands, "_load", lambda name: (os.kill(os.getpid(), number), time.sleep(5)))
    keyboard = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
    try:
        assert main(FIT) == status
    finally:
        signal.signal(signal.SIGINT, keyboard)
    assert "interrupted: the same command goes on from the last checkpoint" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def command(output, *options, kill_after=None):
    """``python -m pyro_seq fit`` in its own process, killed after so many epochs and a while."""
    arguments = [sys.executable, "-m", "pyro_seq", "fit", "--output", str(output), "--samples", "1", "--particles", "0",
                 *options]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    if kill_after is not None:
        path, begun = output / "seed-0.ckpt", time.monotonic()
        while not path.exists() and process.poll() is None and time.monotonic() < begun + 120:
            time.sleep(0.01)
        time.sleep(kill_after)
        process.send_signal(signal.SIGKILL)
    out, _ = process.communicate(timeout=400)
    assert process.returncode == (0 if kill_after is None else -signal.SIGKILL), out
    return out.splitlines()[-4:]


def kill_and_compare(folder, options, waits):
    whole = command(folder / "whole", *options)
    for wait in waits:
        command(folder / "parts", *options, kill_after=wait)
    assert command(folder / "parts", *options) == whole
    first, second = (load_checkpoint(folder / name / "seed-0.ckpt") for name in ("whole", "parts"))
    assert all(torch.equal(first[part][k], second[part][k]) for part in ("model", "guide") for k in first[part])
    assert all(torch.equal(a, b) for a, b in zip(first["best"]["weights"], second["best"]["weights"], strict=True))
    tables = [pd.read_csv(folder / name / "seed-0.csv").drop(columns="seconds") for name in ("whole", "parts")]
    assert tables[0].equals(tables[1])


def test_a_process_that_is_killed_goes_on_to_the_same_numbers(folder):
    kill_and_compare(folder, [*FIT[1:-8], "--epochs", "40", "--kl-annealing", "5"], [0.15])


@pytest.mark.slow
def test_a_process_that_is_killed_on_bach(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_SEQ_DATA", str(data_dir))
    kill_and_compare(tmp_path, ["--model", "srnn", "--model-option", "latent=4", "--model-option", "hidden=8", "--epochs", "3",
                                "--window", "40"], [0.7, 1.9])


# Mistakes.


class Endless(LocalLevel):
    """Its bound is finite and its gradient is not."""

    def __init__(self):
        super().__init__(0.0, 1.0, 0.1, 1.0)
        self.zero = nn.Parameter(torch.zeros(()))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z + 0 * self.zero.abs().sqrt(), 1.0), obs=x)


class Loose(LocalLevel):
    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z + pyro.param("shift", torch.zeros(())), 1.0), obs=x)


def fit_with(**options):
    return lambda: seq.fit(*pair(), data(), **{"epochs": 1, "progress": False, **options})


def fit_level(make):
    model = make()
    return seq.fit(model, seq.FilteringGuide(model, like=torch.randn(4, 5), hidden=4), torch.randn(4, 5), epochs=1,
                   progress=False)


def broken():
    model, guide = pair()
    model.prior[0].weight.data[0, 0] = torch.nan
    return model, guide


MISTAKES = {
    "model and guide exchanged": (TypeError, "guide is a SRNN; fit takes a SequentialGuide", lambda: seq.fit(
        pair()[1], pair()[0], data())),
    "guide of another model": (ValueError, "the guide was made for another SRNN", lambda: seq.fit(
        pair()[0], pair()[1], data())),
    "guide's class": (TypeError, "not the class SRNNInference: make one", lambda: seq.fit(pair()[0], SRNNInference, data())),
    "no data": (ValueError, "batch or the time dimension is empty", lambda: seq.fit(*pair(), torch.zeros(0, 3, 3))),
    "scalars for vectors": (ValueError, r"'x' has shape \(4, 5\); SRNN has frames of 3 entries, \(B, T, 3\)",
                            lambda: seq.fit(*pair(), frames(4, 5), epochs=1, progress=False)),
    "images for vectors": (ValueError, r"shape \(4, 5, 3, 3\); SRNN has frames of 3 entries", lambda: seq.fit(
        *pair(), frames(4, 5, 3, 3), epochs=1, progress=False)),
    "sizes": (ValueError, "latent=0; it is at least 1", lambda: DeepMarkovModel(3, latent=0)),
    "sizes that are no numbers": (TypeError, "hidden='8' is not an integer", lambda: SRNN(3, hidden="8")),
    "size of a guide": (TypeError, "hidden=2.5 is not an integer", lambda: StructuredInference(
        DeepMarkovModel(3, 2, 4, 5), hidden=2.5)),
    "epochs": (ValueError, "epochs=0; it is at least 1", fit_with(epochs=0)),
    "batch size": (TypeError, "batch_size=2.5 is not an integer", fit_with(batch_size=2.5)),
    "window": (ValueError, "window=0; it is at least 1", fit_with(window=0)),
    "every": (ValueError, "every=0", fit_with(every=0)),
    "seed": (TypeError, "seed=None is not an integer", fit_with(seed=None)),
    "schedule": (ValueError, "schedule='step'; it is 'cosine' or 'constant'", fit_with(schedule="step")),
    "averaging": (ValueError, "averaging=1; it is the decay", fit_with(averaging=1)),
    "rate": (ValueError, "learning_rate=0 and clip=5.0 are positive", fit_with(learning_rate=0)),
    "rate that is NaN": (ValueError, "learning_rate=nan", fit_with(learning_rate=math.nan)),
    "clip": (ValueError, "clip=-1 are positive", fit_with(clip=-1)),
    "no clip": (TypeError, "clip=None is not a number; math.inf clips nothing", fit_with(clip=None)),
    "rate that is a word": (TypeError, "learning_rate='a' is not a number", fit_with(learning_rate="a")),
    "infinite rate": (ValueError, "learning_rate=inf; .* at most 1000", fit_with(learning_rate=math.inf)),
    "absurd rate": (ValueError, r"learning_rate=1e\+30; .* at most 1000", fit_with(learning_rate=1e30)),
    "decay": (ValueError, "weight_decay=inf; it is at least 0 and finite", fit_with(weight_decay=math.inf)),
    "normalise": (ValueError, "normalise='frames'; it is 'data' or 'batch'", fit_with(normalise="frames")),
    "list of data": (TypeError, "also is a list; it is data by name", fit_with(also=[data()])),
    "no training data": (TypeError, "train is None; it is the data", lambda: seq.fit(*pair(), None)),
    "nothing observed": (ValueError, "train has no observed entry: all of it is NaN or masked", lambda: seq.fit(
        *pair(), torch.full((2, 3, 3), torch.nan))),
    "nothing observed of integers": (ValueError, "test has no observed entry", fit_with(also={"test": seq.Sequences.of(
        torch.ones(2, 3, 3, dtype=torch.long), mask=torch.zeros(2, 3, 3, dtype=torch.bool))})),
    "folder for a checkpoint": (ValueError, "checkpoint='.' is a folder; it is the name of a file", fit_with(checkpoint=".")),
    "all frozen": (ValueError, "has parameters to train", lambda: (lambda m: (m.requires_grad_(False), seq.fit(
        m, seq.PriorGuide(m), torch.zeros(2, 3))))(Shifted())),
    "patience alone": (ValueError, "patience= counts evaluations on valid=, which was not given", fit_with(patience=2)),
    "loss": (TypeError, "loss is a Trace_ELBO; fit takes a SequentialELBO", fit_with(loss=pyro.infer.Trace_ELBO())),
    "name of a column": (ValueError, r"also= has the names \['train'\]", fit_with(also={"train": data()})),
    "weights that are NaN": (ValueError, "NaN|nan|not finite|constraint", lambda: seq.fit(*broken(), data(), epochs=1,
                                                                                          progress=False)),
    "gradient that is NaN": (ValueError, "gradient is nan at update 1, in epoch 1: a smaller learning_rate",
                             lambda: fit_level(Endless)),
    "loose parameters": (ValueError, r"\['shift'\] are pyro.param statements, which fit does not", lambda: fit_level(Loose)),
    "global parameters": (ValueError, r"Bayesian has the global parameters \['phi', 'noise'\]", lambda: fit_level(Bayesian)),
    "nothing to train": (ValueError, "neither Notes nor PriorGuide has parameters to train", lambda: (
        lambda m: seq.fit(m, seq.PriorGuide(m), data()))(Notes(songs(data())))),
    "evaluate another guide": (ValueError, "made for another SRNN", lambda: seq.evaluate(pair()[0], pair()[1], data())),
    "evaluate no samples": (ValueError, "num_samples=0; it is at least 1", lambda: seq.evaluate(
        *pair(), data(), num_samples=0)),
    "evaluate half a particle": (TypeError, "num_particles=0.5 is not an integer", lambda: seq.evaluate(
        *pair(), data(), num_particles=0.5)),
    "evaluate nothing": (ValueError, "empty", lambda: seq.evaluate(*pair(), torch.zeros(0, 3, 3))),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name):
    kind, says, program = MISTAKES[name]
    with pytest.raises(kind, match=says):
        program()


def test_an_error_leaves_the_loss_as_it_was():
    loss = seq.SequentialELBO()
    with pytest.raises(ValueError):
        seq.fit(*broken(), data(), epochs=1, kl_annealing=3, loss=loss, progress=False)
    assert loss.kl_weight == 1.0


def test_a_guide_that_shares_the_models_parameters_is_trained_once():
    class Sharing(VRNNInference):
        def __init__(self, model):
            super().__init__(model)
            self.shared = model.embed_x

    first, second = (pair(make=VRNN, guide=guide) for guide in (VRNNInference, Sharing))
    for model, guide in (first, second):
        pyro.clear_param_store()
        seq.fit(model, guide, data(), epochs=2, clip=0.1, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first[0].parameters(), second[0].parameters()))


def test_deep_markov_windows_leave_the_first_state_to_the_first_window(recorded):
    """z_0 has no gradient in later windows, and does not move there."""
    torch.manual_seed(0)
    model = DeepMarkovModel(3, 2, 4, 5)
    seq.fit(model, StructuredInference(model, hidden=4), frames(4, 6, 3), epochs=1, batch_size=4, window=3, progress=False)
    first, second = (seen["weights"][0] for seen in recorded)
    assert (first != 0).any() and torch.equal(first, second)


def test_sequences_move_whole():
    x = frames(2, 4, 3)
    x[0, 1] = torch.nan
    batch = seq.Sequences.of({"x": x, "k": torch.ones(2, 4, dtype=torch.long)}, [4, 2], mask={"k": torch.eye(2, 4) == 0},
                             covariates={"u": torch.ones(2, 4)})
    moved = batch.to(dtype=torch.float32)
    assert (moved.x["x"].dtype, moved.x["k"].dtype, moved.covariates["u"].dtype) == (torch.float32, torch.long, torch.float32)
    assert moved.has_missing and torch.equal(moved.lengths, batch.lengths) and torch.equal(
        moved.observed["k"], batch.observed["k"]) and torch.equal(moved.x["x"].isnan(), batch.x["x"].isnan())
    chosen = moved.select([1])
    assert chosen.x["x"].shape == (1, 2, 3) and chosen.observed["k"].tolist() == [[True, False]]
    assert chosen.covariates["u"].shape == (1, 2) and chosen.num_steps == 2
