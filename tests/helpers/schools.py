"""The eight schools of Rubin (1981), centred: a funnel."""

import pyro
import pyro.distributions as dist
import torch


def eight_schools(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("data", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


SCHOOLS = (torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]), torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]))
