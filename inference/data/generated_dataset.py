"""Data that are drawn anew at every step, by a function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from inference.data.arguments import as_tensors, shape_of
from inference.utils.random_state import RandomStream, environment

__all__ = ["GeneratedBatches", "GeneratedDataset", "fresh"]


@dataclass(frozen=True)
class GeneratedDataset:
    """Data to be drawn by ``draw()`` at every step; made by :func:`fresh`."""

    draw: Callable[[], Any]


def fresh(draw: Callable[[], Any]) -> GeneratedDataset:
    """Data that ``draw()`` makes anew at each step, to be handed to ``fit`` in place of arrays.

    ``draw`` returns what ``fit`` takes, such as ``x, y``, of the same shapes
    each time. Drawn by torch's random numbers, it belongs to the compiled step;
    with NumPy's, or read from somewhere, the fit runs eagerly. The loss is that
    of one draw's rows; the posterior keeps those of the first as its data.

    >>> import torch
    >>> import kiln
    >>> from kiln.guides import mean_field_normal
    >>> from kiln.models import linear_regression
    >>> def points():
    ...     x = torch.rand(100, 1)
    ...     return x, x[:, 0].exp()
    >>> guide = mean_field_normal(linear_regression)
    >>> kiln.fit(linear_regression, guide, kiln.fresh(points), steps=10, progress=False).data[0].shape
    torch.Size([100, 1])
    """
    if not callable(draw):
        raise TypeError(f"fresh takes a function that draws the data, found {draw!r}")
    return GeneratedDataset(draw)


class GeneratedBatches:
    """Data of a ``source``: ``first`` as an example, then new data at every run of a guide and its model.

    ``by_torch`` says whether two draws from the same state of torch's random
    numbers alone are the same, so that nothing else is behind them.
    """

    def __init__(
        self, source: GeneratedDataset, names: Sequence[str], device: torch.device, dtype: torch.dtype, seed: int
    ) -> None:
        self.draw = source.draw
        self._device, self._dtype = device, dtype
        stream = RandomStream.seeded(seed)
        state = stream.state["torch"]
        with stream.active(), environment(device, dtype, validate=False):
            drawn = self._drawn()
            self.first = as_tensors(drawn, names[: len(drawn)], device, dtype)
            torch.set_rng_state(state)
            again = as_tensors(self._drawn(), names[: len(drawn)], device, dtype)
        self.by_torch = all(_is_same(*pair) for pair in zip(self.first, again, strict=True))
        self._shapes = [shape_of(value) for value in self.first]
        self._now = self.first

    def guide(self, guide: Callable[..., Any]) -> Callable[..., Any]:
        """``guide`` on new data, whatever it is called with."""
        return partial(_on_new, self, guide)

    def model(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """``model`` on the data that the guide had last."""
        return partial(_on_same, self, model)

    def next(self) -> tuple[Any, ...]:
        """New data."""
        drawn: list[Any] = []
        for value in self._drawn():
            if not isinstance(value, Tensor):
                drawn += as_tensors([value], ["fresh data"], self._device, self._dtype)
            elif value.is_floating_point():
                drawn.append(value.to(self._device, self._dtype))
            else:
                drawn.append(value.to(self._device))
        shapes = [shape_of(value) for value in drawn]
        if shapes != self._shapes:
            raise ValueError(f"fresh data had shapes {self._shapes} first, now {shapes}: draw as many rows each time")
        self._now = tuple(drawn)
        return self._now

    @property
    def now(self) -> tuple[Any, ...]:
        """The data drawn last."""
        return self._now

    def _drawn(self) -> tuple[Any, ...]:
        drawn = self.draw()
        return tuple(drawn) if isinstance(drawn, tuple | list) else (drawn,)


def _on_new(feed: GeneratedBatches, guide: Callable[..., Any], *_: Any) -> Any:
    return guide(*feed.next())


def _on_same(feed: GeneratedBatches, model: Callable[..., Any], *_: Any) -> Any:
    return model(*feed.now)


def _is_same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return True
    return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
