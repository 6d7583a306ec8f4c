"""Edward's Bayesian neural network: functions drawn from a posterior, and a fit that must not be trusted.

    python examples/bayesian_nn.py --out figures/

The tutorial's network (two hidden layers of 10 tanh units, weights N(0, 1))
learns 40 noisy points of a cosine. First with the tutorial's fixed noise scale
of 0.1, where the mean-field fit finds the curve; then with the noise learned,
where the same guide explains the data away as noise. The collapsed fits have
the better ELBO, so the loss alone does not tell them apart: a fit needs a verdict.
Last with the noise learned by a guide that draws the last layer given the rest.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import kiln
from kiln.data import cosine
from kiln.guides import conditional_normal, mean_field_normal
from kiln.models import bnn_regression

GRID = np.linspace(-1, 1, 200)[:, None]
DRAWS, SHOWN, LR = 1000, 50, 0.01
KINDS: tuple[tuple[str, float | str, bool], ...] = (
    ("fixed at 0.1", 0.1, False),
    ("learned", "learned", False),
    ("learned, last | rest", "learned", True),
)


@dataclass(frozen=True)
class Result:
    """One fit: RMSE of the predictive mean to the true curve, the noise it ends with, and its posterior."""

    posterior: kiln.Posterior
    prediction: kiln.Prediction
    rmse: float
    noise: float


def run(noise: float | str, seed: int, steps: int, progress: bool = True, given: bool = False) -> Result:
    """Fit the network and compare the mean of its functions with cos on 200 points of [−1, 1]."""
    data = cosine()
    model = partial(bnn_regression, noise=noise)
    guide = conditional_normal(model, ["w2", "b2"]) if given else mean_field_normal(model)
    schedule = kiln.cosine_decay(LR, steps)
    posterior = kiln.fit(model, guide, data.x, data.y, steps=steps, lr=schedule, seed=seed, progress=progress)
    prediction = cast(kiln.Prediction, posterior.predict(GRID, draws=DRAWS))
    truth = torch.tensor(np.cos(np.pi * GRID[:, 0]))
    rmse = float((prediction.mean - truth).square().mean().sqrt())
    learned = float(posterior.sample(1000)["noise"].mean()) if noise == "learned" else float(noise)
    return Result(posterior, prediction, rmse, learned)


def draw(axes: Axes, result: Result, title: str) -> None:
    """Fifty functions, the mean of all, the 90 % interval, the data and the true curve."""
    x, data = GRID[:, 0], cosine()
    lower, upper = result.prediction.interval(0.9)
    axes.fill_between(x, lower, upper, color="#2b6cb0", alpha=0.15, label="90 % of new observations")
    axes.plot(x, result.prediction.draws[:SHOWN].T, color="#2b6cb0", lw=0.5, alpha=0.4)
    axes.plot(x, result.prediction.mean, color="#c2570c", lw=2, label="mean of the functions")
    axes.plot(x, np.cos(np.pi * x), color="black", lw=1, ls="--", label="cos(πx)")
    axes.scatter(data.x[:, 0], np.asarray(data.y), s=12, color="black", zorder=3, label="data")
    axes.set(title=title, xlabel="x", ylim=(-2, 2))


def main() -> None:
    """Fit, print the table, and save the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path())
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="arviz")
    options.out.mkdir(parents=True, exist_ok=True)

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    print(f"{'noise':<22}{'seed':>5}{'RMSE':>8}{'noise sd':>10}{'ELBO':>9}   verdict")
    for axes, (title, noise, given) in zip(panels, KINDS, strict=True):
        results = [run(noise, seed, options.steps, given=given) for seed in range(options.seeds)]
        for seed, result in enumerate(results):
            elbo, diagnosis = -result.posterior.losses[-500:].mean(), result.posterior.diagnose()
            verdict = f"{diagnosis.verdict} (k-hat {diagnosis.khat:.1f})"
            print(f"{title:<22}{seed:>5}{result.rmse:>8.3f}{result.noise:>10.3f}{elbo:>9.1f}   {verdict}")
        draw(axes, results[0], f"noise {title}: RMSE {results[0].rmse:.3f}")
    panels[0].legend(loc="lower center", fontsize=8)
    path = options.out / "bayesian_nn.png"
    figure.savefig(path, dpi=150)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
