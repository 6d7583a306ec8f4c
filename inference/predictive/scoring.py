"""How good predictions are on rows that were held out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from inference.predictive.prediction import ClassPrediction, Prediction
from inference.predictive.reliability import Coverage, Reliability, brier_score, pit_values, reliability

__all__ = ["ClassScores", "HeldOut", "Scores", "class_scores", "log_predictive_density", "scores"]


@dataclass(frozen=True)
class Scores:
    """Regression on N held-out rows.

    ``rmse`` in the units of y; ``log_likelihood`` the mean log predictive
    density in nats a row; ``crps`` the mean continuous ranked probability
    score, in the units of y; ``coverage`` of the central intervals of 50, 80,
    90 and 95 %; ``pit`` where each observation fell among its predictions,
    uniform on (0, 1) where these are as sure as they should be, see
    :class:`~inference.predictive.reliability.PitValues`.
    """

    rows: int
    rmse: float
    log_likelihood: float
    crps: float
    coverage: tuple[Coverage, ...]
    pit: Tensor


@dataclass(frozen=True)
class ClassScores:
    """Classification on N held-out rows.

    ``accuracy`` is the share predicted rightly; ``log_likelihood`` the mean log
    predictive density in nats a row; ``brier`` the mean squared difference
    between class probabilities and what was observed, summed over classes;
    ``reliability`` how often predicted classes are right, by the probability
    given to them; ``error_auroc`` how well entropy tells wrong rows from right
    ones, 1 being perfectly and 0.5 not at all, None where all rows are right or
    all wrong.
    """

    rows: int
    accuracy: float
    log_likelihood: float
    brier: float
    reliability: Reliability
    error_auroc: float | None

    @property
    def calibration_error(self) -> float:
        """The expected difference between confidence and accuracy."""
        return self.reliability.error


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


def scores(prediction: Prediction, y: Tensor, log_likelihood: Tensor) -> Scores:
    """Compare a prediction with what was observed, ``log_likelihood`` of shape (S, N, …) at the same rows."""
    y = y.detach().cpu()
    found = pit_values(prediction.samples, y)
    return Scores(
        rows=len(y),
        rmse=float((prediction.mean - y).double().square().mean().sqrt()),
        log_likelihood=float(log_predictive_density(log_likelihood).mean()),
        crps=float(found.crps.mean()),
        coverage=found.coverage,
        pit=found.pit,
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
        brier=brier_score(prediction.probs, y),
        reliability=reliability(prediction.probs, y),
        error_auroc=float(roc_auc_score(wrong.numpy(), prediction.entropy.numpy())) if tellable else None,
    )
