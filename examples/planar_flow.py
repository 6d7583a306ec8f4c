"""Planar flows on four hard densities of the plane, Figure 3 of Rezende & Mohamed (2015).

    python examples/planar_flow.py --out figures/

A Normal is bent by K planar layers until it matches a target exp(−U)/Z with two
modes (U1), a wave (U2), or a wave that splits (U3 and U4). The energy is taken
at the point where the last layer ends, every layer is kept invertible, so that
the flow has a density everywhere, and over the first half of the 20,000 steps
the target rises from nearly flat to itself, so that no branch is missed.

Two figures are saved. planar_flow.png has a row for each target: its density,
the Normal that the fits start from, the fitted densities (the median one of the
seeds), and draws over lines at a tenth and half of the target's height. Look at
the bridges between branches, which fade as K grows. planar_flow_kl.png has
KL(q‖p) in nats against K; the targets are normalised, so 0 is a perfect fit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

import kiln
from kiln.guides import planar_flow
from kiln.models import Energy, u1, u2, u3, u4

MODELS: dict[str, Callable[[], Tensor]] = {"u1": u1, "u2": u2, "u3": u3, "u4": u4}
WINDOW, COLUMNS, ROWS = (-5.0, 5.0, -5.5, 3.5), 200, 180
SHOWN, POINTS, LR = (2, 8, 32), 2000, 2e-3
PICTURE: dict[str, Any] = {
    "vmin": 0,
    "vmax": 1,
    "cmap": colormaps["magma_r"].resampled(40),
    "extent": WINDOW,
    "origin": "lower",
    "interpolation": "bilinear",
    "interpolation_stage": "data",
}
STYLES = {"u1": "o-", "u2": "s--", "u3": "^-.", "u4": "D:"}
COLOURS = {"u1": "#000004", "u2": "#641a80", "u3": "#b73779", "u4": "#e0662f"}


@dataclass(frozen=True)
class Result:
    """One fit: its posterior, KL(q‖p) in nats, and the share of q with z₁ > 0."""

    energy: str
    layers: int
    posterior: kiln.Posterior
    kl: float
    right: float


def run(name: str, layers: int, seed: int, steps: int, particles: int, progress: bool = True) -> Result:
    """Fit a flow of ``layers`` layers to the energy ``name``, and measure it."""
    posterior = fit_energy(name, partial(planar_flow, layers=layers), seed, steps, particles, LR, progress)
    return Result(name, layers, posterior, *kl(posterior, name))


def fit_energy(
    name: str, build: Callable[..., Any], seed: int, steps: int, particles: int, lr: float, progress: bool = False
) -> kiln.Posterior:
    """Fit the guide that ``build`` makes, from N(0, I): half a cosine of steps, the target annealed over half."""
    model, schedule, anneal = MODELS[name], kiln.cosine_decay(lr, steps), steps // 2 or None
    guide = build(model, init_loc={"z": torch.zeros(2)}, init_scale=1.0)
    return kiln.fit(
        model, guide, steps=steps, particles=particles, lr=schedule, anneal=anneal, seed=seed, progress=progress
    )


def kl(posterior: kiln.Posterior, name: str, draws: int = 20_000, seed: int = 0) -> tuple[float, float]:
    """KL(q‖p) in nats, the mean of log q(z) − log p(z) over draws of q, and the share of them with z₁ > 0."""
    z = posterior.sample(draws, seed=seed)["z"]
    log_ratio = posterior.log_prob({"z": z}) - Energy(name).log_prob(z)
    return float(log_ratio.mean()), float((z[:, 0] > 0).float().mean())


def grid() -> Tensor:
    """The points of the window, (rows, columns, 2)."""
    left, right, low, high = WINDOW
    across, up = torch.linspace(left, right, COLUMNS), torch.linspace(low, high, ROWS)
    return torch.stack(torch.meshgrid(across, up, indexing="xy"), -1)


def densities(results: Sequence[Result]) -> Figure:
    """A row for each energy: target, start, the flows, and draws of the last flow."""
    energies = list(dict.fromkeys(result.energy for result in results))
    layers = chosen([result.layers for result in results])
    titles = ["target", "start: N(0, I)", *(f"K = {k}" for k in layers), f"draws, K = {layers[-1]}"]
    figure = Figure(figsize=(2 * len(titles) - 0.1, 1.8 * len(energies) + 0.95), layout="compressed")
    panels = figure.subplots(len(energies), len(titles), sharex=True, sharey=True, squeeze=False)
    for row, name in zip(panels, energies, strict=True):
        fill(row, name, [median([r for r in results if (r.energy, r.layers) == (name, k)]) for k in layers])
    for axes, title in zip(panels[0], titles, strict=True):
        axes.set_title(title, fontsize=11)
    for axes in panels.flat:
        axes.set(aspect="equal", xlim=WINDOW[:2], ylim=WINDOW[2:], xticks=[-4, 0, 4], yticks=[-4, 0])
        axes.tick_params(labelsize=8)
    where: dict[str, Any] = {"location": "bottom", "shrink": 0.4, "aspect": 40, "pad": 0.02}
    bar = figure.colorbar(panels[0, 0].images[0], ax=panels, extend="max", **where)
    bar.set_label("density / highest density of the target", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def fill(row: Sequence[Any], name: str, flows: Sequence[Result]) -> None:
    """One row of panels."""
    points, start = grid(), torch.distributions.Normal(0.0, 1.0)
    target = Energy(name).log_prob(points).exp()
    found = [flow.posterior.log_prob({"z": points}).exp() for flow in flows]
    for axes, density in zip(row, [target, start.log_prob(points).sum(-1).exp(), *found], strict=False):
        axes.imshow((density / target.max()).numpy(), **PICTURE)
    for axes, flow in zip(row[2:], flows, strict=False):
        axes.text(0.97, 0.95, f"KL {flow.kl:.3f}", ha="right", va="top", fontsize=9, transform=axes.transAxes)
    row[-1].contour(*points.numpy().T, (target / target.max()).numpy().T, [0.1, 0.5], colors="black", linewidths=0.6)
    row[-1].scatter(*flows[-1].posterior.sample(POINTS)["z"].numpy().T, s=1.2, color="#b73779", alpha=0.6, linewidths=0)
    row[0].set_ylabel(f"U{name[1:]}", rotation=0, fontsize=12, labelpad=12, va="center")


def median(results: Sequence[Result]) -> Result:
    """The one with the median KL, of an even number the worse of the two in the middle."""
    return sorted(results, key=lambda result: result.kl)[len(results) // 2]


def chosen(layers: Sequence[int]) -> list[int]:
    """The K to show: 2, 8 and 32, or where one was not fitted the least, the middle and the largest."""
    given = sorted(set(layers))
    if set(SHOWN) <= set(given):
        return list(SHOWN)
    return sorted({given[0], given[len(given) // 2], given[-1]})


def curves(results: Sequence[Result]) -> Figure:
    """KL(q‖p) by K on log axes: the median over the seeds, and a bar from least to largest."""
    figure = Figure(figsize=(5.6, 4), layout="constrained")
    axes = figure.subplots()
    layers = sorted({result.layers for result in results})
    for i, name in enumerate(dict.fromkeys(result.energy for result in results)):
        found = np.array([[r.kl for r in results if (r.energy, r.layers) == (name, k)] for k in layers])
        middle, beside = np.median(found, 1), np.array(layers) * 1.03 ** (i - 1.5)
        style: dict[str, Any] = {"color": COLOURS[name], "capsize": 3, "elinewidth": 0.8}
        spread = np.abs(np.stack([found.min(1), found.max(1)]) - middle)
        axes.errorbar(beside, middle, spread, fmt=STYLES[name], label=f"U{name[1:]}", **style)
    axes.set(xscale="log", yscale="log", xlabel="layers K", ylabel="KL(q‖p), nats")
    axes.set_xticks(layers, [str(k) for k in layers])
    axes.set_xticks([], minor=True)
    axes.grid(color="0.9")
    axes.legend()
    return figure


def main() -> None:
    """Fit, print the table line by line, and save both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--energies", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 8, 16, 32])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    print(f"{'energy':<8}{'K':>4}{'seed':>6}{'KL, nats':>10}{'z1 > 0':>8}{'seconds':>9}")
    results = []
    for name, layers, seed in product(options.energies, options.layers, range(options.seeds)):
        result = run(name, layers, seed, options.steps, options.particles)
        results.append(result)
        seconds = result.posterior.record.seconds
        print(f"{name:<8}{layers:>4}{seed:>6}{result.kl:>10.4f}{result.right:>8.2f}{seconds:>9.1f}", flush=True)
    for stem, figure in {"planar_flow": densities(results), "planar_flow_kl": curves(results)}.items():
        path = options.out / f"{stem}.png"
        figure.savefig(path, dpi=130)
        print(f"figure: {path}")


if __name__ == "__main__":
    main()
