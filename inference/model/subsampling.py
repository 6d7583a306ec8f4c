"""Mini-batches for a model that writes its data plate the ordinary way."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

__all__ = ["SubsampleScale", "Subsampling", "rows_from"]

_NO_SHAPE = torch.Size()
_SHUFFLED = 4096  # rows up to which all of them are shuffled for many steps at once
_ROWS: ContextVar[torch.Generator | None] = ContextVar("kiln_rows", default=None)


@contextmanager
def rows_from(generator: torch.Generator) -> Iterator[None]:
    """Inside the block rows are chosen by ``generator`` in place of torch's own; on a CPU."""
    token = _ROWS.set(generator)
    try:
        yield
    finally:
        _ROWS.reset(token)


@torch.library.custom_op("kiln::subset", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _subset(rows: int, size: int) -> Tensor:
    """``size`` distinct rows of ``rows``, in a time that does not grow with ``rows``; seeded by torch's generator."""
    return _subsets(1, rows, size)[0]


def _subsets(count: int, rows: int, size: int) -> Tensor:
    """The rows of ``count`` steps, (count, size)."""
    generator = np.random.default_rng(int(torch.randint(2**63 - 1, (), device="cpu", generator=_ROWS.get())))
    if rows <= _SHUFFLED:
        whole = generator.permuted(np.broadcast_to(np.arange(rows), (count, rows)), axis=1)
        return torch.from_numpy(np.ascontiguousarray(whole[:, :size]))
    if size > rows // 4:
        chosen = [generator.choice(rows, size, replace=False, shuffle=False) for _ in range(count)]
        return torch.from_numpy(np.stack(chosen))
    return torch.from_numpy(_distinct(generator, count, rows, size))


def _distinct(generator: np.random.Generator, count: int, rows: int, size: int) -> np.ndarray:
    """Rows drawn with replacement, those that came twice drawn again until none has: every subset is as likely."""
    chosen = np.sort(generator.integers(0, rows, (count, size)), axis=1)
    steps = np.arange(count)
    while len(steps):
        some = chosen[steps]
        twice = np.zeros(some.shape, bool)
        np.equal(some[:, 1:], some[:, :-1], out=twice[:, 1:])
        left = twice.any(1)
        steps, some, twice = steps[left], some[left], twice[left]
        some[twice] = generator.integers(0, rows, np.count_nonzero(twice))
        chosen[steps] = np.sort(some, axis=1)
    return chosen


torch.ops.kiln.subset.default.many = _subsets  # type: ignore[attr-defined]


class _Subset(_Subsample):
    """Pyro's choice of rows, which shuffles all of them, without the shuffle; of the rows chosen the ``part``."""

    def __init__(self, size: int, subsample_size: int, part: range | None) -> None:
        super().__init__(size, subsample_size)
        self.part = part

    def sample(self, sample_shape: torch.Size = _NO_SHAPE) -> Tensor:
        """Rows drawn without replacement, shape (B,)."""
        if self.subsample_size >= self.size or torch.device(self.device).type != "cpu":
            chosen = super().sample(sample_shape)
        else:
            chosen = _subset(self.size, self.subsample_size)
        if self.part is None:
            return chosen
        places = torch.arange(self.part.start, self.part.stop, device=chosen.device)
        return chosen.index_select(0, places)


_Subset.__name__ = _Subsample.__name__  # Pyro tells such sites by the name of their class


class Subsampling(Messenger):
    """Give each plate of ``rows`` rows a fresh random subset of ``batch_size`` of them.

    A plate that names its own ``subsample_size`` keeps it. Pyro then scales the
    densities inside by N/B, so the mini-batch ELBO is unbiased for the full one.
    With a ``part`` only those of the rows chosen are used, and B is their number.
    Plates that are ``fixed``, by name, have N rows by chance, and keep them.
    """

    def __init__(
        self, rows: int, batch_size: int, part: range | None = None, fixed: Collection[str] = frozenset()
    ) -> None:
        super().__init__()
        self.part = part
        self.fixed = fixed
        self.rows = rows
        self.batch_size = min(batch_size, rows)
        self.plates: set[str] = set()
        self.others: dict[str, int] = {}

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if not isinstance(fn, _Subsample) or msg["value"] is not None:
            return
        if fn.size != self.rows or fn.subsample_size is not None or msg["name"] in self.fixed:
            self.others[msg["name"]] = fn.size
            return
        msg["fn"] = _Subset(self.rows, self.batch_size, self.part)
        self.plates.add(msg["name"])

    def require_use(self) -> None:
        """Raise a ValueError if the model had no plate over the rows."""
        if not self.plates:
            raise ValueError(
                f"{'batch_size' if self.part is None else 'a fit by several processes'} needs a pyro.plate of "
                f"{self.rows} rows, found plates {self.others or 'none'}: write "
                "`with pyro.plate('data', len(x)):` and `pyro.subsample(x, event_dim=1)` in the model"
            )


class SubsampleScale(Messenger):
    """Count what is inside the plates over the rows ``factor`` times, N/B where B rows stand for N.

    Those plates are the ones that have another size where there are other rows:
    :meth:`seen` is to run on two numbers of them.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.sizes: dict[str, set[int]] = {}

    @property
    def plates(self) -> set[str]:
        """The plates over the rows."""
        return {name for name, sizes in self.sizes.items() if len(sizes) > 1}

    def is_of_rows(self, site: Any) -> bool:
        """Return True if a site lies inside a plate over the rows."""
        return any(len(self.sizes.get(frame.name, ())) > 1 for frame in site["cond_indep_stack"])

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if isinstance(fn, _Subsample):
            self.sizes.setdefault(msg["name"], set()).add(fn.size)
        elif self.is_of_rows(msg):
            msg["scale"] = msg["scale"] * self.factor

    def require_use(self, model_trace: Any, rows: int) -> None:
        """Raise a ValueError if the model observes rows outside of a plate over them.

        A plate of all ``rows`` with the batch as its subsample has its scale already.
        """
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample" or not site["is_observed"] or self.is_of_rows(site):
                continue
            if any(frame.full_size == rows for frame in site["cond_indep_stack"]):
                continue
            raise ValueError(
                f"the site {name!r} observes rows outside of a plate over them, so that a batch cannot stand for all "
                f"{rows:,}: write `with pyro.plate('data', len(x)):` around it in the model"
            )
