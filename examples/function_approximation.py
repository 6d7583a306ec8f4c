"""Learning y = eˣ: watch the fit live, load its snapshots, open it up, take it away as NumPy.

    python examples/function_approximation.py --out figures/

Chainer's tutorial: a network 1-16-32-1 of leaky ReLUs sees 100 fresh points of
[0, 1] at each of 10,000 steps. The loss is drawn every 10 steps and a snapshot
kept every 100; the weights are read, and e^0.2 is worked out from them in plain
NumPy; gradients are checked against differences; the path of the parameters is
drawn over the contours of the loss, first for the tutorial's straight line with
its two parameters, then for the network. The same network fitted as a Bayesian
one says how sure it is. The figures and predictor.npz are in ``--out``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer.autoguide import AutoDelta, init_to_sample
from torch import Tensor

import kiln
from inference.svi.callbacks.base import Callback
from kiln.guides import mean_field_normal
from kiln.models import Scaling, mlp_regression

POINTS, STEPS = 100, 10_000
GRID = torch.linspace(0, 1, 201).reshape(-1, 1)
MODEL = partial(mlp_regression, noise=0.001, scaling=Scaling.of(GRID, GRID[:, 0].exp()))


def points() -> tuple[Tensor, Tensor]:
    """New places in [0, 1], and the function there."""
    x = torch.rand(POINTS, 1)
    return x, x[:, 0].exp()


@dataclass(frozen=True)
class Learned:
    """The fit, some of its snapshots as posteriors by step, and the path of its parameters."""

    posterior: kiln.Posterior
    snapshots: dict[int, kiln.Posterior]
    trace: kiln.ParameterTrace


def learn(folder: Path, steps: int = STEPS, seed: int = 0, progress: bool = True) -> Learned:
    """The network as a point estimate, with everything that watches it."""
    guide = AutoDelta(MODEL, init_loc_fn=init_to_sample)
    kept = kiln.Snapshots(folder / "snapshots", every=max(1, steps // 100), overwrite=True)
    trace = kiln.ParameterTrace(every=max(1, steps // 100))
    watching: list[Callback] = [kiln.LivePlot(every=10, path=folder / "function_loss.png"), kept, trace]
    lr = kiln.cosine_decay(1e-2, steps)
    posterior = kiln.fit(
        MODEL, guide, kiln.fresh(points), steps=steps, lr=lr, seed=seed, callbacks=watching, progress=progress
    )
    shown = [kept.written[i] for i in (0, 1, len(kept.written) // 10, -1)]
    snapshots = {int(path.name.removeprefix("step_")): kiln.load(path, MODEL, guide) for path in shown}
    return Learned(posterior, snapshots, trace)


def by_hand(posterior: kiln.Posterior, x: float) -> float:
    """The network written again, from its weights alone."""
    value = {name.removeprefix("AutoDelta."): tensor.numpy() for name, tensor in posterior.params.items()}
    units = MODEL.keywords["scaling"]
    layer = (np.array([[x]]) - np.array(units.x_loc)) / np.array(units.x_scale)
    for i in range(2):
        layer = layer @ value[f"w{i}"] + value[f"b{i}"]
        layer = np.where(layer > 0, layer, 0.2 * layer)
    out = layer @ value["w2"] + value["b2"]
    return float((out * units.y_scale + units.y_loc).item())


def line(x: Tensor, y: Tensor | None = None) -> None:
    """The tutorial's linear case: −log p is Σ (y − Wx − b)², up to a constant."""
    slope, start = pyro.param("W", torch.tensor(-1.0)), pyro.param("b", torch.tensor(2.5))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x + start, 0.5**0.5), obs=y)


def no_guide(x: Tensor, y: Tensor | None = None) -> None:
    """Guide without latent sites."""


def descent() -> Figure:
    """A hundred steps of plain gradient descent of the line, over the contours of its loss."""
    x = torch.linspace(-1, 2, 30)
    trace = kiln.ParameterTrace(every=1)
    posterior = kiln.fit(
        line, no_guide, x, 2 * x - 1, steps=100, lr=0.005, optimizer="sgd", callbacks=[trace], progress=False
    )
    return kiln.plot_loss_contour(
        posterior, ("W", "b"), path=trace.flat_params, steps=trace.steps.tolist(), progress=False
    )


def bayesian(seed: int = 0, steps: int = 2 * STEPS, progress: bool = True) -> kiln.Posterior:
    """100 points with noise 0.02, and what they leave open."""
    x = torch.linspace(0, 1, POINTS).reshape(-1, 1)
    y = x[:, 0].exp() + 0.02 * torch.randn(POINTS, generator=torch.Generator().manual_seed(seed))
    model = partial(mlp_regression, hidden=(12,), noise=0.02, scaling=Scaling.of(x, y))
    guide = mean_field_normal(model, init_loc=init_to_sample, init_scale=0.01)
    return kiln.fit(model, guide, x, y, steps=steps, lr=kiln.cosine_decay(1e-2, steps), seed=seed, progress=progress)


def predicted(posterior: kiln.Posterior, draws: int) -> kiln.Prediction:
    """At the places of the grid."""
    return cast(kiln.Prediction, posterior.predict(GRID, draws=draws, progress=False))


def draw(learned: Learned, unsure: kiln.Posterior, path: Path) -> None:
    """Draw the functions of the snapshots, their errors, and the Bayesian network's draws."""
    truth = GRID[:, 0].exp()
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot(GRID, truth, color="black", lw=3, alpha=0.3, label="eˣ")
    for step, snapshot in learned.snapshots.items():
        mean = predicted(snapshot, 1).mean
        left.plot(GRID, mean, lw=1, label=f"after {step:,} steps")
        middle.semilogy(GRID, (mean - truth).abs().clamp_min(1e-6), lw=1, label=f"after {step:,} steps")
    middle.set(title="distance to eˣ", xlabel="x")
    left.set(title="the snapshots", xlabel="x")
    functions = predicted(unsure, 500)
    lower, upper = functions.interval(0.9, of="functions")
    right.plot(GRID, (functions.draws[:40] - truth).T, color="tab:blue", lw=0.4, alpha=0.4)
    right.fill_between(GRID[:, 0], lower - truth, upper - truth, color="tab:blue", alpha=0.2, label="90 % of functions")
    right.axhline(0, color="black", lw=1)
    right.set(title="Bayesian, noise 0.02: functions − eˣ", xlabel="x")
    for axes in (left, middle, right):
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """The tutorial from start to end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path())
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    learned = learn(options.out, options.steps)
    mean = predicted(learned.posterior, 1).mean
    hand = by_hand(learned.posterior, 0.2)
    print(f"e^0.2 is {np.exp(0.2):.5f}, the network says {float(mean[40]):.5f}, by hand {hand:.5f}")
    print(f"furthest off on [0, 1]: {float((mean - GRID[:, 0].exp()).abs().max()):.5f}")
    check = kiln.check_gradients(MODEL, AutoDelta(MODEL, init_loc_fn=init_to_sample), *points(), most=200)
    verdict = "right" if check.passed else "wrong"
    print(f"gradients: {verdict}, the worst is {check.worst.name}, off by {check.worst.error:.1e}")
    predictor = learned.posterior.export(options.out / "predictor.npz", draws=1)
    print(f"with NumPy alone: {predictor} and predictor.py beside it")
    unsure = bayesian(steps=2 * options.steps)
    lower, upper = predicted(unsure, 1000).interval(0.9, of="functions")
    inside = (lower <= GRID[:, 0].exp()) & (GRID[:, 0].exp() <= upper)
    print(f"Bayesian: the 90 % interval of functions holds eˣ on {float(inside.double().mean()):.1%} of [0, 1]")
    draw(learned, unsure, options.out / "function_approximation.png")
    descent().savefig(options.out / "function_descent.png", dpi=110)
    steps = learned.trace.steps.tolist()
    contour = kiln.plot_loss_contour(learned.posterior, path=learned.trace.flat_params, steps=steps, draws=1)
    contour.savefig(options.out / "function_contour.png", dpi=110)
    for name in ("loss", "approximation", "descent", "contour"):
        print(f"figure: {options.out / f'function_{name}.png'}")


if __name__ == "__main__":
    main()
