"""What one of several processes does in each step: a part of the rows, with a weight, and noise that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from inference.data.arguments import row_count
from inference.engine.process_group import ProcessGroup, spoken, total
from inference.engine.tracing.random_ops import CountRandomOps
from inference.model.elbo import Model, traces
from inference.model.sites import observed_nodes, refuse_broadcast
from inference.model.subsampling import Subsampling, rows_from
from inference.utils.errors import NonFinite, problem_of
from inference.utils.random_state import RandomStream

__all__ = ["DataParallel", "fixed_plates", "shard_of"]


def shard_of(rows: int, rank: int, count: int) -> range:
    """The part of ``rows`` rows that one of ``count`` processes has: in order, and as even as can be.

    >>> [shard_of(10, rank, 4) for rank in range(4)]
    [range(0, 2), range(2, 5), range(5, 7), range(7, 10)]

    Raises
    ------
    ValueError
        If there are more processes than rows.
    """
    if rows < count:
        words = f"{count} processes share {rows} rows a step: give each at least one, or start fewer"
        raise spoken(ValueError(words), 0)
    return range(rows * rank // count, rows * (rank + 1) // count)


@dataclass(frozen=True)
class DataParallel:
    """The part of this process in each step of B = ``rows`` rows.

    With Bᵣ rows at process r of R, the plates over the rows scale by N/Bᵣ, so that

        loss = Σᵣ (Bᵣ/B) lossᵣ

    is the loss of all B rows, to rounding; so is its gradient. All processes draw
    the same rows and the same latents, from the same random stream. Where single
    rows have random numbers of their own (an encoder's, masks of dropout) they
    cannot: each process has noise of its ``own``, seeded by a number of that
    stream and r. The loss is then an estimate of the same ELBO by other numbers
    than one process draws.
    """

    group: ProcessGroup
    rows: int
    own: bool = False

    @property
    def part(self) -> range:
        """The places of its rows among those of a step."""
        return shard_of(self.rows, self.group.rank, self.group.count)

    @property
    def weight(self) -> float:
        """Bᵣ/B."""
        return len(self.part) / self.rows

    def cut(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Its part of arguments of B rows each; what is no tensor of B rows stays as it is."""
        part = self.part
        rows = [isinstance(value, Tensor) and value.dim() > 0 and len(value) == self.rows for value in args]
        return tuple(value[part.start : part.stop] if cut else value for value, cut in zip(args, rows, strict=True))

    def total(self, grad: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient, (P,), and loss, (2,), of all processes together, by one exchange."""
        both = total(torch.cat([grad, value.detach()]) * self.weight)
        return both[:-2], both[-2:]

    def seed(self) -> int:
        """A number of the common stream, where the noise is its own; torch's generator must be there."""
        return int(torch.randint(2**32, (), device="cpu"))

    @contextmanager
    def noise(self, seed: int) -> Iterator[None]:
        """Inside the block random numbers are this process's own, but for the choice of rows."""
        with RandomStream.seeded(seed, self.group.rank + 1).active(), rows_from(torch.Generator().manual_seed(seed)):
            yield

    def drawing(self) -> AbstractContextManager[None]:
        """As :meth:`noise` by a new number of the common stream, where noise is its own."""
        return self.noise(self.seed()) if self.own else nullcontext()

    def checked(self, batch: Subsampling, model: Model, guide: Model, args: tuple[Any, ...]) -> DataParallel:
        """The share, knowing whether rows have noise, by runs of the model on all rows and on its part.

        Raises
        ------
        ValueError
            If the model has no plate over the rows, or does not let it choose them.
        """
        whole = Subsampling(batch.rows, batch.batch_size, fixed=batch.fixed)
        with CountRandomOps() as all_rows:
            traces(whole(model), whole(guide), args)
        with CountRandomOps() as part:
            problem = self._problem(batch, model, guide, args)
        problem = self.group.told(problem)
        if problem is not None:
            raise spoken(ValueError(problem), 0)
        return replace(self, own=bool(self.group.most(int(part.numbers != all_rows.numbers))[0]))

    def _problem(self, batch: Subsampling, model: Model, guide: Model, args: tuple[Any, ...]) -> str | None:
        """Why its part of the rows cannot be all that the model is given, if so."""
        try:
            model_trace, _ = traces(batch(model), batch(guide), args)
            for name, node in observed_nodes(model_trace).items():
                refuse_broadcast(name, node)
        except (ValueError, RuntimeError, IndexError) as error:
            return (
                f"{self.group.count} processes share the rows of pyro.plate('data', len(x)), but the model does not "
                f"run on a part of them ({problem_of(error)}): write `pyro.subsample(x, event_dim=1)` for what it uses "
                "in the plate"
            )
        try:
            batch.require_use()
        except ValueError as error:
            return str(error)
        return None

    def refuse(self, changed: list[str]) -> None:
        """Raise a ValueError if a callback, of which there is one process's alone, changed what the model reads."""
        if changed:
            raise ValueError(
                f"a callback changed {changed}, which the other {self.group.count - 1} processes do not see: "
                "fit in one process, or let the model compute it"
            )

    def agreed(self, find: Callable[[], NonFinite]) -> NonFinite:
        """What ended the fit, where ``find`` looks for it in the rows of one process and may see nothing."""
        try:
            mine = find()
        except NonFinite as error:
            mine = error
        words = f"{mine} (seen by process {self.group.rank} of {self.group.count} in its part of the rows)"
        seen = [words, mine.site, mine.parameter]
        found = self.group.told(None if mine.site is None else seen)  # all see the parameter that it made so
        found = found or self.group.told([str(mine), None, mine.parameter])
        words, site, parameter = found
        return spoken(NonFinite(words, mine.step, site=site, parameter=parameter), 0)


def fixed_plates(model: Model, args: tuple[Any, ...]) -> frozenset[str]:
    """The plates of N places that do not follow the N rows, by a run on one row less; none where it cannot run so."""
    fewer = tuple(value[:-1] if isinstance(value, Tensor) and value.dim() else value for value in args)
    try:
        nodes = poutine.trace(model).get_trace(*fewer).nodes
    except (ValueError, RuntimeError, IndexError):
        return frozenset()
    sizes = {name: node["fn"].size for name, node in nodes.items() if site_is_subsample(node)}
    return frozenset(name for name, size in sizes.items() if size == row_count(args))
