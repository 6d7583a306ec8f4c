"""Pyro models, and the data they are shown on."""

from ppl_models.bnn_regression import bnn_regression
from ppl_models.linear_regression import linear_regression
from ppl_models.scaling import Scaling

__all__ = ["Scaling", "bnn_regression", "linear_regression"]
