"""A function of one draw of the latents run for many draws: together where it can be, one by one where not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from inference.data.arguments import row_count
from inference.utils.random_state import RandomStream

__all__ = [
    "VMAP_ERRORS",
    "BlockSize",
    "MemoryProbe",
    "affordable",
    "draws_together",
    "map_over_draws",
    "may_be_of_vmap",
    "remembering",
    "rows_together",
    "together",
]

# What torch.func raises for a branch on a value and for an operator without a batching rule; the latter may be a
# warning, which the user's filters may turn into an error.
VMAP_ERRORS = (RuntimeError, UserWarning)

_NUMBERS = 2**22  # of the data, times draws: what is run together
_STREAMED = 2**21  # of a tensor, where memory may not grow
_NARROW = 256  # a row of fewer numbers counts as this many, for the layers of a network behind it
_PATIENCE = 2e11  # rows, times draws, times parameters, that nobody has to be asked about: some ten seconds

Run = Callable[[dict[str, Tensor]], Any]
Latents = Mapping[str, Tensor]

_ONE_BY_ONE: ContextVar[set[Hashable] | None] = ContextVar("kiln_one_by_one", default=None)


@contextmanager
def remembering(one_by_one: set[Hashable]) -> Iterator[None]:
    """Inside the block :func:`map_over_draws` keeps in this set which functions run once for each draw."""
    outside = _ONE_BY_ONE.get()
    _ONE_BY_ONE.set(one_by_one)
    try:
        yield
    finally:
        _ONE_BY_ONE.set(outside)


def draws_together(args: tuple[Any, ...]) -> int:
    """Return the number of draws to run together on all rows of this data in bounded memory."""
    return max(1, _pairs(args) // (row_count(args) or 1))


def rows_together(args: tuple[Any, ...], draws: int) -> int:
    """Return the number of rows to run together at all draws in bounded memory."""
    return max(1, _pairs(args) // draws)


def _pairs(args: tuple[Any, ...]) -> int:
    """Rows times draws."""
    widths = [value.numel() // len(value) for value in args if isinstance(value, Tensor) and value.dim()]
    return _NUMBERS // max([_NARROW, *widths])


def affordable(rows: int, parameters: int, most: int) -> tuple[int, int]:
    """Return the rows, and the draws up to ``most``, that a model of so many parameters predicts in ten seconds.

    Fewer draws first, down to 50, then fewer rows.

    >>> affordable(442, 300, 1000), affordable(60_000, 2_200_000, 1000)
    ((442, 1000), (1818, 50))
    """
    work = max(2000, parameters)
    draws = max(min(50, most), min(most, int(_PATIENCE / (rows * work))))
    return min(rows, int(_PATIENCE / (draws * work))), draws


def map_over_draws(run: Run, latents: Latents, draws: int, at_once: int) -> Any:
    """``run`` at each of S ``latents``, ``{site: (S, *site shape)}``, its tensors stacked on the CPU as (S, …).

    Up to ``at_once`` draws are run together by ``torch.vmap``, in which what
    does not depend on the draw is computed once, and random numbers differ from
    draw to draw. Where the function branches on values, has an operator without
    a batching rule, or draws by other means than torch's, it runs once for each,
    from the random numbers on that it began with. Inside :func:`remembering` the
    first such call decides for all calls of the same form. Any other error of
    the function is raised as it is, and so is that memory ran out.
    """
    one_by_one, form = _ONE_BY_ONE.get(), _form(run, latents)
    if one_by_one is None or form not in one_by_one:
        before = RandomStream.current()
        try:
            return _stacked(together(run, latents, draws, at_once))
        except VMAP_ERRORS as error:
            if not may_be_of_vmap(error):
                raise
        before.make_current()
    found = _stacked([_cpu(tree_map(lambda v: v[None], run(_part(latents, i)))) for i in range(draws)])
    if one_by_one is not None:
        one_by_one.add(form)
    return found


def may_be_of_vmap(error: Exception) -> bool:
    """Return True if ``torch.vmap`` may have raised this one of the ``VMAP_ERRORS``, which a loop may not raise."""
    if isinstance(error, UserWarning):
        return "performance drop" in str(error)
    return not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error))


def _form(run: Run, latents: Latents) -> Hashable:
    """Key of the function and the kind of its data, shapes included, as a model may branch on them.

    What was called before must not change a result, so two calls share a key
    only if ``torch.vmap`` takes both or neither.
    """
    captured = [_kind(cell.cell_contents) for cell in getattr(run, "__closure__", None) or ()]
    return _kind(run), *captured, *((name, value.shape[1:]) for name, value in latents.items())


def _kind(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, tuple | list):
        return tuple(map(_kind, value))
    if isinstance(value, dict):
        return tuple((name, _kind(part)) for name, part in value.items())
    if isinstance(value, partial):
        return _kind(value.func), _kind(value.args), _kind(value.keywords)
    if value is None or isinstance(value, bool | int | str):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def together(run: Run, latents: Latents, draws: int, at_once: int) -> list[Any]:
    """``run`` at S latents by ``torch.vmap``, its tensors on the CPU, in parts of up to ``at_once`` draws."""
    parts = []
    for begin in range(0, draws, at_once):
        indices = torch.arange(begin, min(draws, begin + at_once))
        before = _other_generators()
        parts.append(_cpu(torch.vmap(_Apart.of(run), randomness="different")(indices, _part(latents, indices))))
        if _other_generators() != before:
            raise RuntimeError("random numbers that torch did not draw, which would be the same for all draws")
    return parts


class BlockSize(NamedTuple):
    """Number of ``rows`` to finish before the next ones, and of ``draws`` to run on them together."""

    rows: int
    draws: int

    @classmethod
    def bounded(cls, seen: MemoryProbe, kept: float, draws: int, rows: int, most: int | None) -> BlockSize:
        """Such that no tensor has more than 2²¹ numbers, on the way those ``seen``, at last ``kept`` a row and draw.

        Of S ``draws`` all are kept at the rows at hand, no more than ``most`` of the
        ``rows`` that there are, and as many in each block.

        >>> seen = MemoryProbe(rows=1)
        >>> with seen:
        ...     hidden = torch.zeros(1, 2) @ torch.zeros(2, 10)
        >>> BlockSize.bounded(seen, kept=1, draws=1000, rows=10**6, most=None)
        BlockSize(rows=2097, draws=100)
        """
        pairs = max(1, int(_STREAMED / max(seen.of_row, 1)))
        fitting = max(1, min(int(_STREAMED / (draws * max(kept, 1))), pairs, most or rows))
        even = math.ceil(rows / math.ceil(rows / fitting))
        return cls(even, max(1, min(pairs // even, _STREAMED // max(seen.of_draw, 1))))


class MemoryProbe(TorchFunctionMode):
    """The largest tensors that torch has made in this block, where a model runs at one draw on ``rows`` rows.

    ``of_row`` is how many numbers a row the largest has that has rows, ``of_draw`` how many any other.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows
        self.of_row = 0.0
        self.of_draw = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at what ``func`` returns."""
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor) and self._rows in value.shape:
                self.of_row = max(self.of_row, value.numel() / self._rows)
            elif isinstance(value, Tensor):
                self.of_draw = max(self.of_draw, value.numel())
        return found


class _Apart(TorchFunctionMode):
    """Inside ``torch.vmap``, memory for random numbers is of each draw alone, so that it can be filled in place."""

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self._index = index

    @classmethod
    def of(cls, run: Run) -> Callable[[Tensor, Latents], Any]:
        """``run`` with the index of the draw in front."""

        def apart(index: Tensor, latents: Latents) -> Any:
            with cls(index):
                return run(dict(latents))

        return apart

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make what ``torch.empty`` and ``Tensor.new`` return depend on the draw."""
        value = func(*args, **(kwargs or {}))
        if func is torch.empty or func is Tensor.new:
            return self._index.new_empty(value.shape, dtype=value.dtype, device=value.device)
        return value


def _part(latents: Latents, index: Any) -> dict[str, Tensor]:
    return {name: value[index] for name, value in latents.items()}


def _other_generators() -> tuple[Any, ...]:
    _, keys, place, *_ = np.random.get_state()  # noqa: NPY002 - a model may use it
    return np.asarray(keys).tobytes(), place, random.getstate()


def _cpu(values: Any) -> Any:
    return tree_map(lambda value: value.detach().cpu(), values)


def _stacked(parts: list[Any]) -> Any:
    return tree_map(lambda *values: torch.cat(values), *parts)
