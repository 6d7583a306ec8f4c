"""Snapshots of a fit on disk, each of which loads as a posterior."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path
from types import TracebackType

from inference.posterior import Posterior
from inference.storage.atomic_files import make_folder
from inference.svi.callbacks.base import CHUNK, Progress
from inference.utils.background_writer import BackgroundWriter
from inference.utils.validation import positive_integer

__all__ = ["Snapshots"]

_MOST, _BYTES = 256, 2**26  # most snapshots, and bytes of them, that wait for the disk


class Snapshots:
    """Callback that saves the posterior as it is, as ``step_000100`` and so on in ``folder``.

    Each is what :meth:`~inference.Posterior.save` writes, and is there whole or
    not at all; a thread beside the fit writes them, and all are there when
    ``fit`` returns. With restarts they lie in ``start_1``, ``start_2``, ….

    Parameters
    ----------
    folder
        Made if it is not there.
    every
        Steps between two; the last step has one too.
    keep
        How many to keep, the latest; all if left out.
    overwrite
        Remove the snapshots of another fit in ``folder`` before this one starts. A fit
        that goes on (``resume=True``) keeps those of the steps that it has taken.

    Raises
    ------
    ValueError
        Before the fit starts, if ``folder`` has snapshots and ``overwrite`` is false.
    OSError
        Before the fit starts, if ``folder`` cannot be written; and from the fit if it cannot be later.

    Examples
    --------
    >>> import tempfile, torch
    >>> import kiln
    >>> from kiln.guides import mean_field_normal
    >>> from kiln.models import linear_regression
    >>> x, model = torch.linspace(-1, 1, 20).reshape(-1, 1), linear_regression
    >>> guide = mean_field_normal(model)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     kept = kiln.Snapshots(folder, every=50)
    ...     _ = kiln.fit(model, guide, x, x[:, 0], steps=120, callbacks=[kept], progress=False)
    ...     halfway = kiln.load(kept.written[0], model, guide)
    >>> [path.name for path in kept.written]
    ['step_000050', 'step_000100', 'step_000120']
    >>> halfway.predict(x, draws=10).mean.shape
    torch.Size([20])
    """

    only_looks = True

    def __init__(
        self, folder: str | Path, every: int = CHUNK, *, keep: int | None = None, overwrite: bool = False
    ) -> None:
        self.folder = Path(folder)
        self.every = positive_integer(every, "every")
        self.keep = None if keep is None else positive_integer(keep, "keep")
        self.overwrite = overwrite
        self.written: list[Path] = []
        self._resumed: tuple[int, int] | None = None
        self._running = False
        self._work: BackgroundWriter | None = None

    def resume(self, restart: int, step: int) -> None:
        """Keep the snapshots up to this step of this restart."""
        self._resumed = (restart, step)

    def __enter__(self) -> Snapshots:
        make_folder(self.folder)
        found = sorted([*self.folder.glob("step_*"), *self.folder.glob("start_*/step_*")])
        kept = [path for path in found if self._resumed is not None and _restart_and_step(path) <= self._resumed]
        if found and not (self.overwrite or self._resumed):
            raise ValueError(
                f"{self.folder} has {len(found)} snapshots of another fit, the first is {found[0].name}: give another "
                "folder, or overwrite=True to remove them"
            )
        for path in (path for path in found if path not in kept):
            shutil.rmtree(path)
        self.written = kept
        self._running = True
        return self

    def __call__(self, now: Progress) -> None:
        """Hand the posterior as it is to the thread that writes."""
        if not self._running:
            raise ValueError("Snapshots are written while a fit runs: pass them in callbacks=[…]")
        if self._work is None:
            size = now.flat_params.nbytes + 2 * now.steps * now.flat_params.element_size()
            self._work = BackgroundWriter("snapshots", max(2, min(_MOST, _BYTES // max(1, size))))
        within = self.folder / f"start_{now.start}" if now.starts > 1 else self.folder
        self._work.put(partial(self._write, now.posterior, within / f"step_{now.step:06d}"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running = False
        if self._work is not None:
            work, self._work = self._work, None
            work.close(quietly=error is not None)

    def _write(self, posterior: Posterior, path: Path) -> None:
        posterior.save(path)
        self.written.append(path)
        if self.keep is not None and len(self.written) > self.keep:
            shutil.rmtree(self.written.pop(0))


def _restart_and_step(path: Path) -> tuple[int, int]:
    """Return the restart and the step of a snapshot; those of a name that is no snapshot's come after all others."""
    restart = path.parent.name.removeprefix("start_") if path.parent.name.startswith("start_") else "1"
    step = path.name.removeprefix("step_")
    return (int(restart), int(step)) if restart.isdigit() and step.isdigit() else (sys.maxsize, 0)
