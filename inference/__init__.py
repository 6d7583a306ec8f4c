"""Fit a Pyro model by SVI, then sample, predict, diagnose, report and save."""

from inference.contour import plot_loss_contour
from inference.diagnostics import Diagnosis
from inference.gradients import GradientCheck, check_gradients
from inference.optimizers import cosine_decay
from inference.posterior import Posterior, load
from inference.predict import ClassPrediction, Prediction
from inference.report import Labels
from inference.svi import Progress, fit

__all__ = [
    "ClassPrediction",
    "Diagnosis",
    "GradientCheck",
    "Labels",
    "Posterior",
    "Prediction",
    "Progress",
    "check_gradients",
    "cosine_decay",
    "fit",
    "load",
    "plot_loss_contour",
]
