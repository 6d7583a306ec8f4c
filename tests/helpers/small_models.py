"""Data and models that several tests of the engines use."""

import pyro
import pyro.distributions as dist
import torch

from tests.helpers.engines import losses_of_both

CPU = torch.device("cpu")


def check(*case, rtol=1e-10, **options):
    ours, theirs, theta, reference = losses_of_both(*case, **options)
    assert torch.isfinite(theirs).all()
    assert len(theirs.unique()) > 1
    torch.testing.assert_close(ours[:, 0], theirs[:, 0], rtol=rtol, atol=0)
    torch.testing.assert_close(ours[:, 1], theirs[:, 1], rtol=rtol, atol=rtol * float(theirs.abs().max()))
    torch.testing.assert_close(theta, reference, rtol=100 * rtol, atol=rtol)


X = torch.linspace(-1, 1, 40).reshape(-1, 1)
Y = torch.cos(3 * X[:, 0])
COMPILED = {"engine": "compiled", "progress": False, "seed": 0}


def closure(value):
    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w + settings["shift"] * offset, 0.1), obs=y)

    settings = {"shift": 1.0}
    offset = torch.tensor(float(value))
    return model, settings, offset
