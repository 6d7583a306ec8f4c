"""Fit a Pyro model by SVI, then sample, predict, diagnose, report and save."""

from inference.diagnostics import Diagnosis
from inference.json_lines import JsonLines
from inference.live_plot import LivePlot
from inference.optimizers import cosine_decay
from inference.parameter_trace import ParameterTrace
from inference.posterior import Posterior, load
from inference.predict import ClassPrediction, Prediction
from inference.report import Labels
from inference.snapshots import Snapshots
from inference.svi import fit
from inference.tensorboard import TensorBoard
from inference.watch import Progress, every

__all__ = [
    "ClassPrediction",
    "Diagnosis",
    "JsonLines",
    "Labels",
    "LivePlot",
    "ParameterTrace",
    "Posterior",
    "Prediction",
    "Progress",
    "Snapshots",
    "TensorBoard",
    "cosine_decay",
    "every",
    "fit",
    "load",
]
