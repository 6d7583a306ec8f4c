"""Small fits to export, and what is compared."""

from functools import partial

import numpy as np
import torch
from torch import nn

import ppl_models
from guides import (
    amortized_encoder,
    bernoulli_dropout,
    full_rank_normal,
    low_rank_normal,
    mean_field_normal,
)
from inference import fit
from ppl_models import Scaling

S = 60
X = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([1.0, -2.0, 0.5]) + 0.3 * torch.randn(30, generator=torch.Generator().manual_seed(1))
IMAGES = (torch.rand(30, 64, generator=torch.Generator().manual_seed(2)) * 255).byte()
UNITS = Scaling.of(X, Y)


def fitted(model, guide, *data, dtype=torch.float32, **options):
    return fit(model, guide, *data, **{"steps": 20, "progress": False, "engine": "eager", "dtype": dtype} | options)


def plain(model, build=mean_field_normal):
    return lambda dtype: fitted(model, build(model), X, Y, dtype=dtype)


def energy(model):
    return lambda dtype: fitted(model, mean_field_normal(model, init_loc={"z": torch.zeros(2)}), dtype=dtype)


def dropout(make, *data):
    def made(dtype):
        torch.manual_seed(0)
        model = make().to(dtype)
        return fitted(model, bernoulli_dropout(model), *data, dtype=dtype)

    return made


def network(out):
    return nn.Sequential(
        nn.Linear(3, 20), nn.ELU(), nn.Dropout(0.2), nn.Linear(20, 9), nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, out)
    )


def vae(noise):
    def made(dtype):
        torch.manual_seed(0)
        x = IMAGES[:, :16].to(dtype) / 255 if noise else (IMAGES[:, :16] > 99).to(dtype)
        model = ppl_models.VAE(16, latent=2, hidden=[8], noise=noise).to(dtype)
        return fitted(model, amortized_encoder(model), x, dtype=dtype)

    return made


def exact(dtype):
    found = ppl_models.exact_linear_regression(X, Y, noise=0.3)
    return fitted(partial(ppl_models.linear_regression, noise=0.3), found.guide, X, Y, steps=1, dtype=dtype)


CASES = {
    "linear_regression": [
        plain(ppl_models.linear_regression, full_rank_normal),
        plain(partial(ppl_models.linear_regression, scaling=UNITS, intercept=False, noise=0.2)),
    ],
    "exact_linear_regression": [exact],
    "bnn_regression": [
        plain(ppl_models.bnn_regression),
        plain(partial(ppl_models.bnn_regression, noise="learned", scaling=UNITS), low_rank_normal),
        plain(partial(ppl_models.bnn_regression, noise="heteroscedastic", hidden=(7,))),
    ],
    "mlp_regression": [plain(ppl_models.mlp_regression)],
    "DropoutNetwork": [
        dropout(lambda: ppl_models.DropoutNetwork(network(1), noise="learned"), X, Y),
        dropout(lambda: ppl_models.DropoutNetwork(network(4)), X, (Y > 0).long() + 2 * (X[:, 0] > 0)),
    ],
    "DropoutCNN": [dropout(lambda: ppl_models.DropoutCNN((8, 8), classes=4, hidden=20), IMAGES, torch.arange(30) % 4)],
    "DropoutRegression": [dropout(lambda: ppl_models.DropoutRegression(3, scaling=UNITS), X, Y)],
    "VAE": [vae(None), vae(0.3)],
    **{name: [energy(getattr(ppl_models, name))] for name in ("u1", "u2", "u3", "u4")},
}  # fmt: skip


def close(found, expected, bound):
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()
