"""The path of a fit over the contours of its loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from torch import Tensor

from inference.diagnostics.loss_surface import (
    LossSurface,
    Plane,
    SurfaceGrid,
    loss_surface,
    plane_of,
    principal_plane,
    random_plane,
)
from inference.predictive.approximation import Approximation
from inference.reporting.figures.style import INK, ORANGE, STYLE
from inference.utils.validation import positive_integer, positive_number, seed_number

__all__ = ["draw", "plot_loss_contour", "surface_of"]

LEVELS = 16
_LEAST_GRID = 5


def plot_loss_contour(  # noqa: PLR0913 - public: every option by its name
    posterior: Approximation,
    over: Sequence[Any] | None = None,
    *,
    path: Any = None,
    steps: Sequence[int] | None = None,
    span: float | Sequence[float] | None = None,
    grid: int = 31,
    draws: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> Figure:
    """Contours of −ELBO, in nats, on a plane through the fitted θ, with the way the optimiser came.

    Parameters
    ----------
    posterior
        A fit with its data.
    over
        Two numbers of θ, ``("W", "b")`` or ``(("loc", 0), ("loc", 3))``, by the
        names of ``posterior.unconstrained_params``; or two directions, vectors
        (P,). If left out: both parameters where θ has two, else the two
        principal directions of ``path``, or without a path two random ones, as
        long in each row of each parameter as θ is.
    path
        (T, P): θ as it was at some steps, unconstrained and flat. Outside
        the plane it is projected onto it, so a point's own loss may be another
        than that of the contour under it.
    steps
        The step of each row of ``path``, for the legend.
    span
        How far the axes reach to each side of the fitted point, one number or
        two; if left out, as far as the path, or 1.
    grid, draws, seed
        −ELBO at ``grid`` × ``grid`` points, the mean over ``draws`` of noise
        that are the same at all, on all rows of the data.

    Raises
    ------
    ValueError
        If ``over`` names no two numbers of θ, ``path`` has other columns than
        θ, or the posterior was loaded without its data.

    References
    ----------
    Li, Xu, Taylor, Studer, Goldstein (2018), Visualizing the loss landscape of neural nets.

    Examples
    --------
    >>> import kiln
    >>> from kiln.guides import mean_field_normal
    >>> from kiln.models import linear_regression
    >>> x = torch.linspace(-1, 1, 50).reshape(-1, 1)
    >>> guide = mean_field_normal(linear_regression)
    >>> posterior = kiln.fit(linear_regression, guide, x, 1 + 2 * x[:, 0], steps=500, progress=False)
    >>> over = (("AutoNormal.locs.weights", 0), "AutoNormal.locs.bias")
    >>> figure = plot_loss_contour(posterior, over, span=0.2, grid=9, draws=4)
    >>> figure.axes[0].get_ylabel()
    'AutoNormal.locs.bias'
    """
    surface = surface_of(posterior, over, path=path, span=span, grid=grid, draws=draws, seed=seed, progress=progress)
    return draw(surface, steps)


def surface_of(
    posterior: Approximation,
    over: Sequence[Any] | None = None,
    *,
    path: Any = None,
    span: float | Sequence[float] | None = None,
    grid: int = 31,
    draws: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> LossSurface:
    """The numbers that :func:`plot_loss_contour` draws."""
    if positive_integer(grid, "grid") < _LEAST_GRID:
        raise ValueError(f"grid is {grid}: give at least {_LEAST_GRID} points a side")
    positive_integer(draws, "draws")
    flat_params = torch.cat([value.reshape(-1) for value in posterior.unconstrained_params.values()])
    line = _line(path, flat_params)
    plane = _plane(posterior, over, flat_params, line, seed_number(seed))
    reach = (1.0 if len(line) == 1 else None) if span is None else span
    sides = None if reach is None else tuple(positive_number(s, "span") for s in np.broadcast_to(reach, 2).tolist())
    points = SurfaceGrid(points=grid, draws=draws, span=None if sides is None else (sides[0], sides[1]), seed=seed)
    return loss_surface(posterior.bound_model, posterior.data, plane, line, points, progress=progress)


def _line(path: Any, flat_params: Tensor) -> Tensor:
    """The path, (T, P), ending at the fitted θ."""
    if path is None:
        return flat_params[None]
    rows = torch.as_tensor(np.asarray(path), dtype=flat_params.dtype).to(flat_params.device)
    if rows.dim() != 2 or rows.shape[1] != len(flat_params) or not len(rows):
        raise ValueError(f"path has shape {tuple(rows.shape)}: give θ at some steps, (T, {len(flat_params)})")
    return rows if torch.equal(rows[-1], flat_params) else torch.cat([rows, flat_params[None]])


def _plane(posterior: Approximation, over: Sequence[Any] | None, flat_params: Tensor, line: Tensor, seed: int) -> Plane:
    params = posterior.bound_model.params
    if over is not None:
        return plane_of(params, flat_params, over)
    if len(flat_params) < 2:
        raise ValueError(f"θ has {len(flat_params)} numbers: a plane needs two")
    if len(flat_params) == 2:
        places = [(name, tuple(i)) for name, leaf in params.named(flat_params).items() for i in np.ndindex(*leaf.shape)]
        return plane_of(params, flat_params, places)
    return principal_plane(flat_params, line) if len(line) > 1 else random_plane(params, flat_params, seed)


def draw(surface: LossSurface, steps: Sequence[int] | None = None) -> Figure:
    """Bands of equal area by loss, the path with its start and end, and the grid's minimum."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 5.4), layout="constrained")
        axes = figure.subplots()
        above = surface.loss - np.nanmin(surface.loss)
        levels = np.unique(np.nanquantile(above, np.linspace(0, 1, LEVELS + 1)))
        if len(levels) > 2:
            norm = BoundaryNorm(levels.tolist(), 256)
            bands = axes.contourf(surface.x, surface.y, above, levels, cmap="Blues", norm=norm)
            axes.contour(surface.x, surface.y, above, levels, colors="white", linewidths=0.5)
            label = f"−ELBO above the lowest, {np.nanmin(surface.loss):.4g} (nats)"
            figure.colorbar(bands, ax=axes, label=label, format="%.3g", ticks=levels[::2])
        line = surface.path
        if len(line) > 1:
            axes.plot(*line.T, "-", color=ORANGE, lw=1.4, marker=".", ms=3.5)
            begin = "start" if steps is None else f"step {steps[0]}"
            axes.plot(*line[0], "o", mfc="white", mec=ORANGE, mew=1.6, ms=7, ls="none", label=begin, zorder=4)
        end = "fitted" if steps is None else f"fitted, step {steps[-1]}"
        axes.plot(*line[-1], "o", color=ORANGE, ms=7, ls="none", label=end, zorder=4)
        cross: dict[str, Any] = {"color": INK, "ms": 9, "mew": 1.8, "ls": "none", "zorder": 5, "clip_on": False}
        axes.plot(*surface.minimum, "x", label="lowest on the grid", **cross)
        axes.set(xlabel=surface.labels[0], ylabel=surface.labels[1])
        axes.set(xlim=surface.x[[0, -1]], ylim=surface.y[[0, -1]])
        figure.legend(loc="outside lower center", ncols=3)
        return figure
