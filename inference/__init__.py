"""Fit a Pyro model by SVI, then sample, predict, diagnose, report and save."""

from inference.diagnostics import Diagnosis
from inference.fresh import fresh
from inference.optimizers import cosine_decay
from inference.posterior import Posterior, load
from inference.predict import ClassPrediction, Prediction
from inference.sections import Labels
from inference.svi import fit
from inference.watch import Progress, every

__all__ = [
    "ClassPrediction",
    "Diagnosis",
    "Labels",
    "Posterior",
    "Prediction",
    "Progress",
    "cosine_decay",
    "every",
    "fit",
    "fresh",
    "load",
]
