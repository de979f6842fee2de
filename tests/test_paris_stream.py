"""PaRIS fed one frame at a time: the sums of the whole run, snapshots, mistakes."""

import io

import pyro
import pytest
import torch
from models import Driven, LocalLevel, TwoSites

import pyro_seq as seq


def moves(before, after, x, t):
    """The path's moves, its products with the data, and times."""
    move = torch.zeros_like(after) if before is None else after - before
    return torch.stack([move.square(), after * x.nan_to_num(), t.to(after) * after], -1)


def rates(before, after, x, t):
    return after["rate"] + (0.0 if before is None else before["level"].sum(-1))


def level(**options):
    return seq.Paris(LocalLevel(0.0, 1.0, 0.5, 1.0), moves, 30, **options)


CASES = {
    "exact": (level, (3, 7), {}),
    "rejection": (lambda: level(method="rejection"), (3, 7), {}),
    "one draw": (lambda: level(num_backward=1, ess_threshold=1.0), (3, 7), {}),
    "two sites": (lambda: seq.Paris(TwoSites(), rates, 20), (2, 7, 3), {}),
    "covariates": (lambda: seq.Paris(Driven(), moves, 20), (2, 7), {"u": (2, 7, 2)}),
}


def made(name):
    make, shape, covariates = CASES[name]
    return make(), torch.randn(shape), {key: torch.randn(inner) for key, inner in covariates.items()}


def feed(stream, x, covariates, times):
    return [stream.update(x[:, t], **{name: value[:, t] for name, value in covariates.items()}) for t in times]


@pytest.mark.parametrize("name", CASES)
def test_a_stream_gives_the_sums_of_a_run(name):
    method, x, covariates = made(name)
    x[0, 3] = torch.nan
    pyro.set_rng_seed(1)
    whole = method.run(x, **covariates)
    pyro.set_rng_seed(1)
    stream = method.stream()
    found = feed(stream, x, covariates, range(7))
    assert whole.expectation.isfinite().all() and whole.expectation.abs().sum() > 0
    torch.testing.assert_close(torch.stack([f.expectation for f in found], 1), whole.expectation)
    torch.testing.assert_close(torch.stack([f.log_predictive for f in found], 1), whole.log_evidence_by_step)
    torch.testing.assert_close(found[-1].moments["z" if "z" in found[-1].moments else "rate"].mean,
                               whole.filtered["z" if "z" in whole.filtered else "rate"].mean[:, -1])


@pytest.mark.parametrize("seen", [0, 3])
@pytest.mark.parametrize("name", CASES)
def test_a_snapshot_goes_on_bit_for_bit(name, seen):
    method, x, covariates = made(name)
    stream, file = method.stream(), io.BytesIO()
    feed(stream, x, covariates, range(seen))
    torch.save(stream.state_dict(), file)
    first = feed(stream, x, covariates, range(seen, 7))
    file.seek(0)
    other = method.stream()
    torch.randn(5)
    other.load_state_dict(torch.load(file, weights_only=True))
    second = feed(other, x, covariates, range(seen, 7))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.expectation, b.expectation) and torch.equal(a.weights, b.weights)


def test_it_holds_nothing_of_the_past():
    stream, sizes = level().stream(), set()
    for _ in range(5):
        stream.update(torch.randn(2))
        held = stream.state_dict()
        sizes.add(sum(value.numel() for value in (held["sums"], held["state"], *held["values"].values())))
        assert stream._last.step.before is None and stream._last.sums.shape == (2, 30, 3)
    assert len(sizes) == 1


@pytest.mark.parametrize("spoil, message", [
    (lambda s: {k: v for k, v in s.items() if k != "sums"}, "damaged: 'sums'"),
    (lambda s: {**s, "sums": s["sums"][:, :5]}, r"sums are \(2, 5, 3\), torch.float64; they are a floating tensor \(2, 30"),
    (lambda s: {**s, "sums": None}, "sums are NoneType"),
    (lambda s: {**s, "values": {}}, r"values are of \[\], and the latents are \['z'\]"),
    (lambda s: {**s, "values": {"z": s["values"]["z"][:7]}}, r"values\['z'\] is \(7,\), torch.float64; it has 2 \* 30 rows"),
    (lambda s: {**s, "values": {"z": torch.full_like(s["values"]["z"], torch.nan)}}, r"values\['z'\] are NaN or infinite"),
    (lambda s: {**s, "num_backward": 3}, "num_backward 3, and this one has 2"),
    (lambda s: {**s, "backward": "rejection"}, "backward 'rejection', and this one has 'exact'"),
    (lambda s: {**s, "filter": "ParticleFilter"}, "filter 'ParticleFilter', and this one has 'Paris'"),
])
def test_damaged_snapshots(spoil, message):
    stream = level().stream()
    feed(stream, torch.randn(2, 3), {}, range(3))
    other = level().stream()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(spoil(stream.state_dict()))
    assert other.time == 0 and other._last is None


def test_a_functional_that_fails_leaves_the_stream_as_it_was():
    def grows(before, after, x, t):
        return after if before is None else after[:, None].expand(-1, 2)

    stream = seq.Paris(LocalLevel(0.0, 1.0, 0.5, 1.0), grows, 20).stream()
    stream.update(torch.zeros(2))
    generator = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"functional returned \(rows, 2\) at time 2 and \(rows,\) before"):
        stream.update(torch.zeros(2))
    assert stream.time == 1 and torch.equal(torch.get_rng_state(), generator) and stream._last.sums.shape == (2, 20)
