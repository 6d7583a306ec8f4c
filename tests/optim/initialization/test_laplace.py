"""Normals from the curvature of the log joint."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from guides import mean_field_normal
from inference.model.bound_model import BoundModel
from inference.model.log_joint import LogJoint
from inference.optim.initialization.laplace import InitialNormal, NoInitialNormal, laplace_at
from inference.utils.random_state import RandomStream


def at(u):
    """The Normal that Laplace's approximation of N(3, 2²) makes at ``u``."""

    def model():
        pyro.sample("z", dist.Normal(3.0, 2.0))

    stream = RandomStream.seeded(0)
    bound_model = BoundModel.start(
        model, mean_field_normal(model), (), stream, torch.device("cpu"), torch.float64, check_values=False
    )
    return laplace_at(LogJoint(bound_model, (), stream), torch.tensor([u], dtype=torch.float64))


def test_laplace_is_exact_at_the_mode_of_a_normal():
    found = at(3.0)
    assert found.is_mode
    assert found.sd.item() == pytest.approx(2.0)
    assert found.log_evidence == pytest.approx(0.0, abs=1e-9)


def test_a_point_that_is_no_mode_is_not_called_one():
    assert not at(5.0).is_mode


def test_a_density_that_is_not_finite_gives_no_normal():
    assert isinstance(at(math.inf), NoInitialNormal)


def test_a_normal_is_read_back_from_its_fields():
    found = at(3.0)
    again = InitialNormal.from_state_dict(vars(found), torch.device("cpu"))
    assert torch.equal(again.scale_tril, found.scale_tril)
    assert again.elbo == found.elbo
