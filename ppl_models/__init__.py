"""Pyro models, and the data they are shown on."""

from ppl_models.bnn_regression import bnn_regression
from ppl_models.dropout import DropoutNetwork
from ppl_models.dropout_networks import DropoutCNN, DropoutRegression
from ppl_models.energy import Energy, u1, u2, u3, u4
from ppl_models.exact_posterior import ExactPosterior, exact_linear_regression
from ppl_models.linear_regression import linear_regression
from ppl_models.mlp_regression import mlp_regression
from ppl_models.scaling import Scaling
from ppl_models.vae import VAE

__all__ = [
    "VAE",
    "DropoutCNN",
    "DropoutNetwork",
    "DropoutRegression",
    "Energy",
    "ExactPosterior",
    "Scaling",
    "bnn_regression",
    "exact_linear_regression",
    "linear_regression",
    "mlp_regression",
    "u1",
    "u2",
    "u3",
    "u4",
]
