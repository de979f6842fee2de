"""What a user gets wrong, and what the library says.

Each function below is a small program with one mistake in it. ``mistake`` registers it with the exception it must end
in, exactly ``ValueError`` or ``TypeError``, and with patterns that its message must contain: the site or argument, the
shapes where they matter, and the mend. With ``ways`` the same program is run by several methods, as a user may meet the
mistake in any of them.
"""

import re
from collections import namedtuple
from functools import partial

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.optim import Adam
from torch import nn

import pyro_seq as seq

B, T = 4, 6


# Ways to run a model on data, with a guide where there is one.


def call(model, x=None, lengths=None, guide=None, **inputs):
    return model(x, lengths, **inputs) if guide is None else guide(x, lengths, **inputs)


def trace_elbo(model, x=None, lengths=None, guide=None, **inputs):
    return Trace_ELBO().loss(model, guide or seq.PriorGuide(model), x, lengths, **inputs)


def sequential_elbo(model, x=None, lengths=None, guide=None, **inputs):
    return seq.SequentialELBO().loss(model, guide or seq.PriorGuide(model), x, lengths, **inputs)


def particle_filter(model, x=None, lengths=None, guide=None, **inputs):
    return seq.ParticleFilter(model, num_particles=5, guide=guide).run(x, lengths, **inputs)


def kalman_filter(model, x=None, lengths=None, **inputs):
    return seq.KalmanFilter(model).run(x, lengths, **inputs)


def variational(model, x=None, lengths=None, guide=None, **inputs):
    return seq.Variational(model, guide or seq.PriorGuide(model)).run(x, lengths, **inputs)


VARIATIONAL = variational
CALL, PYRO, BOUND, FILTER, KALMAN = (call, trace_elbo, sequential_elbo, particle_filter, kalman_filter)
SCORED = (PYRO, BOUND, FILTER)
EVERY = (CALL, *SCORED)

ROWS = []
Row = namedtuple("Row", "program kind says")


def mistake(kind, *says, ways=None, cuda=False):
    """Register a program that must end in ``kind``, its message containing each of the patterns ``says``.

    :param ways: methods that the program takes, one at a time, as its argument.
    """
    marks = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA") if cuda else ()

    def register(program):
        for way in ways or (None,):
            name = program.__name__ if way is None else f"{program.__name__}-{way.__name__}"
            row = Row(program if way is None else partial(program, way), kind, says)
            ROWS.append(pytest.param(row, id=name, marks=marks))
        return program

    return register


@pytest.mark.filterwarnings("ignore:a model from from_pyro replays its past")
@pytest.mark.parametrize("row", ROWS)
def test_mistake(row):
    with pytest.raises((ValueError, TypeError)) as caught:
        row.program()
    kind = type(caught.value)
    kind = kind.__base__ if kind.__module__.startswith("pyro_seq.") else kind
    assert kind is row.kind, f"{type(caught.value).__name__}: {caught.value}"
    message = str(caught.value)
    for pattern in row.says:
        assert re.search(pattern, message), f"no {pattern!r} in: {message}"


# Programs without a mistake, which the ones below are variations of.


class Level(seq.StateSpaceModel):
    """A random walk in noise, without parameters."""

    def initial(self):
        return pyro.sample("z", dist.Normal(0.0, 1.0))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(z, 0.5))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Walk(seq.StateSpaceModel):
    """Three latents, frames of two numbers, with parameters."""

    def __init__(self, name=""):
        super().__init__(name)
        self.loc = nn.Parameter(torch.zeros(3))
        self.scale = PyroParam(torch.ones(3), constraint=dist.constraints.positive)
        self.move, self.emit = nn.Linear(3, 3), nn.Linear(3, 2)

    def initial(self):
        return pyro.sample("z", dist.Normal(self.loc, self.scale).to_event(1))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(self.move(z), self.scale).to_event(1))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(self.emit(z), 1.0).to_event(1), obs=x)


class Recurrent(seq.SequentialModel):
    """A carried state of five numbers, a latent of three, frames of two."""

    def __init__(self, name=""):
        super().__init__(name)
        self.h0 = nn.Parameter(torch.zeros(5))
        self.prior, self.emit, self.cell = nn.Linear(5, 3), nn.Linear(8, 2), nn.GRUCell(5, 5)

    def start(self, rows):
        return self.h0.expand(rows, -1)

    def step(self, h, x=None):
        z, x = self.sample(h, x)
        return self.cell(torch.cat([z, x], -1), h)

    def sample(self, h, x):
        z = pyro.sample("z", dist.Normal(self.prior(h), 1.0).to_event(1))
        x = pyro.sample("x", dist.Normal(self.emit(torch.cat([h, z], -1)), 1.0).to_event(1), obs=x)
        return z, x


class Driven(Level):
    """A walk that a covariate of two numbers pushes."""

    def transition(self, z, u):
        return pyro.sample("z", dist.Normal(z + u.sum(-1), 0.5))


class Counts(Level):
    """Positive rates, observed as counts."""

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Poisson(z.exp()), obs=x)


class Coins(Level):
    """Observed as zeros and ones."""

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Bernoulli(logits=z), obs=x)


class Regimes(seq.StateSpaceModel):
    """A hidden Markov model of two states."""

    def initial(self):
        return pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))

    def transition(self, k):
        return pyro.sample("k", dist.Categorical(torch.tensor([[0.9, 0.1], [0.1, 0.9]])[k]))

    def emission(self, k, x=None):
        return pyro.sample("x", dist.Normal(k.to(torch.get_default_dtype()), 1.0), obs=x)


class Autoregression(seq.SequentialModel):
    """No latents at all."""

    def start(self, rows):
        return torch.zeros(rows)

    def step(self, before, x=None):
        return pyro.sample("x", dist.Normal(0.5 * before, 1.0), obs=x)


class Bayesian(Level):
    """A global parameter with a prior."""

    def __init__(self, name=""):
        super().__init__(name)
        self.phi = PyroSample(dist.Normal(0.5, 0.2))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(self.phi * z, 0.5))


class Halfway(seq.SequentialGuide):
    """A hand-written guide for Level."""

    def step(self, state, x=None):
        before = torch.zeros_like(x) if state is None else state
        pyro.sample("z", dist.Normal((before + x) / 2, 0.5))


def walk_by_hand(x, lengths=None):
    """A plain Pyro function for a level."""
    z = torch.zeros(())
    with pyro.plate("series", len(x)):
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 0.5))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


RIGHT = {
    "level": lambda run: run(Level(), torch.randn(B, T), [6, 2, 5, 1]),
    "level with a guide": lambda run: run(model := Level(), torch.randn(B, T), guide=Halfway(model)),
    "level with gaps": lambda run: run(Level(), gappy(torch.randn(B, T))),
    "walk": lambda run: run(Walk(), gappy(torch.randn(B, T, 2))),
    "recurrent": lambda run: run(Recurrent(), gappy(torch.randn(B, T, 2))),
    "driven": lambda run: run(Driven(), torch.randn(B, T), u=torch.randn(B, T, 2)),
    "counts": lambda run: run(Counts(), torch.ones(B, T)),
    "regimes": lambda run: run(Regimes(), torch.randn(B, T)),
    "autoregression": lambda run: run(Autoregression(), torch.randn(B, T)),
    "fence with gaps": lambda run: run(Fence(), gappy(torch.zeros(B, T))),
    "plain function": lambda run: run(seq.from_pyro(walk_by_hand), torch.randn(B, T)),
}


@pytest.mark.filterwarnings("ignore:a model from from_pyro replays its past")
@pytest.mark.parametrize("run", EVERY, ids=lambda run: run.__name__)
@pytest.mark.parametrize("program", RIGHT.values(), ids=RIGHT)
def test_without_the_mistake_it_runs(program, run):
    program(run)


def gappy(x):
    """Data with a missing entry and a missing frame."""
    x = x.clone()
    x[0, 2].reshape(-1)[-1] = torch.nan
    x[1, 3] = torch.nan
    return x


def steps(loss, *pairs):
    """One step of SVI for each of several models and guides, in one parameter store."""
    for model, guide in pairs:
        SVI(model, guide, Adam({"lr": 1e-3}), loss=loss).step(torch.randn(B, T, 2))


# Attributes.


def a_parameter_with_a_constraint(model, name):
    setattr(model, name, PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive))


def a_parameter(model, name):
    setattr(model, name, nn.Parameter(torch.tensor(1.0)))


def a_prior(model, name):
    setattr(model, name, PyroSample(dist.Normal(0.0, 1.0)))


def a_tensor(model, name):
    setattr(model, name, torch.tensor(1.0))


def a_network(model, name):
    setattr(model, name, nn.Linear(3, 3))


def a_buffer(model, name):
    model.register_buffer(name, torch.tensor(1.0))


ATTRIBUTES = (a_parameter_with_a_constraint, a_parameter, a_prior, a_tensor, a_network, a_buffer)


@mistake(ValueError, "Level", "'transition'", "one of its methods", "another name", ways=ATTRIBUTES)
def attribute_named_like_a_method(way):
    way(Level(), "transition")


@mistake(ValueError, "Recurrent", "'start'", "one of its methods", ways=ATTRIBUTES)
def attribute_named_like_the_start(way):
    way(Recurrent(), "start")


@mistake(ValueError, "Halfway", "'prepare'", "one of its methods", ways=ATTRIBUTES)
def guide_attribute_named_like_a_method(way):
    way(Halfway(Level()), "prepare")


# Lengths.


@mistake(ValueError, "lengths", "T = 6", "sequence 2", "length 9")
def lengths_too_long():
    Level()(torch.randn(B, T), [6, 6, 9, 6])


@mistake(ValueError, "lengths", "between 1 and", "sequence 1", "length 0")
def lengths_zero():
    particle_filter(Level(), torch.randn(B, T), [6, 0, 6, 6])


@mistake(ValueError, "lengths", "between 1 and", "sequence 3", "length -2")
def lengths_negative():
    sequential_elbo(Level(), torch.randn(B, T), torch.tensor([6, 6, 6, -2]))


@mistake(TypeError, "lengths", "float", "integers")
def lengths_float():
    kalman_filter(Level(), torch.randn(B, T), torch.tensor([6.0, 6.0, 5.0, 4.0]))


@mistake(ValueError, "lengths has 3 entries", "'x'", r"\(4, 6\)", "4 sequences")
def lengths_wrong_count():
    Level()(torch.randn(B, T), [6, 6, 6])


@mistake(ValueError, "lengths", r"\(4, 1\)", r"\(B,\)")
def lengths_of_two_dimensions():
    Level()(torch.randn(B, T), torch.full((B, 1), T))


@mistake(ValueError, "lengths", r"\[3, 5\]", r"\[3, 4\]", "leave lengths out")
def lengths_that_contradict_a_ragged_list():
    Level()([torch.randn(3), torch.randn(5)], [3, 4])


@mistake(TypeError, "lengths", "integers")
def lengths_none_in_a_list():
    Level()(torch.randn(B, T), [6, None, 6, 6])


@mistake(ValueError, "lengths", "sequence 0", "length 0")
def simulating_no_steps():
    Level().simulate([0])


@mistake(ValueError, "lengths", r"model\(lengths=")
def no_data_and_no_lengths():
    Level()()


# The data.


@mistake(ValueError, "'x'", r"\(0, 6\)", "batch", "empty")
def batch_of_zero_sequences():
    Level()(torch.zeros(0, T))


@mistake(ValueError, "'x'", r"\(4, 0\)", "time", "empty")
def zero_time():
    particle_filter(Level(), torch.zeros(B, 0))


@mistake(ValueError, "'x'", "single number", r"\(B, T, \.\.\.\)")
def single_number():
    Level()(3.0)


class Vectors(Level):
    """Frames that are vectors of one number."""

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z[:, None], 1.0).to_event(1), obs=x)


@mistake(ValueError, "site 'x'", r"shape \(1,\)", r"shape \(\)", r"\(B, T, 1\)", ways=EVERY)
def scalars_where_vectors_of_one_are_meant(run):
    run(Vectors(), torch.randn(B, T))


@mistake(ValueError, "'x'", r"\(1,\)", r"\(\)", r"\(B, T, 1\)")
def scalars_where_vectors_of_one_are_meant_kalman():
    kalman_filter(Vectors(), torch.randn(B, T))


@mistake(ValueError, "site 'x'", r"shape \(\)", r"shape \(1,\)", r"to_event|\[\.\.\., 0\]|squeeze", ways=EVERY)
def vectors_of_one_where_scalars_are_meant(run):
    run(Level(), torch.randn(B, T, 1))


@mistake(ValueError, "site 'x'", r"\(\)", r"\(1,\)", r"to_event|\[\.\.\., 0\]|squeeze")
def vectors_of_one_where_scalars_are_meant_kalman():
    kalman_filter(Level(), torch.randn(B, T, 1))


@mistake(ValueError, "site 'x'", r"\(2,\)", r"\(3,\)", ways=EVERY)
def frames_too_wide(run):
    run(Walk(), torch.randn(B, T, 3))


@mistake(ValueError, "'x'", "infinite", "sequence 2", "time 5", "NaN|mask")
def infinite_data():
    x = torch.randn(B, T, 2)
    x[2, 4, 1] = torch.inf
    Walk()(x)


@mistake(TypeError, "'x'", r"\['station'\]", "numeric", "encode")
def frame_with_a_column_of_words():
    frame = pd.DataFrame({"flow": np.arange(5.0), "station": list("abcde")})
    Walk()(frame)


@mistake(TypeError, "'x'", "Series", "numeric")
def series_of_words():
    Level()(pd.Series(["low", "high", "low"]))


@mistake(TypeError, "'x'", "str", "numeric")
def name_of_a_file():
    Level()("flow.csv")


@mistake(ValueError, "'x'", "different shapes", r"\(2,\)", r"\(3,\)")
def ragged_list_of_different_frames():
    Walk()([torch.randn(3, 2), torch.randn(5, 3)])


@mistake(ValueError, "'x'", r"sequences \[1\] are empty")
def ragged_list_with_an_empty_sequence():
    Level()([torch.randn(3), torch.randn(0), torch.randn(2)])


@mistake(TypeError, "'x'", "complex", "real and imaginary")
def complex_data():
    Level()(torch.randn(B, T, dtype=torch.complex64))


@mistake(ValueError, "data 'y'", "Level", r"\['x'\]", ways=EVERY)
def data_key_that_no_method_takes(run):
    run(Level(), {"y": torch.randn(B, T)})


@mistake(ValueError, "'b'", r"\(4, 5\)", r"\(4, 6|B, T")
def two_data_of_different_times():
    class Pair(Level):
        def emission(self, z, a=None, b=None):
            pyro.sample("a", dist.Normal(z, 1.0), obs=a)
            pyro.sample("b", dist.Normal(z, 1.0), obs=b)

    Pair()({"a": torch.randn(B, 6), "b": torch.randn(B, 5)})


@mistake(ValueError, "Sequences", "lengths", r"Sequences\.of")
def lengths_beside_a_sequences():
    Level()(seq.Sequences.of(torch.randn(B, T)), [6, 5, 4, 3])


@mistake(TypeError, "'x'", "float32", "float64", r"\.to\(", ways=EVERY)
def float32_data_on_a_float64_model(run):
    run(Walk(), torch.randn(B, T, 2).float())


@mistake(TypeError, "'x'", "float32", "float64", r"\.to\(", ways=EVERY)
def float64_data_on_a_float32_model(run):
    torch.set_default_dtype(torch.float32)
    run(Walk(), torch.randn(B, T, 2, dtype=torch.float64))


@mistake(TypeError, "'x'", "float32", "float64", r"\.to\(", ways=EVERY)
def float32_data_that_a_float64_model_reads_before_it_observes(run):
    class Encoding(Recurrent):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(2, 5)

        def step(self, h, x=None):
            h = h + self.embed(x)
            self.sample(h, x)
            return h

    run(Encoding(), torch.randn(B, T, 2).float())


@mistake(ValueError, "'x(_1)?'", "support", "sequence 2|-1", ways=SCORED)
def data_outside_the_support_at_the_first_time(run):
    x = torch.ones(B, T)
    x[2, 0] = -1.0
    run(Counts(), x)


@mistake(ValueError, "'x(_4)?'", "support|impossible", "time 4|x_4", ways=SCORED)
def data_outside_the_support_at_a_later_time(run):
    x = torch.ones(B, T)
    x[2, 3] = -1.0
    run(Counts(), x)


@mistake(ValueError, "'x(_4)?'", "support", "time 4|x_4", ways=SCORED)
def grey_pixels_on_a_bernoulli(run):
    x = torch.ones(B, T)
    x[2, 3] = 0.3
    run(Coins(), x)


@mistake(ValueError, "'x'", "cpu", "cuda", r"\.to\(", ways=EVERY, cuda=True)
def data_on_the_cpu_and_model_on_the_gpu(run):
    run(Walk().cuda(), torch.randn(B, T, 2))


@mistake(ValueError, "'x'", "cpu", "cuda", r"\.to\(", ways=EVERY, cuda=True)
def data_on_the_gpu_and_model_on_the_cpu(run):
    run(Walk(), torch.randn(B, T, 2).cuda())


@mistake(ValueError, "'x': 'cpu'|'x': 'cuda", "'u': 'meta'", "devices", r"\.to\(")
def data_and_covariate_on_two_devices():
    Driven()(torch.randn(B, T), u=torch.zeros(B, T, 2, device="meta"))


# Missing values.


@mistake(ValueError, "mask", r"\(4, 5\)", "'x'", r"\(4, 6\)")
def mask_of_wrong_shape():
    Level()(torch.randn(B, T), mask=torch.ones(B, T - 1, dtype=torch.bool))


@mistake(ValueError, "mask", r"\(4, 6, 3\)", r"\(4, 6, 2\)", "single entries")
def mask_of_too_wide_frames():
    Walk()(torch.randn(B, T, 2), mask=torch.ones(B, T, 3, dtype=torch.bool))


@mistake(ValueError, "mask", "entries other than 0 and 1", "'x'")
def mask_of_weights():
    Level()(torch.randn(B, T), mask=torch.full((B, T), 0.5))


@mistake(ValueError, "mask", "'y'", r"\['x'\]|'x'")
def mask_for_data_that_is_not_there():
    Level()({"x": torch.randn(B, T)}, mask={"y": torch.zeros(B, T, dtype=torch.bool)})


@mistake(ValueError, "'x'", "Independent", r"\(2, 2\)", "partly missing", "to_event|whole frame", ways=SCORED)
def partly_missing_multivariates_side_by_side(run):
    class Pairs(Level):
        def emission(self, z, x=None):
            loc = z[:, None, None].expand(-1, 2, 2)
            return pyro.sample("x", dist.MultivariateNormal(loc, torch.eye(2)).to_event(1), obs=x)

    run(Pairs(), gappy(torch.randn(B, T, 2, 2)))


@mistake(ValueError, "'x'", "MultivariateStudentT", r"\(2,\)", "partly missing", "whole frame", ways=SCORED)
def partly_missing_multivariate_student(run):
    class Heavy(Level):
        def emission(self, z, x=None):
            loc = z[:, None].expand(-1, 2)
            return pyro.sample("x", dist.MultivariateStudentT(torch.tensor(4.0), loc, torch.eye(2)), obs=x)

    run(Heavy(), gappy(torch.randn(B, T, 2)))


@mistake(ValueError, "RawRecurrence", "missing", r"x = pyro\.sample", ways=EVERY)
def missing_data_whose_raw_value_feeds_the_recurrence(run):
    class RawRecurrence(Recurrent):
        def step(self, h, x=None):
            z, _ = self.sample(h, x)
            return self.cell(torch.cat([z, x], -1), h)

    run(RawRecurrence(), gappy(torch.randn(B, T, 2)))


@mistake(ValueError, "'x'", "integer", "gaps", "obs=x", "NaN", ways=SCORED)
def whole_numbers_with_gaps_observed_through_a_function(run):
    class Shifted(Level):
        def emission(self, z, x=None):
            return pyro.sample("x", dist.Poisson(z.exp()), obs=None if x is None else x + 1)

    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 2] = False
    run(Shifted(), torch.ones(B, T, dtype=torch.long), mask=mask)


# Covariates.


@mistake(ValueError, r"Driven\.transition", "'u'", r"u=tensor \(B, T, \.\.\.\)", ways=(*EVERY, KALMAN))
def covariate_missing(run):
    run(Driven(), torch.randn(B, T))


@mistake(ValueError, "covariate 'v'", "Driven", "'u'", ways=(*EVERY, KALMAN))
def covariate_unknown(run):
    run(Driven(), torch.randn(B, T), u=torch.randn(B, T, 2), v=torch.randn(B, T))


@mistake(ValueError, "'u'", r"\(3, 6, 2\)", r"\(4, 6, \.\.\.\)")
def covariate_of_too_few_sequences():
    Driven()(torch.randn(B, T), u=torch.randn(3, T, 2))


@mistake(ValueError, "'u'", r"\(5, 6, 2\)", r"\(4, 6, \.\.\.\)")
def covariate_of_too_many_sequences():
    Driven()(torch.randn(B, T), u=torch.randn(5, T, 2))


@mistake(ValueError, "'u'", r"\(4, 5, 2\)", r"\(4, 6, \.\.\.\)")
def covariate_too_short():
    Driven()(torch.randn(B, T), u=torch.randn(B, T - 1, 2))


@mistake(ValueError, "'u'", r"\(4,\)|\(1, 4\)", r"\(4, 6, \.\.\.\)")
def covariate_without_time():
    Driven()(torch.randn(B, T), u=torch.randn(B))


@mistake(ValueError, "covariate 'u'", "NaN", "fill them|model them")
def covariate_with_gaps():
    Driven()(torch.randn(B, T), u=gappy(torch.randn(B, T, 2)))


@mistake(TypeError, "'u'", "NoneType", "numeric")
def covariate_none():
    Driven()(torch.randn(B, T), u=None)


@mistake(ValueError, "covariate 'flow'", "name of the data", "rename")
def covariate_named_like_the_data():
    Level()({"flow": torch.randn(B, T)}, flow=torch.randn(B, T))


@mistake(ValueError, "covariate 't'", "name of the time index", "rename")
def covariate_named_like_the_time():
    Level()(torch.randn(B, T), t=torch.arange(T))


@mistake(TypeError, "'u'", "float32", "float64", r"\.to\(", ways=SCORED)
def covariate_of_another_precision(run):
    class Pushed(Driven):
        def __init__(self):
            super().__init__()
            self.push = nn.Linear(2, 1)

        def transition(self, z, u):
            return pyro.sample("z", dist.Normal(z + self.push(u)[:, 0], 0.5))

    run(Pushed(), torch.randn(B, T), u=torch.randn(B, T, 2).float())


# The declaration.


@mistake(TypeError, "Empty", r"start\(self, rows\)", ways=EVERY)
def no_start(run):
    class Empty(seq.SequentialModel):
        def step(self, h, x=None):
            return h

    run(Empty(), torch.randn(B, T))


@mistake(TypeError, "Empty", r"step\(self, state, x=None\)", ways=EVERY)
def no_step(run):
    class Empty(seq.SequentialModel):
        def start(self, rows):
            return torch.zeros(rows, 1)

    run(Empty(), torch.randn(B, T))


@mistake(TypeError, "Empty", r"initial\(self\)", ways=(*EVERY, KALMAN))
def no_initial(run):
    class Empty(seq.StateSpaceModel):
        transition, emission = Level.transition, Level.emission

    run(Empty(), torch.randn(B, T))


@mistake(TypeError, "Empty", r"transition\(self, z\)", ways=(*EVERY, KALMAN))
def no_transition(run):
    class Empty(seq.StateSpaceModel):
        initial, emission = Level.initial, Level.emission

    run(Empty(), torch.randn(B, T))


@mistake(TypeError, "Empty", r"emission\(self, z, x=None\)", ways=(*EVERY, KALMAN))
def no_emission(run):
    class Empty(seq.StateSpaceModel):
        initial, transition = Level.initial, Level.transition

    run(Empty(), torch.randn(B, T))


@mistake(TypeError, "Level", "class", r"Level\(\)", ways=(BOUND, FILTER, KALMAN))
def class_instead_of_a_model(run):
    run(Level, torch.randn(B, T))


@mistake(TypeError, "Hasty", r"super\(\)\.__init__\(", ways=EVERY)
def constructor_that_forgets_the_parents(run):
    class Hasty(Level):
        def __init__(self):
            self.noise = 1.0

    run(Hasty(), torch.randn(B, T))


@mistake(ValueError, "Deaf", "data|'x'", "obs=", ways=(*EVERY, KALMAN))
def emission_that_forgets_obs(run):
    class Deaf(Level):
        def emission(self, z, x=None):
            return pyro.sample("x", dist.Normal(z, 1.0))

    run(Deaf(), torch.randn(B, T))


@mistake(ValueError, "Deaf", "'x'", "obs=", ways=(*EVERY, KALMAN))
def one_emission_of_two_forgets_obs(run):
    class Deaf(Level):
        def emission(self, z, x=None, y=None):
            pyro.sample("x", dist.Normal(z, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    run(Deaf(), {"x": torch.randn(B, T), "y": torch.randn(B, T)})


@mistake(ValueError, r"emission", r"\['x'\]", "x=None")
def simulate_where_the_data_has_no_default():
    class Strict(Level):
        def emission(self, z, x):
            return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    Strict().simulate([5, 5])


@mistake(ValueError, "site 'z'", "twice", ways=(*EVERY, KALMAN))
def same_site_twice_in_a_step(run):
    class Twice(Level):
        def transition(self, z):
            pyro.sample("z", dist.Normal(z, 0.5))
            return pyro.sample("z", dist.Normal(z, 0.5))

    run(Twice(), torch.randn(B, T))


class Renamed(Level):
    def initial(self):
        return pyro.sample("z0", dist.Normal(0.0, 1.0))


@mistake(ValueError, "'z'", "'z0'", "same", ways=(FILTER, KALMAN))
def initial_and_transition_under_two_names(run):
    run(Renamed(), torch.randn(B, T))


@mistake(ValueError, "'z'", "'z0'", "same", ways=(BOUND, FILTER))
def initial_and_transition_under_two_names_with_a_guide(run):
    class Both(seq.SequentialGuide):
        def step(self, state, x=None):
            pyro.sample("z0" if state is None else "z", dist.Normal(x, 1.0))

    model = Renamed()
    run(model, torch.randn(B, T), guide=Both(model))


@mistake(ValueError, "'jump'", "some steps only", "same sites", ways=(BOUND, FILTER))
def site_at_some_steps_only(run):
    class Jumping(Recurrent):
        def step(self, h, t, x=None):
            if bool((t > 2).all()):
                pyro.sample("jump", dist.Normal(0.0, 1.0))
            return super().step(h, x)

    run(Jumping(), torch.randn(B, T, 2))


@mistake(ValueError, "site 'z'", r"batch_shape \(3,\)", r"to_event\(1\)", ways=EVERY)
def extra_batch_dimension_in_initial(run):
    class Batched(Walk):
        def initial(self):
            return pyro.sample("z", dist.Normal(self.loc, self.scale))

    run(Batched(), torch.randn(B, T, 2))


@mistake(ValueError, "site 'z'", r"to_event\(1\)")
def extra_batch_dimension_as_large_as_the_batch():
    class Batched(Walk):
        def initial(self):
            return pyro.sample("z", dist.Normal(self.loc, self.scale))

        def transition(self, z):
            return pyro.sample("z", dist.Normal(self.move(z), self.scale))

    sequential_elbo(Batched(), torch.randn(3, T, 2))


@mistake(ValueError, "site 'x'", "poutine.scale", "kl_weight", ways=(FILTER, VARIATIONAL))
def tempered_emission(run):
    class Tempered(Walk):
        def emission(self, z, x=None):
            with poutine.scale(scale=0.5):
                return super().emission(z, x)

    run(Tempered(), torch.randn(B, T, 2))


@mistake(ValueError, "site 'x'", r"batch_shape \(\d+, 2\)", r"to_event\(1\)", ways=EVERY)
def extra_batch_dimension_in_emission(run):
    class Batched(Walk):
        def emission(self, z, x=None):
            return pyro.sample("x", dist.Normal(self.emit(z), 1.0), obs=x)

    run(Batched(), torch.randn(B, T, 2))


@mistake(ValueError, "site 'z'", r"batch_shape \(\d+, 3\)", r"to_event\(1\)", ways=EVERY)
def extra_batch_dimension_in_a_later_step(run):
    class Batched(Walk):
        def transition(self, z):
            return pyro.sample("z", dist.Normal(self.move(z), self.scale))

    run(Batched(), torch.randn(B, T, 2))


@mistake(ValueError, "site 'z'", "plate", "to_event", ways=EVERY)
def plate_inside_the_step(run):
    class Plated(Walk):
        def initial(self):
            with pyro.plate("entries", 3):
                return pyro.sample("z", dist.Normal(self.loc, self.scale))

    run(Plated(), torch.randn(B, T, 2))


@mistake(TypeError, "site 'z'", "distribution", ways=EVERY)
def number_instead_of_a_distribution(run):
    class Numeric(Level):
        def initial(self):
            return pyro.sample("z", torch.zeros(()))

    run(Numeric(), torch.randn(B, T))


@mistake(ValueError, "Growing", r"\(\d+, 5\)", r"\(\d+, 8\)", "shape", ways=EVERY)
def state_that_changes_shape(run):
    class Growing(Recurrent):
        def step(self, h, x=None):
            z, _ = self.sample(h[:, :5], x)
            return torch.cat([h, z], -1)

    run(Growing(), torch.randn(B, T, 2))


@mistake(ValueError, r"Flat\.start", r"\(5,\)", r"\(\d+, \.\.\.\)", "rows", ways=EVERY)
def start_without_rows(run):
    class Flat(Recurrent):
        def start(self, rows):
            return self.h0

    run(Flat(), torch.randn(B, T, 2))


@mistake(ValueError, "Mean", r"\(5,\)", r"\(\d+, \.\.\.\)", "rows", ways=EVERY)
def step_that_loses_the_rows(run):
    class Mean(Recurrent):
        def step(self, h, x=None):
            return super().step(h, x).mean(0)

    run(Mean(), torch.randn(B, T, 2))


@mistake(TypeError, "float", r"torch\.full\(\(rows,\), value\)", ways=EVERY)
def start_that_is_a_number(run):
    class Numeric(Autoregression):
        def start(self, rows):
            return 0.0

    run(Numeric(), torch.randn(B, T))


@mistake(TypeError, "int", r"torch\.full\(\(rows,\), value\)", ways=EVERY)
def state_with_a_number_inside(run):
    class Clock(Autoregression):
        def start(self, rows):
            return {"value": torch.zeros(rows), "time": 0}

        def step(self, state, x=None):
            return {"value": super().step(state["value"], x), "time": state["time"] + 1}

    run(Clock(), torch.randn(B, T))


@mistake(ValueError, "Forgetful", "step", "None", "return", ways=EVERY)
def step_that_returns_nothing(run):
    class Forgetful(Recurrent):
        def step(self, h, x=None):
            self.sample(h, x)

    run(Forgetful(), torch.randn(B, T, 2))


@mistake(ValueError, r"Forgetful\.initial", "None", "return", ways=(*EVERY, KALMAN))
def initial_that_returns_nothing(run):
    class Forgetful(Level):
        def initial(self):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    run(Forgetful(), torch.randn(B, T))


@mistake(ValueError, r"Forgetful\.transition", "None", "return", ways=(*EVERY, KALMAN))
def transition_that_returns_nothing(run):
    class Forgetful(Level):
        def transition(self, z):
            pyro.sample("z", dist.Normal(z, 0.5))

    run(Forgetful(), torch.randn(B, T))


@mistake(ValueError, "Counting", "state", "in place", "return", ways=SCORED)
def state_changed_in_place(run):
    class Counting(Recurrent):
        def start(self, rows):
            return torch.zeros(rows, 5)

        def step(self, h, x=None):
            self.sample(h, x)
            h += 1.0
            return h

    run(Counting(), torch.randn(B, T, 2))


@mistake(TypeError, "Remembering", "'last'", "state", ways=EVERY)
def state_kept_on_the_model(run):
    class Remembering(Recurrent):
        last = 0.0

        def step(self, h, x=None):
            z, x = self.sample(h + self.last, x)
            self.last = z.mean(-1, keepdim=True)
            return self.cell(torch.cat([z, x], -1), h)

    run(Remembering(), torch.randn(B, T, 2))


# Guides written by hand.


class Pair(Level):
    """A level and a slope."""

    def initial(self):
        return {"z": super().initial(), "slope": pyro.sample("slope", dist.Normal(0.0, 1.0))}

    def transition(self, state):
        slope = pyro.sample("slope", dist.Normal(state["slope"], 0.1))
        return {"z": super().transition(state["z"] + slope), "slope": slope}

    def emission(self, state, x=None):
        return super().emission(state["z"], x)


@mistake(ValueError, r"ForPairs\.step", "'slope'", r"\['z'\]", ways=SCORED)
def guide_that_misses_a_site(run):
    class ForPairs(Halfway):
        def step(self, state, x=None):
            super().step(None if state is None else state["z"], x)

    model = Pair()
    run(model, torch.randn(B, T), guide=ForPairs(model))


@mistake(ValueError, r"Generous\.step", r"\['slope'\]", "nothing else", ways=SCORED)
def guide_that_adds_a_site(run):
    class Generous(Halfway):
        def step(self, state, x=None):
            super().step(state, x)
            pyro.sample("slope", dist.Normal(torch.zeros_like(x), 1.0))

    model = Level()
    run(model, torch.randn(B, T), guide=Generous(model))


@mistake(ValueError, "site 'z'", r"\(\d+, 2\)", r"\(\d+, 3\)", ways=SCORED)
def guide_that_draws_the_wrong_shape(run):
    class Narrow(seq.SequentialGuide):
        def step(self, state, x=None):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    model = Walk()
    run(model, torch.randn(B, T, 2), guide=Narrow(model))


@mistake(ValueError, "site 'z'", r"to_event\(1\)", ways=SCORED)
def guide_that_forgets_to_event(run):
    class Batched(seq.SequentialGuide):
        def step(self, state, x=None):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 3), 1.0))

    model = Walk()
    run(model, torch.randn(B, T, 2), guide=Batched(model))


@mistake(TypeError, "Lazy", r"step\(self, state, x\)", ways=SCORED)
def guide_without_a_step(run):
    class Lazy(seq.SequentialGuide):
        pass

    model = Level()
    run(model, torch.randn(B, T), guide=Lazy(model))


@mistake(ValueError, r"Strict\.step", "'x'", "'flow'", ways=SCORED)
def guide_that_asks_for_the_data_under_another_name(run):
    class Flow(Level):
        def emission(self, z, flow=None):
            return pyro.sample("flow", dist.Normal(z, 1.0), obs=flow)

    class Strict(Halfway):
        def step(self, state, x):
            super().step(state, x)

    model = Flow()
    run(model, {"flow": torch.randn(B, T)}, guide=Strict(model))


@mistake(ValueError, r"prepare", r"\(4, 1\)", r"\(B, T, \.\.\.\)|\(4, 6, \.\.\.\)", ways=SCORED)
def guide_whose_encoding_has_no_time(run):
    class Averaged(seq.SequentialGuide):
        def prepare(self, x, lengths):
            return x.mean(1, keepdim=True)

        def step(self, state, encoding):
            pyro.sample("z", dist.Normal(encoding, 1.0))

    model = Level()
    run(model, torch.randn(B, T), guide=Averaged(model))


@mistake(TypeError, "encoding", "prepare", ways=SCORED)
def guide_that_asks_for_an_encoding_it_does_not_prepare(run):
    class Unprepared(seq.SequentialGuide):
        def step(self, state, encoding):
            pyro.sample("z", dist.Normal(encoding, 1.0))

    model = Level()
    run(model, torch.randn(B, T), guide=Unprepared(model))


@mistake(TypeError, "AutoNormal", "SequentialGuide", ways=(BOUND, FILTER))
def autoguide_as_the_guide(run):
    model = Level()
    run(model, torch.randn(B, T), guide=AutoNormal(model))


@mistake(TypeError, "Halfway", "class", r"Halfway\(model\)", ways=(BOUND, FILTER))
def class_instead_of_a_guide(run):
    run(Level(), torch.randn(B, T), guide=Halfway)


@mistake(ValueError, "another Level", "build it on the model", ways=(BOUND, FILTER))
def guide_of_another_model(run):
    run(Level(), torch.randn(B, T), guide=Halfway(Level()))


@mistake(ValueError, "another Level", "build it on the model")
def variational_with_the_guide_of_another_model():
    seq.Variational(Level(), Halfway(Level()), num_samples=5).run(torch.randn(B, T))


# Guides that learn.


@mistake(ValueError, "SmoothingGuide|FilteringGuide|Amortized", "frames of 2 numbers", "given 3", "like=", ways=SCORED)
def guide_built_for_another_width(run):
    class AnyWidth(Walk):
        def emission(self, z, x=None):
            width = 2 if x is None else x.shape[-1]
            return pyro.sample("x", dist.Normal(torch.zeros(width), 1.0).to_event(1), obs=x)

    model = AnyWidth()
    run(model, torch.randn(B, T, 3), guide=seq.FilteringGuide(model, hidden=4))


@mistake(ValueError, "'k'", "Categorical", "reparameteri[sz]able|pathwise", "FilteringGuide", ways=SCORED)
def avf_on_a_discrete_latent(run):
    model = Regimes()
    run(model, torch.randn(B, T), guide=seq.AmortizedVariationalFilter(model, hidden=4))


@mistake(ValueError, "Autoregression", "no latent site")
def avf_on_a_model_without_latents():
    seq.AmortizedVariationalFilter(Autoregression())


@mistake(ValueError, "'z'", "Uniform", "SequentialGuide|Normal")
def learned_guide_for_a_family_of_moving_support():
    class Boxed(Level):
        def transition(self, z):
            return pyro.sample("z", dist.Uniform(z - 1.0, z + 1.0))

        def initial(self):
            return pyro.sample("z", dist.Uniform(-1.0, 1.0))

    seq.FilteringGuide(Boxed())


@mistake(ValueError, "'z'", "Normal", "Laplace", "SequentialGuide")
def learned_guide_for_two_families_in_one_site():
    class Mixed(Level):
        def initial(self):
            return pyro.sample("z", dist.Laplace(0.0, 1.0))

    seq.FilteringGuide(Mixed())


@mistake(ValueError, "Walk|'x'", "obs=", ways=SCORED)
def learned_guide_for_a_model_that_forgets_obs(run):
    class Deaf(Walk):
        def emission(self, z, x=None):
            return pyro.sample("x", dist.Normal(self.emit(z), 1.0).to_event(1))

    model = Deaf()
    run(model, torch.randn(B, T, 2), guide=seq.FilteringGuide(model, like=torch.randn(B, T, 2), hidden=4))


@mistake(ValueError, "preset='fast'", "'default' or 'paper'")
def unknown_preset():
    seq.AmortizedVariationalFilter(Level(), preset="fast")


@mistake(ValueError, "iterations=0", "at least 1")
def avf_without_iterations():
    seq.AmortizedVariationalFilter(Level(), iterations=0)


@mistake(TypeError, "iterations=1.5", "integer|int")
def avf_with_half_an_iteration():
    seq.AmortizedVariationalFilter(Level(), iterations=1.5).free_energy(torch.randn(B, T))


@mistake(ValueError, "cell='transformer'", "'gru'", "'lstm'")
def unknown_cell():
    seq.FilteringGuide(Level(), cell="transformer")


@mistake(ValueError, "hidden", "at least|greater")
def no_hidden_units():
    seq.FilteringGuide(Level(), hidden=0)


@mistake(ValueError, "encoder=", "like=")
def encoder_without_data_to_size_it():
    seq.FilteringGuide(Walk(), encoder=nn.Linear(2, 4))


@mistake(ValueError, r"Driven", "'u'", "like=")
def learned_guide_of_a_model_with_covariates_without_data():
    seq.FilteringGuide(Driven())


@mistake(TypeError, "FilteringGuide", "function", "from_pyro")
def learned_guide_of_a_plain_function():
    seq.FilteringGuide(walk_by_hand)


@mistake(TypeError, "Level", "class", r"Level\(\)")
def learned_guide_of_a_class():
    seq.FilteringGuide(Level)


@mistake(ValueError, "FilteringGuide", "data")
def learned_guide_called_without_data():
    seq.FilteringGuide(Level(), hidden=4)(lengths=[5, 5])


@mistake(ValueError, "greedily", "Noisy", "dropout")
def greedy_guide_on_a_step_with_dropout():
    class Noisy(Walk):
        def __init__(self):
            super().__init__()
            self.emit = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))

    model = Noisy()
    guide = seq.AmortizedVariationalFilter(model, preset="paper", hidden=4)
    seq.SequentialELBO().loss(model, guide, torch.randn(B, T, 2))


# One parameter store.


@mistake(ValueError, "'(loc|scale|move|emit)", "Walk", "name=", ways=(PYRO, BOUND))
def two_models_of_one_name(run):
    first, second = Walk(), Walk()
    steps(Trace_ELBO() if run is PYRO else seq.SequentialELBO(), (first, seq.FilteringGuide(first, name="a", hidden=4)),
          (second, seq.FilteringGuide(second, name="b", hidden=4)))


@mistake(ValueError, "'FilteringGuide", "FilteringGuide", "name=", ways=(PYRO, BOUND))
def two_guides_of_one_name(run):
    model = Walk()
    steps(Trace_ELBO() if run is PYRO else seq.SequentialELBO(), (model, seq.FilteringGuide(model, hidden=4)),
          (model, seq.FilteringGuide(model, hidden=4)))


# Global parameters.


@mistake(ValueError, r"\['phi'\]", "global_guide=", "Halfway", ways=(PYRO, BOUND))
def global_parameters_without_a_guide(run):
    model = Bayesian()
    run(model, torch.randn(B, T), guide=Halfway(model))


@mistake(ValueError, r"\['phi'\]", "global_guide", ways=(PYRO, BOUND, FILTER))
def global_guide_that_misses_a_parameter(run):
    model = Bayesian()
    run(model, torch.randn(B, T), guide=Halfway(model, global_guide=lambda *args: None))


@mistake(ValueError, "'phi'", "Delta|pathwise", "Trace_ELBO|reparameteri[sz]ed")
def global_guide_without_a_gradient():
    class Chosen(Level):
        def __init__(self):
            super().__init__()
            self.phi = PyroSample(dist.Poisson(2.0))

        def transition(self, z):
            return pyro.sample("z", dist.Normal(self.phi * z, 0.5))

    model = Chosen()
    guide = Halfway(model, global_guide=lambda *args: pyro.sample("phi", dist.Poisson(1.0)))
    seq.SequentialELBO().loss(model, guide, torch.randn(B, T))


# Densities that are zero or not numbers.


class Fence(Level):
    """An emission that makes most data impossible."""

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Uniform(z - 30.0, z + 30.0), obs=x)


@mistake(ValueError, "5 particles", "time 4", "sequence 2", "impossible", "more particles|guide")
def impossible_data_in_the_particle_filter():
    x = torch.zeros(B, T)
    x[2, 3] = 1e6
    particle_filter(Fence(), x)


@mistake(ValueError, "'x'", "time 4", "sequence 2", "not finite|support")
def impossible_data_in_the_bound():
    x = torch.zeros(B, T)
    x[2, 3] = 1e6
    sequential_elbo(Fence(), x)


@mistake(ValueError, "'x'", "time 1", "sequence 2", ways=(BOUND, FILTER))
def impossible_data_at_the_first_time(run):
    x = torch.zeros(B, T)
    x[2, 0] = 1e6
    run(Fence(), x)


@mistake(ValueError, "log weight", "sequence 2", "density is zero")
def impossible_data_in_the_variational_posterior():
    model, x = Fence(), torch.zeros(B, T)
    x[2, 3] = 1e6
    seq.Variational(model, Halfway(model), num_samples=5).run(x)


@mistake(ValueError, "scale", "Normal", "positive|GreaterThan", ways=(*SCORED, KALMAN))
def negative_scale(run):
    class Negative(Level):
        def emission(self, z, x=None):
            return pyro.sample("x", dist.Normal(z, -1.0), obs=x)

    run(Negative(), torch.randn(B, T))


@mistake(ValueError, "'x'|after site 'z'", "time 3|time 4", "scale", ways=(BOUND, FILTER))
def scale_that_becomes_negative(run):
    class Shrinking(Level):
        def emission(self, z, t, x=None):
            return pyro.sample("x", dist.Normal(z, 2.5 - t), obs=x)

    run(Shrinking(), torch.randn(B, T))


@mistake(ValueError, "time 2", "NaN|not finite", ways=(BOUND, FILTER))
def state_that_becomes_nan(run):
    class Logarithm(Level):
        def transition(self, z):
            return pyro.sample("z", dist.Normal(torch.log(-z.abs()), 0.5))

    run(Logarithm(), torch.randn(B, T))


@mistake(ValueError, "loc", "Normal|'z'", ways=(*SCORED, KALMAN))
def parameter_that_is_nan(run):
    model = Walk()
    model.loc.data[1] = torch.nan
    run(model, torch.randn(B, T, 2))


# The particle filter.


@mistake(ValueError, "num_particles=0", "at least 1")
def no_particles():
    seq.ParticleFilter(Level(), num_particles=0)


@mistake(TypeError, "num_particles=1000.0", "integer|int")
def number_of_particles_that_is_a_float():
    seq.ParticleFilter(Level(), num_particles=1e3).run(torch.randn(B, T))


@mistake(TypeError, "num_particles", "Halfway", "guide=")
def guide_in_place_of_the_number_of_particles():
    model = Level()
    seq.ParticleFilter(model, Halfway(model)).run(torch.randn(B, T))


@mistake(ValueError, "num_runs=0", "at least 1")
def no_runs():
    seq.ParticleFilter(Level(), num_runs=0)


@mistake(ValueError, "ess_threshold=2", "from 0", "to 1")
def ess_threshold_as_a_count():
    seq.ParticleFilter(Level(), ess_threshold=2)


@mistake(TypeError, "ParticleFilter", "function", "from_pyro")
def particle_filter_on_a_plain_function():
    seq.ParticleFilter(walk_by_hand)


# The Kalman filter.


@mistake(ValueError, "'x'", "Poisson", "not Gaussian", "ParticleFilter")
def kalman_on_counts():
    kalman_filter(Counts(), torch.ones(B, T))


@mistake(ValueError, "'k'", "Categorical", "not Gaussian", "ForwardBackward is exact")
def kalman_on_a_discrete_latent():
    kalman_filter(Regimes(), torch.randn(B, T))


@mistake(ValueError, "'regime_2'", "Categorical", "not Gaussian", "ForwardBackward is exact")
def kalman_on_switching_regimes():
    kalman_filter(seq.models.MarkovSwitchingAutoregression(2, order=2), torch.randn(B, T))


def transition_by(function):
    class Curved(Level):
        def transition(self, z):
            return pyro.sample("z", dist.Normal(function(z), 0.5))

    return Curved()


@mistake(ValueError, "'z'", "Curved", "not linear", "ParticleFilter", "assume_linear")
def kalman_on_a_tanh():
    kalman_filter(transition_by(torch.tanh), torch.randn(B, T))


@mistake(ValueError, "'z'", "Curved", "not linear", "ParticleFilter", "assume_linear")
def kalman_on_a_tanh_that_is_nearly_linear():
    kalman_filter(transition_by(lambda z: 1e3 * torch.tanh(z / 1e3)), torch.randn(B, T))


@mistake(ValueError, "'z'", "Curved", "not linear", "ParticleFilter", "assume_linear")
def kalman_on_a_tanh_that_is_nearly_linear_in_float32():
    torch.set_default_dtype(torch.float32)
    kalman_filter(transition_by(lambda z: 1e3 * torch.tanh(z / 1e3)), torch.randn(B, T))


@mistake(ValueError, "'z'", "Curved", "not linear", "ParticleFilter", "assume_linear")
def kalman_on_a_relu_far_from_its_kink():
    kalman_filter(transition_by(lambda z: torch.relu(z + 20.0) - 20.0), torch.randn(B, T))


@mistake(ValueError, "'z'", "Curved", "not linear", "ParticleFilter", "assume_linear")
def kalman_on_a_kink_at_the_level_of_the_data():
    kalman_filter(transition_by(lambda z: z + 0.3 * (z - 5e7).clamp(min=0)), 5e7 + torch.randn(B, T))


@mistake(ValueError, "'x'", "not linear", "ParticleFilter", "assume_linear")
def kalman_on_a_nonlinear_emission():
    class Squared(Level):
        def emission(self, z, x=None):
            return pyro.sample("x", dist.Normal(z**2, 1.0), obs=x)

    kalman_filter(Squared(), torch.randn(B, T))


@mistake(ValueError, "next state", "Bounded", "not linear", "ParticleFilter", "assume_linear")
def kalman_on_a_nonlinear_recurrence():
    class Bounded(Autoregression):
        def step(self, before, x=None):
            return torch.tanh(super().step(before, x))

    kalman_filter(Bounded(), torch.randn(B, T))


@mistake(ValueError, "'x'", "covariance depends", "ParticleFilter")
def kalman_on_a_variance_that_depends_on_the_state():
    class Spread(Level):
        def emission(self, z, x=None):
            return pyro.sample("x", dist.Normal(z, 0.1 + nn.functional.softplus(z)), obs=x)

    kalman_filter(Spread(), torch.randn(B, T))


@mistake(ValueError, "'x'", "covariance depends", "ParticleFilter")
def kalman_on_stochastic_volatility():
    class Volatility(Level):
        def emission(self, z, x=None):
            return pyro.sample("x", dist.Normal(torch.zeros_like(z), torch.exp(z / 2)), obs=x)

    kalman_filter(Volatility(), torch.randn(B, T))


@mistake(ValueError, "'x'", "covariance depends", "ParticleFilter")
def kalman_on_a_covariance_that_depends_on_the_state():
    class Spread(Walk):
        def emission(self, z, x=None):
            spread = torch.diag_embed(0.1 + z[:, :2] ** 2)
            return pyro.sample("x", dist.MultivariateNormal(self.emit(z), spread), obs=x)

    kalman_filter(Spread(), torch.randn(B, T, 2))


@mistake(ValueError, "data", "integer", "real numbers|float")
def kalman_on_whole_numbers():
    kalman_filter(Level(), torch.ones(B, T, dtype=torch.long))


@mistake(ValueError, "needs data", "simulate")
def kalman_without_data():
    kalman_filter(Level(), None, [5, 5])


@mistake(ValueError, r"\['x', 'y'\]", "2 entries", "1|once")
def kalman_on_data_observed_twice():
    class Doubled(Level):
        def emission(self, z, x=None):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 2.0), obs=x)

    kalman_filter(Doubled(), torch.randn(B, T))


@mistake(TypeError, "KalmanFilter", "function", "from_pyro")
def kalman_on_a_plain_function():
    seq.KalmanFilter(walk_by_hand)


@mistake(TypeError, "from_pyro", "StateSpaceModel")
def kalman_on_a_wrapped_function():
    seq.KalmanFilter(seq.from_pyro(walk_by_hand))


# Plain Pyro functions.


@mistake(ValueError, "'mu'", "no step number", "pyro.param|PyroSample", ways=(BOUND, FILTER))
def wrapped_function_with_a_site_without_number(run):
    def function(x, lengths=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        for t in range(x.shape[1]):
            pyro.sample(f"x_{t}", dist.Normal(mu, 1.0).expand([len(x)]), obs=x[:, t])

    run(seq.from_pyro(function), torch.randn(B, T))


@mistake(ValueError, "5 numbered steps", "6", "z_{t}", ways=(BOUND, FILTER))
def wrapped_function_with_too_few_steps(run):
    run(seq.from_pyro(lambda x, lengths: walk_by_hand(x[:, :-1], lengths)), torch.randn(B, T))


@mistake(ValueError, "from_pyro", "gaps", "StateSpaceModel", ways=(BOUND, FILTER))
def wrapped_function_with_missing_data(run):
    run(seq.from_pyro(walk_by_hand), gappy(torch.randn(B, T)))


@mistake(ValueError, "from_pyro|needs data", "data", "simulate", ways=EVERY)
def wrapped_function_without_data(run):
    run(seq.from_pyro(walk_by_hand), None, [5, 5])


@mistake(TypeError, "Level", "declared already")
def wrapping_a_declared_model():
    seq.from_pyro(Level())


@mistake(TypeError, "from_pyro", "function", "str")
def wrapping_what_is_no_function():
    seq.from_pyro("walk_by_hand")


@mistake(TypeError, "SequentialELBO", "function", "from_pyro")
def bound_of_a_plain_function():
    seq.SequentialELBO().loss(walk_by_hand, Halfway(Level()), torch.randn(B, T))


@mistake(TypeError, "SequentialELBO", "Plain", "from_pyro")
def bound_of_a_plain_module():
    class Plain(PyroModule):
        def forward(self, x, lengths=None):
            walk_by_hand(x, lengths)

    model = Plain()
    seq.SequentialELBO().loss(model, Halfway(Level()), torch.randn(B, T))


@mistake(ValueError, "cannot predict", "from_pyro|its model")
def prediction_of_a_wrapped_function():
    particle_filter(seq.from_pyro(walk_by_hand), torch.randn(B, T)).predict(3)


# The bound.


@mistake(ValueError, "num_particles=0", "at least 1")
def bound_without_particles():
    seq.SequentialELBO(num_particles=0)


@mistake(TypeError, "num_particles=2.0", "integer|int")
def bound_with_a_number_of_particles_that_is_a_float():
    model = Level()
    seq.SequentialELBO(num_particles=2.0).loss(model, Halfway(model), torch.randn(B, T))


@mistake(ValueError, "free_bits", "analytic_kl=True")
def free_bits_without_the_analytic_kl():
    seq.SequentialELBO(free_bits=0.5, analytic_kl=False)


@mistake(ValueError, "free_bits=-1", "nats|negative|0")
def free_bits_negative():
    seq.SequentialELBO(free_bits=-1.0)


@mistake(ValueError, "plate_size=3", "4 sequences", "whole data set", ways=(CALL, PYRO, BOUND))
def plate_smaller_than_the_batch(run):
    run(Level(), torch.randn(B, T), plate_size=3)


@mistake(ValueError, "plate_size=0", "4 sequences", ways=(CALL, PYRO, BOUND))
def plate_of_no_sequences(run):
    run(Level(), torch.randn(B, T), plate_size=0)


@mistake(ValueError, r"SequentialELBO\(num_particles=")
def vectorised_particles_on_a_step_that_does_not_broadcast():
    model = Recurrent()
    loss = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    loss.loss(model, seq.PriorGuide(model), torch.randn(B, T, 2))


@mistake(ValueError, r"SequentialELBO\(num_particles=")
def vectorised_particles_on_a_step_that_indexes_columns():
    class Columns(Walk):
        def emission(self, z, x=None):
            return pyro.sample("x", dist.Normal(z[:, :2], 1.0).to_event(1), obs=x)

    model = Columns()
    loss = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    loss.loss(model, seq.PriorGuide(model), torch.randn(B, T, 2))


@mistake(ValueError, r"SequentialELBO\(num_particles=")
def vectorised_particles_with_a_learned_guide():
    model = Walk()
    loss = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    loss.loss(model, seq.FilteringGuide(model, hidden=4), torch.randn(B, T, 2))


@mistake(TypeError, "SequentialELBO", "traces", "Trace_ELBO")
def traces_of_the_bound():
    model = Level()
    for _ in seq.SequentialELBO()._get_traces(model, Halfway(model), (torch.randn(B, T),), {}):
        pass


@mistake(ValueError, "num_samples=1", "at least 2")
def variational_posterior_of_one_sample():
    model = Level()
    seq.Variational(model, Halfway(model), num_samples=1)


@mistake(ValueError, "bound='renyi'", "'elbo' or 'iwae'")
def unknown_bound():
    model = Level()
    seq.Variational(model, Halfway(model), bound="renyi")


@mistake(TypeError, "AutoNormal", "SequentialGuide")
def variational_posterior_of_an_autoguide():
    model = Level()
    seq.Variational(model, AutoNormal(model))


# What one does with a posterior.


@mistake(ValueError, "horizon=0", "at least 1")
def prediction_of_nothing():
    particle_filter(Level(), torch.randn(B, T)).predict(0)


@mistake(ValueError, "num_samples=0", "at least")
def prediction_of_no_samples():
    particle_filter(Level(), torch.randn(B, T)).predict(2, num_samples=0)


@mistake(ValueError, r"Driven\.transition", "'u'", "B, horizon|B, T")
def prediction_without_the_covariates():
    particle_filter(Driven(), torch.randn(B, T), u=torch.randn(B, T, 2)).predict(3)


@mistake(ValueError, "'u'", r"\(4, 2, 2\)", r"\(4, 3, \.\.\.\)")
def prediction_with_too_few_covariates():
    particle_filter(Driven(), torch.randn(B, T), u=torch.randn(B, T, 2)).predict(3, u=torch.randn(B, 2, 2))


@mistake(ValueError, "quantile|particles", "history=True")
def quantile_without_history():
    particle_filter(Level(), torch.randn(B, T)).quantile("z", 0.5)


@mistake(ValueError, "quantile|particles", "num_runs=1|one run")
def quantile_of_several_runs():
    seq.ParticleFilter(Level(), num_particles=5, num_runs=2).run(torch.randn(B, T)).quantile("z", 0.5)


FILTERS = (seq.ParticleFilter, seq.AuxiliaryParticleFilter, seq.TwistedParticleFilter, seq.RaoBlackwellisedFilter)


@mistake(ValueError, "history=True", "one run", "num_runs=2", "num_runs=1", ways=FILTERS)
def history_of_several_runs(kind):
    kind(Level(), num_particles=5, num_runs=2, history=True)


def resampled_by(make):
    def drawn(weights):
        return make(weights)

    seq.ParticleFilter(Level(), num_particles=5, ess_threshold=1.0, resampling=drawn).run(torch.randn(B, T))


@mistake(ValueError, "resampling function drawn", "ancestor 5", "5 particles", "0 to 4")
def resampling_that_counts_from_one():
    resampled_by(lambda weights: seq.resampling.systematic(weights) + 1)


@mistake(ValueError, "resampling function drawn", "ancestor -1", "0 to 4")
def resampling_that_goes_below_zero():
    resampled_by(lambda weights: torch.full(weights.shape, -1))


@mistake(TypeError, "resampling function drawn", "float", r"\.long\(\)")
def resampling_of_floats():
    resampled_by(lambda weights: seq.resampling.systematic(weights).double())


@mistake(TypeError, "resampling function drawn", "ndarray", "as_tensor")
def resampling_by_numpy():
    resampled_by(lambda weights: seq.resampling.systematic(weights).numpy())


@mistake(ValueError, "resampling function drawn", r"\(4, 3\)", r"\(n, N\) = \(4, 5\)")
def resampling_of_fewer():
    resampled_by(lambda weights: seq.resampling.systematic(weights)[:, :3])


SCHEMES = (seq.resampling.multinomial, seq.resampling.stratified, seq.resampling.systematic, seq.resampling.residual)


@mistake(ValueError, "was given weights that are zero, all of them in row 1", "positive sum", ways=SCHEMES)
def weights_of_zero(scheme):
    scheme(torch.tensor([[0.5, 0.5], [0.0, 0.0]]))


@mistake(ValueError, "was given weights that are NaN in row 0", ways=SCHEMES)
def weights_of_nan(scheme):
    scheme(torch.tensor([[0.5, torch.nan], [0.5, 0.5]]))


@mistake(ValueError, "was given weights that are negative in row 0", "softmax", ways=SCHEMES)
def weights_on_log_scale(scheme):
    scheme(torch.tensor([[-0.5, -0.7], [-0.5, -0.5]]))


@mistake(ValueError, "was given weights that are infinite in row 0", ways=SCHEMES)
def weights_of_infinity(scheme):
    scheme(torch.tensor([[torch.inf, 1.0]]))


@mistake(ValueError, "was given weights of shape", r"\(2,\)", r"weights\[None\]", ways=SCHEMES)
def weights_of_one_set(scheme):
    scheme(torch.ones(2))


@mistake(TypeError, "was given weights of dtype torch.int64", r"weights\.double\(\)", ways=SCHEMES)
def weights_of_whole_numbers(scheme):
    scheme(torch.tensor([[1, 2]]))


@mistake(TypeError, "was given weights as a list", "tensor", ways=SCHEMES)
def weights_in_a_list(scheme):
    scheme([[0.5, 0.5]])


@mistake(ValueError, "Metropolis was given weights that are zero")
def weights_of_zero_for_metropolis():
    seq.resampling.Metropolis()(torch.zeros(1, 3))


@mistake(ValueError, "trajectories", "history=True")
def trajectories_without_history():
    particle_filter(Level(), torch.randn(B, T)).trajectories(10)


@mistake(ValueError, "site 'level'", r"\['z'\]")
def quantile_of_an_unknown_site():
    seq.ParticleFilter(Level(), num_particles=5, history=True).run(torch.randn(B, T)).quantile("level", 0.5)


@mistake(ValueError, "q=|quantile", "95", "between 0 and 1|0 to 1")
def quantile_in_percent():
    seq.ParticleFilter(Level(), num_particles=5, history=True).run(torch.randn(B, T)).quantile("z", 95)


@mistake(ValueError, "site 'level'", r"\['x', 'z'\]")
def prediction_of_an_unknown_site():
    particle_filter(Level(), torch.randn(B, T)).predict(2).mean("level")


@mistake(ValueError, "site 'level'", r"\['z'\]")
def plot_of_an_unknown_site():
    particle_filter(Level(), torch.randn(B, T)).plot("level")


@mistake(ValueError, "sequence=9", "4 sequences|4")
def plot_of_a_sequence_that_is_not_there():
    particle_filter(Level(), torch.randn(B, T)).plot(sequence=9)


# Comparing methods.


@mistake(TypeError, "'avf'", "Halfway", r"run\(x\)", r"seq\.Variational\(model, guide\)")
def comparison_with_a_guide():
    seq.compare({"avf": Halfway(Level())}, torch.randn(B, T))


@mistake(TypeError, "methods", "list", "dict")
def comparison_of_a_list():
    seq.compare([seq.KalmanFilter(Level())], torch.randn(B, T))


@mistake(TypeError, "'kalman'", "KalmanFilter", r"instance|KalmanFilter\(model\)|class")
def comparison_of_a_class():
    seq.compare({"kalman": seq.KalmanFilter}, torch.randn(B, T))


@mistake(ValueError, "'kalman'", "other data", "4|3")
def comparison_with_a_posterior_of_other_data():
    seq.compare({"kalman": kalman_filter(Level(), torch.randn(B, T))}, torch.randn(3, T))


@mistake(ValueError, "no methods", r"\{'kalman'")
def comparison_of_nothing():
    seq.compare({}, torch.randn(B, T))
