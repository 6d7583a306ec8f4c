"""The loss over a plane in the space of the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from tqdm.auto import tqdm

from inference.model.bound_model import BoundModel, set_training
from inference.model.elbo import log_weight, traces
from inference.model.parameters import Params
from inference.model.vectorization import draws_together, map_over_draws
from inference.utils.random_state import RandomStream

__all__ = ["LossSurface", "Plane", "SurfaceGrid", "loss_surface", "plane_of", "principal_plane", "random_plane"]

_MARGIN = 0.15  # of the path's extent, on each side
_NARROWEST = 0.1  # of the wider side


@dataclass(frozen=True)
class Plane:
    """θ = origin + a·u + b·v: ``origin`` (P,), ``directions`` (2, P), and what the axes are called."""

    origin: Tensor
    directions: Tensor
    labels: tuple[str, str]

    def point(self, a: float, b: float) -> Tensor:
        """θ, shape (P,)."""
        return self.origin + a * self.directions[0] + b * self.directions[1]

    def project(self, points: Tensor) -> np.ndarray:
        """(a, b) of the point in the plane nearest to each θ, (T, P) → (T, 2)."""
        return ((points - self.origin) @ torch.linalg.pinv(self.directions)).cpu().numpy()


@dataclass(frozen=True)
class LossSurface:
    """−ELBO in nats, ``loss[j, i]`` at (``x[i]``, ``y[j]``); the last row of ``path``, (T, 2), is the fitted point."""

    x: np.ndarray
    y: np.ndarray
    loss: np.ndarray
    path: np.ndarray
    labels: tuple[str, str]

    @property
    def minimum(self) -> tuple[float, float]:
        """The point of the grid at which the loss is lowest."""
        j, i = np.unravel_index(np.nanargmin(self.loss), self.loss.shape)
        return float(self.x[i]), float(self.y[j])

    @property
    def cell(self) -> tuple[float, float]:
        """Width and height of a cell of the grid."""
        return float(self.x[1] - self.x[0]), float(self.y[1] - self.y[0])


@dataclass(frozen=True, kw_only=True)
class SurfaceGrid:
    """Grid of ``points`` × ``points`` at which a loss is evaluated, as the mean over ``draws`` of noise from ``seed``.

    It reaches ``span`` to each side of the fitted point, or else as far as the path does and a little further.
    """

    points: int = 31
    draws: int = 16
    span: tuple[float, float] | None = None
    seed: int = 0

    def axes(self, line: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the coordinates of the points along both directions, round a path (T, 2) to the fitted point."""
        if self.span is not None:
            middle, half = line[-1], np.array(self.span)
        else:
            low, high = line.min(0), line.max(0)
            widths = high - low
            widths = np.maximum(widths, _NARROWEST * widths.max()) if widths.max() > 0 else np.full(2, 2.0)
            middle, half = (low + high) / 2, (0.5 + _MARGIN) * widths
        x, y = (np.linspace(m - h, m + h, self.points) for m, h in zip(middle, half, strict=True))
        return x, y


def plane_of(params: Params, flat_params: Tensor, over: Sequence[Any]) -> Plane:
    """The plane over two numbers in θ, named ``"name"`` or ``("name", index)``, or along two vectors (P,).

    Raises
    ------
    ValueError
        If it is not two of them, a name or an index is not there, or both are the same.
    """
    if len(over) != 2:
        raise ValueError(f"over has {len(over)} entries: give two parameters or two directions")
    named = all(isinstance(e, str) or (isinstance(e, tuple) and len(e) == 2 and isinstance(e[0], str)) for e in over)
    if not named:
        vectors = [
            torch.as_tensor(entry, dtype=flat_params.dtype, device=flat_params.device).reshape(-1) for entry in over
        ]
        for vector in vectors:
            if vector.shape != flat_params.shape:
                raise ValueError(f"a direction has {len(vector)} numbers, θ has {len(flat_params)}: give one for each")
        return _checked(Plane(flat_params, torch.stack(vectors), ("first direction", "second direction")))
    places = [_locate(params, entry) for entry in over]
    directions = torch.zeros(2, len(flat_params), dtype=flat_params.dtype, device=flat_params.device)
    origin = flat_params.clone()
    for row, (place, _) in enumerate(places):
        directions[row, place] = 1.0
        origin[place] = 0.0
    return _checked(Plane(origin, directions, (places[0][1], places[1][1])))


def principal_plane(flat_params: Tensor, path: Tensor) -> Plane:
    """The plane through θ along the two directions in which the optimiser's ``path``, (T, P), lies most.

    They are the first right singular vectors of the rows θₜ − θ, turned so that the path leads upwards on both axes.

    Li, Xu, Taylor, Studer, Goldstein (2018), Visualizing the loss landscape of neural nets, section 7.
    """
    rows = path - flat_params
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    signs = torch.where(directions[:2] @ rows[0] > 0, -1.0, 1.0)
    shares = (100 * sizes.square() / sizes.square().sum().clamp_min(1e-30)).tolist()
    names = ("first", "second")
    labels = [f"{names[i]} principal direction of the path ({shares[i]:.1f} %)" for i in range(2)]
    return Plane(flat_params, signs[:, None] * directions[:2], (labels[0], labels[1]))


def random_plane(params: Params, flat_params: Tensor, seed: int) -> Plane:
    """The plane through θ along two random directions, each row of each parameter as long as it is in θ.

    So the axes are in units of the parameters' own size, layer by layer; a
    parameter of one dimension counts as one row.

    Li, Xu, Taylor, Studer, Goldstein (2018), Visualizing the loss landscape of neural nets, section 4.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(2, len(flat_params), generator=generator, dtype=torch.float64).to(flat_params)
    for direction in directions:
        for part, own in zip(params.views(direction), params.views(flat_params), strict=True):
            rows, sizes = (t.reshape(len(t) if t.dim() > 1 else 1, -1) for t in (part, own))
            norms = [t.norm(dim=1, keepdim=True) for t in (rows, sizes)]
            part.copy_((rows * norms[1] / norms[0]).reshape(part.shape))
    return Plane(flat_params, directions, ("first random direction", "second random direction"))


def loss_surface(
    bound_model: BoundModel,
    args: tuple[Any, ...],
    plane: Plane,
    path: Tensor,
    grid: SurfaceGrid,
    *,
    progress: bool = True,
) -> LossSurface:
    """Evaluate −ELBO on a grid of points of a plane, round ``path`` (T, P), whose last row is the fitted θ.

    Each number is the mean over the same draws of noise, so that points differ by θ alone.
    """
    line = plane.project(path)
    x, y = grid.axes(line)
    found = np.empty((grid.points, grid.points))
    training = isinstance(bound_model.guide, nn.Module) and bound_model.guide.training
    set_training(bound_model.guide, True)
    try:
        with tqdm(total=grid.points**2, desc="loss", unit="point", delay=1, leave=False, disable=not progress) as bar:
            for j, b in enumerate(y):
                for i, a in enumerate(x):
                    found[j, i] = _loss(bound_model, args, plane.point(a, b), grid)
                bar.update(grid.points)
    finally:
        set_training(bound_model.guide, training)
    return LossSurface(x, y, np.where(np.isfinite(found), found, np.nan), line, plane.labels)


def _loss(bound_model: BoundModel, args: tuple[Any, ...], flat_params: Tensor, grid: SurfaceGrid) -> float:
    def run(_: object) -> Tensor:
        return -log_weight(*traces(bound_model.model, bound_model.guide, args))

    with (
        torch.enable_grad(),
        bound_model.running(flat_params, RandomStream.seeded(grid.seed)),
    ):  # a model may ask whether there is one
        if grid.draws == 1 or bound_model.is_delta:
            return run(None).item()
        return float(map_over_draws(run, {}, grid.draws, draws_together(args)).mean())


def _locate(params: Params, entry: Any) -> tuple[int, str]:
    """Return where in the flat vector a number is, and what to call it.

    ``entry`` is the name of a scalar parameter, or a name with an index.
    """
    name, index = (entry, ()) if isinstance(entry, str) else entry
    if name not in params.names:
        raise ValueError(f"there is no parameter {name!r}: give one of {list(params.names)}")
    which = params.names.index(name)
    shape = tuple(params.leaves[which].shape)
    given = tuple(index) if isinstance(index, Sequence) else (index,)
    if not shape and not isinstance(entry, str) and given == (0,):
        given = ()  # the one number of a scalar
    if len(given) != len(shape) or not all(-n <= i < n for i, n in zip(given, shape, strict=True)):
        raise ValueError(f"{name} has shape {shape}: give one number of it as ({name!r}, index), not {entry!r}")
    before = sum(leaf.numel() for leaf in params.leaves[:which])
    positive = [i % n for i, n in zip(given, shape, strict=True)]
    inside = int(np.ravel_multi_index(positive, shape)) if shape else 0
    label = f"{name}[{', '.join(map(str, given))}]" if given else name
    kind = params.constraints[which]
    while isinstance(kind, constraints.independent):
        kind = kind.base_constraint
    return before + inside, label if kind is constraints.real else f"{label}, unconstrained"


def _checked(plane: Plane) -> Plane:
    if torch.linalg.matrix_rank(plane.directions) < 2:
        raise ValueError(f"{plane.labels[0]} and {plane.labels[1]} are one direction: give two that span a plane")
    return plane
