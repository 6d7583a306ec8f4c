"""Pyro models, ready to be fitted.

``vae`` and ``dropout_networks`` are the modules of the models :class:`VAE`, :class:`DropoutCNN` and
:class:`DropoutRegression`; the other models are functions.
"""

from ppl_models import (
    VAE,
    DropoutCNN,
    DropoutNetwork,
    DropoutRegression,
    Energy,
    ExactPosterior,
    Scaling,
    bnn_regression,
    dropout_networks,
    exact_linear_regression,
    linear_regression,
    mlp_regression,
    u1,
    u2,
    u3,
    u4,
    vae,
)

__all__ = [
    "VAE",
    "DropoutCNN",
    "DropoutNetwork",
    "DropoutRegression",
    "Energy",
    "ExactPosterior",
    "Scaling",
    "bnn_regression",
    "dropout_networks",
    "exact_linear_regression",
    "linear_regression",
    "mlp_regression",
    "u1",
    "u2",
    "u3",
    "u4",
    "vae",
]
