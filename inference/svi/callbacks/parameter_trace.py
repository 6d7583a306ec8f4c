"""Path of the parameters through a fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from inference.model.parameters import Params
from inference.reporting.figures.style import STYLE
from inference.svi.callbacks.base import CHUNK, Progress, settled
from inference.utils.validation import positive_integer, positive_number

__all__ = ["ParameterTrace"]

_PANELS, _LINES, _COLUMNS = 12, 30, 3


@dataclass
class _Path:
    """θ of one restart of a fit, every ``stride`` calls, and its losses."""

    layout: Params
    names: Sequence[str] | None = None
    steps: list[int] = field(default_factory=list)
    points: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    stride: int = 1
    calls: int = 0
    last: tuple[int, Tensor] | None = None
    finished: bool = False

    def add(self, now: Progress, megabytes: float) -> None:
        flat_params = now.flat_params
        if self.names is not None:
            views = dict(zip(now.layout.names, now.layout.views(flat_params), strict=True))
            flat_params = torch.cat([views[name].reshape(-1) for name in self.names])
        flat_params = flat_params.cpu()
        most = max(2, int(megabytes * 2**20 / max(1, flat_params.nbytes)))
        self.losses.append(now.losses)
        self.last, self.finished = (now.step, flat_params), now.step == now.steps
        self.calls += 1
        if self.calls % self.stride == 0:
            self.steps.append(now.step)
            self.points.append(flat_params)
        if len(self.points) > most:
            self.steps, self.points = self.steps[1::2], self.points[1::2]
            self.stride *= 2

    def whole(self) -> tuple[list[int], list[Tensor]]:
        """Return steps and points, with the latest ones at the end."""
        if self.last is None or self.last[0] in self.steps[-1:]:
            return self.steps, self.points
        return [*self.steps, self.last[0]], [*self.points, self.last[1]]


class ParameterTrace:
    """Callback that keeps θ along the way: ``trace["loc"]``, (T, *shape), at ``trace.steps``, (T,).

    Only copies of θ are made while the fit runs; values in the user's space are
    computed when they are read. With restarts the path is that of the restart
    with the best ELBO of those that have ended, as the posterior is. Each fit
    starts the trace anew.

    Parameters
    ----------
    names
        Keep these parameters alone, and let ``flat_params`` hold no others; all if left out.
    every
        Steps between two points; the last step has one too.
    megabytes
        The most memory for the points of one restart: where they would take more, every second
        is dropped, and those that follow are taken half as often. Losses are kept
        beside, 4 or 8 bytes a step.

    Raises
    ------
    ValueError
        At the first point, if there is no parameter of a given name; and when
        an empty trace is read.

    Examples
    --------
    >>> import torch
    >>> import kiln
    >>> from kiln.guides import mean_field_normal
    >>> from kiln.models import linear_regression
    >>> x, trace = torch.linspace(-1, 1, 20).reshape(-1, 1), kiln.ParameterTrace()
    >>> guide = mean_field_normal(linear_regression)
    >>> _ = kiln.fit(linear_regression, guide, x, x[:, 0], steps=250, callbacks=[trace], progress=False)
    >>> trace.steps.tolist(), trace.flat_params.shape
    ([100, 200, 250], (3, 6))
    >>> trace.names[:2]
    ('AutoNormal.locs.weights', 'AutoNormal.scales.weights')
    >>> bool((trace["AutoNormal.scales.weights"] > 0).all())
    True
    """

    only_looks = True

    def __init__(self, names: Sequence[str] | None = None, every: int = CHUNK, *, megabytes: float = 256) -> None:
        self._wanted = [names] if isinstance(names, str) else names
        self.every = positive_integer(every, "every")
        self.megabytes = positive_number(megabytes, "megabytes")
        self._paths: dict[int, _Path] = {}

    def __enter__(self) -> ParameterTrace:
        self._paths = {}
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: what was kept stays, also of a fit that failed."""

    def __call__(self, now: Progress) -> None:
        """Keep θ."""
        if now.start not in self._paths:
            layout = now.layout if self._wanted is None else now.layout.only(self._wanted)
            self._paths[now.start] = _Path(layout, self._wanted)
        self._paths[now.start].add(now, self.megabytes)

    @property
    def steps(self) -> np.ndarray:
        """Steps at which θ was kept, (T,)."""
        return np.array(self._best.whole()[0])

    @property
    def flat_params(self) -> np.ndarray:
        """θ, unconstrained, all parameters in one vector, (T, P)."""
        return torch.stack(self._best.whole()[1]).numpy()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return self._best.layout.names

    def __getitem__(self, name: str) -> np.ndarray:
        path = self._best
        return np.stack([path.layout.constrained(flat_params, [name])[name].numpy() for flat_params in path.whole()[1]])

    def plot(self, names: Sequence[str] | None = None) -> Figure:
        """Plot each parameter by step in a panel, in the user's space, up to 30 of its numbers, evenly chosen."""
        shown = self._best.layout.known([names] if isinstance(names, str) else names or self.names)[:_PANELS]
        columns = min(_COLUMNS, len(shown))
        with rc_context(STYLE):
            rows = -(-len(shown) // columns)
            figure = Figure(figsize=(3.2 * columns, 2.1 * rows + 0.2), layout="constrained")
            for axes, name in zip_longest(figure.subplots(rows, columns, squeeze=False).flat, shown):
                if name is None:
                    axes.set_visible(False)
                    continue
                values = self[name].reshape(len(self.steps), -1)
                few = np.unique(np.linspace(0, values.shape[1] - 1, min(_LINES, values.shape[1])).astype(int))
                axes.plot(self.steps, values[:, few], lw=0.9)
                axes.set_title(name, fontsize=8)
                axes.tick_params(labelsize=8)
            figure.supxlabel("step", fontsize=9)
        return figure

    @property
    def _best(self) -> _Path:
        if not self._paths:
            raise ValueError("the trace is empty: fit with it in callbacks=[…] first")
        ended = [path for path in self._paths.values() if path.finished]
        return min(ended or self._paths.values(), key=lambda path: settled(torch.cat(path.losses)))
