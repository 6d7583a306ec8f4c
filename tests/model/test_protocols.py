"""Structural types of guides and models: members are seen wherever they lie, and no member may be missing."""

import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal
from torch import nn

from guides import amortized_encoder, bernoulli_dropout
from inference import fit
from inference.model import protocols
from inference.model.protocols import (
    HasImageShape,
    HasScaleTril,
    HasUsualFit,
    HasUsualGuide,
    NoCommonDensity,
    SupportsDecode,
    SupportsEncode,
    SupportsRowDraws,
    supports,
)
from ppl_models import VAE, DropoutNetwork, linear_regression


def test_kiln_s_own_guides_and_models_keep_the_contract():
    vae, network = (
        VAE(64, latent=2, hidden=[8], image_shape=(8, 8)),
        DropoutNetwork(nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))),
    )
    encoder, dropout = amortized_encoder(vae), bernoulli_dropout(network)
    assert supports(encoder, SupportsEncode)
    assert supports(encoder, SupportsDecode)
    assert supports(vae, HasImageShape)
    assert supports(vae, HasUsualFit)
    assert supports(vae, HasUsualGuide)
    assert supports(dropout, SupportsRowDraws)
    assert supports(dropout, NoCommonDensity)
    assert not supports(dropout, SupportsEncode)
    assert not supports(linear_regression, HasImageShape)


def test_parameters_of_a_guide_are_members():
    """``isinstance`` of a runtime-checkable protocol does not see them from Python 3.12 on."""
    x = torch.linspace(-1, 1, 10).reshape(-1, 1)
    call = {"steps": 2, "engine": "eager", "progress": False}
    full, diagonal = (
        fit(linear_regression, guide(linear_regression), x, x[:, 0], **call).bound_model.guide
        for guide in (AutoMultivariateNormal, AutoDiagonalNormal)
    )
    assert supports(full, HasScaleTril)
    assert not supports(diagonal, HasScaleTril)


def test_a_submodule_is_a_member():
    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.Linear(2, 4)

    assert supports(Guide(), SupportsEncode)


@pytest.mark.parametrize("missing", ["size", "values"])
def test_each_member_is_needed(missing):
    members = {"size": 2, "values": lambda self, codes: {}}
    assert supports(type("Whole", (), members)(), SupportsDecode)
    assert not supports(type("Part", (), {n: v for n, v in members.items() if n != missing})(), SupportsDecode)


def test_every_protocol_says_what_it_is_for():
    for name in set(protocols.__all__) - {"supports"}:
        assert getattr(protocols, name).__doc__, name
