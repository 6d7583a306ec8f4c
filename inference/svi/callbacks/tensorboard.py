"""Curves of a fit for TensorBoard."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from inference.storage.atomic_files import make_folder
from inference.svi.callbacks.base import CHUNK, Progress
from inference.utils.background_writer import Gathered
from inference.utils.validation import positive_integer

__all__ = ["TensorBoard"]

_QUEUE = 1000


@dataclass(frozen=True)
class _Point:
    """Values of one call; ``restart`` is 0 if the fit has only one."""

    restart: int
    step: int
    time: float
    means: tuple[float, float]
    histograms: list[Any]


class TensorBoard:
    """Callback that writes the scalars ``elbo``, ``loss`` and ``kl`` for ``tensorboard --logdir folder``.

    They are means over the steps since the ones before, in nats; ``kl`` is left
    out where the fit has none. Each fit adds an event file of its own; with
    restarts they lie in ``start_1``, ``start_2``, …. Needs the package
    tensorboard, ``pip install "kiln-ppl[watch]"``.

    Parameters
    ----------
    folder
        Made if it is not there.
    every
        Steps between two points.
    histograms
        Add one of each parameter, in the user's space, which costs about a tenth of a
        millisecond each.

    Raises
    ------
    ImportError
        If tensorboard is not installed; raised by the constructor.
    OSError
        Before the fit starts, if ``folder`` cannot be written.

    Examples
    --------
    >>> board = TensorBoard("runs/first", every=100)                               # doctest: +SKIP
    >>> posterior = fit(model, guide, x, y, callbacks=[board])                     # doctest: +SKIP
    """

    only_looks = True

    def __init__(self, folder: str | Path, every: int = CHUNK, *, histograms: bool = False) -> None:
        self.folder = Path(folder)
        self.every = positive_integer(every, "every")
        self.histograms = histograms
        self._board = _torch_board("torch.utils.tensorboard")
        self._summaries = _torch_board("torch.utils.tensorboard.summary")
        self._points: Gathered[_Point] | None = None
        self._writers: dict[int, Any] = {}

    def __enter__(self) -> TensorBoard:
        make_folder(self.folder)
        self._points = Gathered("tensorboard", self._write)
        return self

    def __call__(self, now: Progress) -> None:
        """Add a point to each curve."""
        if self._points is None:
            raise ValueError("TensorBoard is written while a fit runs: pass it in callbacks=[…]")
        summaries = []
        if self.histograms:
            values = now.layout.constrained(now.flat_params).items()
            summaries = [self._summaries.histogram(name, value.cpu().numpy(), "auto") for name, value in values]
        self._points.add(_Point(now.start if now.starts > 1 else 0, now.step, time.time(), now.means, summaries))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._points is not None:
            points, self._points = self._points, None
            try:
                points.close(quietly=error is not None)
            finally:
                for writer in self._writers.values():
                    writer.close()
                self._writers = {}

    def _write(self, points: Sequence[_Point]) -> None:
        """Append to the event files; runs in a thread."""
        value = self._summaries.Summary.Value
        for point in points:
            if point.restart not in self._writers:
                within = self.folder / f"start_{point.restart}" if point.restart else self.folder
                self._writers[point.restart] = self._board.FileWriter(str(within), max_queue=_QUEUE)
            loss, kl = point.means
            scalars = {"elbo": -loss, "loss": loss} | ({"kl": kl} if math.isfinite(kl) else {})
            curves = self._summaries.Summary(value=[value(tag=tag, simple_value=x) for tag, x in scalars.items()])
            for summary in (curves, *point.histograms):
                self._writers[point.restart].add_summary(summary, point.step, point.time)
        for writer in self._writers.values():
            writer.flush()


def _torch_board(module: str) -> Any:
    """Import a module of torch that needs the package tensorboard."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f'TensorBoard needs the package tensorboard ({error}): pip install "kiln-ppl[watch]", or use JsonLines'
        ) from error
