"""The model of these folders. A checkpoint holds a hash of its source: do not edit it."""

import pyro
import pyro.distributions as dist


def kept_model(x, y=None):
    weights = pyro.sample("weights", dist.Normal(0, 1).expand([2]).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ weights, noise), obs=y)
