"""Fit a Pyro model by SVI, then sample, predict, diagnose, report and save."""

from inference.data.batched_dataset import batches
from inference.data.generated_dataset import fresh
from inference.diagnostics.checks import Diagnosis
from inference.diagnostics.gradient_check import GradientCheck, check_gradients
from inference.optim.schedules import cosine_decay
from inference.posterior import Posterior, load
from inference.predictive.prediction import ClassPrediction, Prediction
from inference.predictive.stored_prediction import StoredClassPrediction, StoredPrediction, open_prediction
from inference.reporting.comparison import compare_report
from inference.reporting.figures.loss_contour import plot_loss_contour
from inference.reporting.section import Labels
from inference.storage.checkpoint import Checkpoint
from inference.svi.calibration.sbc import Calibration, calibrate
from inference.svi.callbacks.base import Progress, every
from inference.svi.callbacks.json_lines import JsonLines
from inference.svi.callbacks.live_plot import LivePlot
from inference.svi.callbacks.parameter_trace import ParameterTrace
from inference.svi.callbacks.snapshots import Snapshots
from inference.svi.callbacks.tensorboard import TensorBoard
from inference.svi.fitting import fit
from inference.svi.fitting_many import FitsFailed, fit_many
from inference.utils.errors import NonFinite

__all__ = [
    "Calibration",
    "Checkpoint",
    "ClassPrediction",
    "Diagnosis",
    "FitsFailed",
    "GradientCheck",
    "JsonLines",
    "Labels",
    "LivePlot",
    "NonFinite",
    "ParameterTrace",
    "Posterior",
    "Prediction",
    "Progress",
    "Snapshots",
    "StoredClassPrediction",
    "StoredPrediction",
    "TensorBoard",
    "batches",
    "calibrate",
    "check_gradients",
    "compare_report",
    "cosine_decay",
    "every",
    "fit",
    "fit_many",
    "fresh",
    "load",
    "open_prediction",
    "plot_loss_contour",
]
