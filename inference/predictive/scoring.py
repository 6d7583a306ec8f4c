"""Scores of predictions on held-out rows, and whether predictions are as sure as they should be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from inference.predictive.prediction import ClassPrediction, Prediction, quantile

__all__ = [
    "ClassScores",
    "Coverage",
    "HeldOut",
    "PitValues",
    "Reliability",
    "Scores",
    "brier_score",
    "class_scores",
    "log_predictive_density",
    "pit_values",
    "reliability",
    "scores",
]

NOMINAL = (0.5, 0.8, 0.9, 0.95)
_TOGETHER = 2**22  # numbers that are sorted together


@dataclass(frozen=True)
class Coverage:
    """The ``share`` of observations inside the central interval that should hold ``prob`` of them.

    ``standard_error`` is the binomial one, √(prob (1 − prob)/N), if it did.
    """

    prob: float
    share: float
    standard_error: float


@dataclass(frozen=True)
class PitValues:
    """Ranks of N observations among S draws of each, and scores of the draws.

    Attributes
    ----------
    pit
        (N,): the probability integral transform, uniform on (0, 1) where
        observations are like draws. (r + v)/(S + 1) with r the rank among the
        draws, ties broken at random, and v uniform: exact for counts too.
    crps
        (N,), in the units of y: the continuous ranked probability score.
    coverage
        Of the intervals of 50, 80, 90 and 95 %.
    """

    pit: Tensor
    crps: Tensor
    coverage: tuple[Coverage, ...]


def pit_values(samples: Tensor, y: Tensor, seed: int = 0) -> PitValues:
    """Compare S draws of N observations, (S, N, …), with what was observed, (N, …).

    The CRPS is the fair estimate from S independent draws, whose mean over
    draws is that of the distribution they come from, in O(S log S):
    (1/S) Σₛ |yₛ − y| − 1/(2S(S − 1)) Σₛ Σₜ |yₛ − yₜ|; NaN for a single draw.

    Raises
    ------
    ValueError
        If the observations have another shape than the draws.

    References
    ----------
    Gneiting, Raftery (2007), Strictly proper scoring rules, prediction, and estimation.
    Czado, Gneiting, Held (2009), Predictive model assessment for count data (PIT of counts).

    Examples
    --------
    >>> draws = torch.randn(2000, 300, generator=torch.Generator().manual_seed(0))
    >>> found = pit_values(draws[1:], draws[0])
    >>> abs(float(found.crps.mean()) - torch.pi**-0.5) < 0.1, abs(found.coverage[2].share - 0.9) < 0.06
    (True, True)
    """
    if y.shape != samples.shape[1:]:
        raise ValueError(f"y has shape {tuple(y.shape)}, the predictions {tuple(samples.shape[1:])}: give one for each")
    draws, observed = samples.reshape(len(samples), -1), y.to(samples.dtype).reshape(-1).double()
    generator = torch.Generator().manual_seed(seed)
    width = max(1, _TOGETHER // len(draws))
    parts = [
        _compare(np.sort(part.double().numpy(), axis=0), seen, generator)
        for part, seen in zip(draws.split(width, 1), observed.split(width), strict=True)
    ]
    pit, crps, inside = (torch.cat(values, -1) for values in zip(*parts, strict=True))
    coverage = tuple(
        Coverage(prob, float(row.double().mean()), math.sqrt(prob * (1 - prob) / row.numel()))
        for prob, row in zip(NOMINAL, inside, strict=True)
    )
    return PitValues(pit, crps, coverage)


def _compare(sorted_draws: np.ndarray, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return PIT and CRPS, (M,), and whether each of the intervals holds y, (4, M)."""
    ordered, count = torch.from_numpy(sorted_draws), len(sorted_draws)
    below, ties = (ordered < y).sum(0), (ordered == y).sum(0)
    place = torch.rand(len(y), generator=generator, dtype=torch.float64)
    pit = (below + place * (ties + 1)) / (count + 1)
    weights = 2 * torch.arange(1, count + 1, dtype=torch.float64) - count - 1
    apart = weights @ ordered / (count * (count - 1)) if count > 1 else torch.full_like(y, math.nan)
    crps = (ordered - y).abs().mean(0) - apart
    tails = [(1 - prob) / 2 for prob in NOMINAL]
    inside = torch.stack([(quantile(ordered, t) <= y) & (y <= quantile(ordered, 1 - t)) for t in tails])
    return pit, crps, inside


@dataclass(frozen=True)
class Reliability:
    """Shares of predicted classes that are right, by the probability that was given to them, in even bins of it.

    Attributes
    ----------
    confidence, right
        (B,) of the bins that have rows: their mean probability of the predicted
        class, and the share predicted rightly.
    counts
        (B,): the rows of each.
    """

    confidence: Tensor
    right: Tensor
    counts: Tensor

    @property
    def error(self) -> float:
        """The expected calibration error Σ_b (n_b/N) |right_b − confidence_b|."""
        return float((self.counts * (self.right - self.confidence).abs()).sum() / self.counts.sum())

    @property
    def excess(self) -> float:
        """Mean confidence less the share right: above 0 where predictions are too sure."""
        return float((self.counts * (self.confidence - self.right)).sum() / self.counts.sum())

    @property
    def excess_se(self) -> float:
        """The standard error of :attr:`excess` if confidences were right."""
        return float((self.counts * self.standard_error).square().sum().sqrt() / self.counts.sum())

    @property
    def standard_error(self) -> Tensor:
        """Of ``right``, (B,), binomial, if the confidence were right."""
        return (self.confidence * (1 - self.confidence) / self.counts).clamp_min(0).sqrt()


def reliability(probs: Tensor, y: Tensor, bins: int = 15) -> Reliability:
    """Compare class probabilities, (N, C), with the classes that were observed, (N,).

    References
    ----------
    Guo, Pleiss, Sun, Weinberger (2017), On calibration of modern neural networks.

    Examples
    --------
    >>> found = reliability(torch.tensor([[0.8, 0.2], [0.8, 0.2]]), torch.tensor([0, 1]))
    >>> round(found.error, 6), found.counts.tolist(), found.right.tolist()
    (0.3, [2], [0.5])
    """
    confidence, labels = probs.double().max(-1)
    of = (confidence * bins).long().clamp_max(bins - 1)
    right = (labels == y).double()
    counts, sums, hits = (torch.bincount(of, w, bins) for w in (torch.ones_like(right), confidence, right))
    held = counts > 0
    return Reliability(sums[held] / counts[held], hits[held] / counts[held], counts[held].long())


def brier_score(probs: Tensor, y: Tensor) -> float:
    """(1/N) Σₙ Σ_c (pₙ_c − [yₙ = c])², from 0 to 2: of class probabilities, (N, C), and classes, (N,).

    Brier (1950), Verification of forecasts expressed in terms of probability.

    >>> brier_score(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([0, 1]))
    0.25
    """
    observed = torch.nn.functional.one_hot(y.long(), probs.shape[-1])
    return float((probs.double() - observed).square().sum(-1).mean())


@dataclass(frozen=True)
class Scores:
    """Regression on N held-out rows.

    ``rmse`` in the units of y; ``log_likelihood`` the mean log predictive
    density in nats a row; ``crps`` the mean continuous ranked probability
    score, in the units of y; ``coverage`` of the central intervals of 50, 80,
    90 and 95 %; ``pit`` where each observation fell among its predictions,
    uniform on (0, 1) where these are as sure as they should be, see
    :class:`~inference.predictive.scoring.PitValues`.
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
