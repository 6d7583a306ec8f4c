"""Fit a Pyro model by SVI, then sample, predict, diagnose, report and save."""

from inference.diagnostics import Diagnosis
from inference.posterior import Posterior, load
from inference.predict import ClassPrediction, Prediction
from inference.svi import Progress, fit

__all__ = ["ClassPrediction", "Diagnosis", "Posterior", "Prediction", "Progress", "fit", "load"]
