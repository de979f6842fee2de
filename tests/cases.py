"""Each declared model with data that fits it, and each guide, for tests that run over all of them."""

import models
import torch

import pyro_seq as seq


def all_models():
    """Each declared model of the tests, with data and covariates that fit it."""
    def entry(model, x, **covariates):
        return model, x, covariates

    return {
        "local level": lambda: entry(models.LocalLevel(0.0, 1.0, 0.1, 1.0), torch.randn(4, 6)),
        "deep Markov": lambda: entry(models.DeepMarkov(), torch.bernoulli(torch.full((4, 6, 4), 0.5))),
        "VRNN": lambda: entry(models.VRNN(), torch.randn(4, 6, 4)),
        "two sites": lambda: entry(models.TwoSites(), torch.randn(4, 6, 3)),
        "gamma": lambda: entry(models.GammaRate(), torch.poisson(torch.full((4, 6), 2.0))),
        "lognormal": lambda: entry(models.LogNormalScale(), torch.randn(4, 6)),
        "video": lambda: entry(models.Video(), torch.bernoulli(torch.full((4, 6, 1, 4, 4), 0.5))),
        "covariates": lambda: entry(models.Driven(), torch.randn(4, 6), u=torch.randn(4, 6, 2)),
    }


def guides(model, like):
    return {
        "filtering": lambda: seq.FilteringGuide(model, like=like, hidden=6),
        "direct": lambda: seq.FilteringGuide(model, like=like, hidden=6, residual=False),
        "smoothing": lambda: seq.SmoothingGuide(model, like=like, hidden=6),
        "avf": lambda: seq.AmortizedVariationalFilter(model, like=like, hidden=6),
    }
