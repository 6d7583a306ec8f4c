"""The same rows in every source that batches are read from."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch.utils.data import DataLoader, TensorDataset

from inference import batches
from inference.data.batch_loader import BatchLoader

ROWS = 1000
CPU = torch.device("cpu")


def model(x, y=None):
    bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        rows = pyro.subsample(x, event_dim=1)
        seen = pyro.subsample(y, event_dim=0) if y is not None else None
        return pyro.sample("y", dist.Normal(rows @ weights + bias, 0.5), obs=seen)


def npy(folder, x, y):
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    return batches(folder / "x.npy", str(folder / "y.npy"))


def loader(_, x, y):
    return batches(DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), batch_size=64, shuffle=True))


def stream(source, size=64, seed=0):
    return BatchLoader(source, ["x", "y"], CPU, torch.float64, size, seed)


def taken(found, steps, first=0):
    found.hold(first, steps)
    try:
        return found.rows(first, steps)
    finally:
        found.close()


OPTIONS = {"batch_size": 50, "lr": 0.01, "dtype": torch.float64, "progress": False}
