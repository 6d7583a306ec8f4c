"""The curves of a fit for TensorBoard."""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from inference import storage
from inference.arguments import positive_integer
from inference.watch import CHUNK, Progress

__all__ = ["TensorBoard"]

_FLUSH_SECONDS = 5


class TensorBoard:
    """A callback that writes the scalars ``elbo``, ``loss`` and ``kl`` for ``tensorboard --logdir folder``.

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
        If tensorboard is not installed, when this is made.
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
        self._writer: Any = None
        self._start = 0

    def __enter__(self) -> TensorBoard:
        storage.make_folder(self.folder)
        self._start = 0
        return self

    def __call__(self, now: Progress) -> None:
        """Add a point to each curve."""
        if now.start != self._start:
            self._close()
            within = self.folder / f"start_{now.start}" if now.starts > 1 else self.folder
            self._writer, self._start = self._board.FileWriter(str(within), flush_secs=_FLUSH_SECONDS), now.start
        loss, kl = now.means
        scalars = {"elbo": -loss, "loss": loss} | ({"kl": kl} if math.isfinite(kl) else {})
        summary = self._summaries.Summary
        parts = [summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._writer.add_summary(summary(value=parts), now.step)
        if self.histograms:
            for name, value in now.layout.constrained(now.flat).items():
                self._writer.add_summary(self._summaries.histogram(name, value.cpu().numpy(), "auto"), now.step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()


def _torch_board(module: str) -> Any:
    """A module of torch that needs the package tensorboard."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f'TensorBoard needs the package tensorboard ({error}): pip install "kiln-ppl[watch]", or use JsonLines'
        ) from error
