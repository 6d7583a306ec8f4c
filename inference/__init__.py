"""Fit a Pyro model by SVI, then sample, predict, diagnose, report and save."""

from inference.batches import batches
from inference.calibration import Calibration, calibrate
from inference.checkpoint import Checkpoint
from inference.comparison import compare_report
from inference.contour import plot_loss_contour
from inference.diagnostics import Diagnosis
from inference.failures import NonFinite
from inference.fresh import fresh
from inference.gradients import GradientCheck, check_gradients
from inference.json_lines import JsonLines
from inference.live_plot import LivePlot
from inference.many import FitsFailed, fit_many
from inference.optimizers import cosine_decay
from inference.parameter_trace import ParameterTrace
from inference.posterior import Posterior, load
from inference.predict import ClassPrediction, Prediction
from inference.sections import Labels
from inference.snapshots import Snapshots
from inference.stored import StoredClassPrediction, StoredPrediction, open_prediction
from inference.svi import fit
from inference.tensorboard import TensorBoard
from inference.watch import Progress, every

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
