"""How good predictions are on rows that were held out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from inference.predict import ClassPrediction, Prediction

__all__ = ["ClassScores", "HeldOut", "Scores", "calibration_error", "class_scores", "log_predictive_density", "scores"]


@dataclass(frozen=True)
class Scores:
    """Regression on N held-out rows.

    ``rmse`` in the units of y; ``log_likelihood`` the mean log predictive
    density in nats a row; ``coverage`` the share of rows inside the central
    interval that should hold ``prob`` of them, ``coverage_se`` its binomial
    standard error if it did.
    """

    rows: int
    rmse: float
    log_likelihood: float
    coverage: float
    coverage_se: float
    prob: float


@dataclass(frozen=True)
class ClassScores:
    """Classification on N held-out rows.

    ``accuracy`` is the share predicted rightly; ``log_likelihood`` the mean log
    predictive density in nats a row; ``calibration_error`` the expected
    difference between confidence and accuracy; ``error_auroc`` how well entropy
    tells wrong rows from right ones, 1 being perfectly and 0.5 not at all, None
    where all rows are right or all wrong.
    """

    rows: int
    accuracy: float
    log_likelihood: float
    calibration_error: float
    error_auroc: float | None


@dataclass(frozen=True)
class HeldOut:
    """A prediction at rows that the fit never saw, what was observed there, its scores, and the inputs of the model."""

    prediction: Prediction | ClassPrediction
    observed: Tensor
    scores: Scores | ClassScores
    inputs: tuple[Any, ...]


def log_predictive_density(log_likelihood: Tensor) -> Tensor:
    """log (1/S) Σₛ p(yₙ | zₛ) in nats, shape (N,), from log likelihoods of shape (S, N, …)."""
    per_row = log_likelihood.reshape(*log_likelihood.shape[:2], -1).sum(-1)
    return torch.logsumexp(per_row, 0) - math.log(len(per_row))


def scores(prediction: Prediction, y: Tensor, log_likelihood: Tensor, prob: float = 0.9) -> Scores:
    """Compare a prediction with what was observed, ``log_likelihood`` of shape (S, N, …) at the same rows."""
    y = y.detach().cpu()
    lower, upper = prediction.interval(prob)
    inside = ((lower <= y) & (y <= upper)).double()
    return Scores(
        rows=len(y),
        rmse=float((prediction.mean - y).double().square().mean().sqrt()),
        log_likelihood=float(log_predictive_density(log_likelihood).mean()),
        coverage=float(inside.mean()),
        coverage_se=math.sqrt(prob * (1 - prob) / inside.numel()),
        prob=prob,
    )


def class_scores(prediction: ClassPrediction, y: Tensor) -> ClassScores:
    """Compare class probabilities with the classes that were observed, shape (N,).

    Raises
    ------
    ValueError
        If a class was observed that the model does not know.
    """
    y = y.detach().cpu().long()
    classes = prediction.draws.shape[-1]
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(f"observed classes go from {y.min()} to {y.max()} but the model knows 0 to {classes - 1}")
    probs = prediction.probs.gather(-1, y[:, None])
    wrong = prediction.labels != y
    tellable = bool(wrong.any()) and not bool(wrong.all())
    return ClassScores(
        rows=len(y),
        accuracy=1 - float(wrong.double().mean()),
        log_likelihood=float(probs.double().log().mean()),
        calibration_error=calibration_error(prediction.probs, y),
        error_auroc=float(roc_auc_score(wrong.numpy(), prediction.entropy.numpy())) if tellable else None,
    )


def calibration_error(probs: Tensor, y: Tensor, bins: int = 15) -> float:
    """Expected calibration error Σ_b (n_b/N) |accuracy_b − confidence_b|, over even bins of confidence.

    The confidence of a row is the probability of its most probable class.
    Guo, Pleiss, Sun, Weinberger (2017), On calibration of modern neural networks.

    >>> probs = torch.tensor([[0.8, 0.2], [0.8, 0.2]])
    >>> round(calibration_error(probs, torch.tensor([0, 1])), 6)
    0.3
    """
    confidence, labels = probs.double().max(-1)
    of = (confidence * bins).long().clamp_max(bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, of, (labels == y).double() - confidence)
    return float(gap.abs().sum() / len(y))
