"""How good predictions are on rows that were held out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.predict import ClassPrediction, Prediction

__all__ = ["ClassScores", "HeldOut", "Scores", "log_predictive_density", "score"]


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
    """Classification on N held-out rows: share right, and mean log predictive density in nats a row."""

    rows: int
    accuracy: float
    log_likelihood: float


@dataclass(frozen=True)
class HeldOut:
    """A prediction at rows that the fit never saw, what was observed there, and the scores of the one on the other."""

    prediction: Prediction | ClassPrediction
    observed: Tensor
    scores: Scores | ClassScores


def log_predictive_density(log_likelihood: Tensor) -> Tensor:
    """log (1/S) Σₛ p(yₙ | zₛ) in nats, shape (N,), from log likelihoods of shape (S, N, …)."""
    per_row = log_likelihood.reshape(*log_likelihood.shape[:2], -1).sum(-1)
    return torch.logsumexp(per_row, 0) - math.log(len(per_row))


def score(
    prediction: Prediction | ClassPrediction, y: Tensor, log_likelihood: Tensor, prob: float = 0.9
) -> Scores | ClassScores:
    """Compare a prediction with what was observed, ``log_likelihood`` of shape (S, N, …) at the same rows."""
    y = y.detach().cpu()
    density = float(log_predictive_density(log_likelihood).mean())
    if isinstance(prediction, ClassPrediction):
        return ClassScores(len(y), float((prediction.labels == y).double().mean()), density)
    lower, upper = prediction.interval(prob)
    inside = ((lower <= y) & (y <= upper)).double()
    return Scores(
        rows=len(y),
        rmse=float((prediction.mean - y).double().square().mean().sqrt()),
        log_likelihood=density,
        coverage=float(inside.mean()),
        coverage_se=math.sqrt(prob * (1 - prob) / inside.numel()),
        prob=prob,
    )
