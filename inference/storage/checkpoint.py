"""A folder in which a running fit keeps its state, so that a killed one goes on where it was."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from inference.storage import tensor_archive
from inference.storage.atomic_files import ADVICE, make_folder
from inference.storage.fit_fingerprint import Fingerprint, describe_differences
from inference.storage.json_document import ANY, TEXT, check, mapping_of, record, versions
from inference.storage.tensor_archive import flatten, unflatten
from inference.utils.validation import positive_integer
from inference.utils.warnings import warn

__all__ = ["Checkpoint", "has_checkpoint", "read_checkpoint"]

SCHEMA, STEM, LOCK = 1, "checkpoint", ".kiln.lock"
STATE = {"seconds", "losses", "best", "running", "failed"}
_SECONDS = 30.0


class Checkpoint:
    """Where ``fit(..., checkpoint=)`` keeps parameters, optimiser, random states, step and losses.

    Written between steps to new files that take the old one's place when they
    are on the disk whole, so that a fit which is killed at any moment leaves
    the last state or the one before. A fit holds the folder for itself; as a
    context manager this holds it longer, for what is written after the fit.

    Parameters
    ----------
    folder
        Made if it is not there.
    every
        Steps between two; one in half a minute if left out. There is one at the
        end, too, and where a fit is interrupted or fails.

    Raises
    ------
    ValueError
        When it is entered, if another fit has the folder.
    OSError
        When it is entered, if the folder cannot be written.

    Examples
    --------
    >>> from functools import partial
    >>> import tempfile, torch
    >>> import kiln
    >>> from kiln.guides import mean_field_normal
    >>> from kiln.models import linear_regression as model
    >>> x = torch.linspace(-1, 1, 20).reshape(-1, 1)
    >>> options = {"steps": 300, "progress": False}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fit = partial(kiln.fit, model, mean_field_normal(model), x, x[:, 0], **options)
    ...     one = fit(checkpoint=kiln.Checkpoint(folder, every=100))
    ...     again = fit(checkpoint=folder, resume=True)
    >>> (one.losses == again.losses).all()
    np.True_
    """

    def __init__(self, folder: str | Path, every: int | None = None) -> None:
        self.folder = Path(folder)
        self.every = None if every is None else positive_integer(every, "every")
        self._depth = 0
        self._made: list[Path] = []
        self._last = time.monotonic()
        self._lock = FileLock(self.folder / LOCK, timeout=0)

    def __enter__(self) -> Checkpoint:
        if not self._depth:
            self._made = [place for place in (self.folder, *self.folder.parents) if not place.exists()]
            make_folder(self.folder)
            try:
                self._lock.acquire()
            except Timeout as error:
                raise ValueError(
                    f"{self.folder} is being written to by another fit: wait until it has ended, or give another folder"
                ) from error
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if not self._depth:
            self._lock.release()
            with suppress(OSError):  # of the folders that this made, none stays that has nothing in it
                if self._made and os.listdir(self.folder) == [LOCK]:
                    (self.folder / LOCK).unlink()
                    for place in self._made:
                        place.rmdir()

    def begin(self, identity: Fingerprint, resume: bool, free: Collection[str] = ()) -> dict[str, Any] | None:
        """What is to be gone on with, None where there is nothing yet; marks that are ``free`` may differ.

        Raises
        ------
        ValueError
            If there is a checkpoint that nobody asked to go on with, unless its
            fit failed, one of another fit, with what differs, or a damaged one.
        """
        self._identity = identity
        self._last = time.monotonic()
        if not has_checkpoint(self.folder):
            return None
        if not resume:
            with suppress(ValueError):  # a new fit may replace the last state of one that could not go on
                if read_checkpoint(self.folder)["state"]["failed"]:
                    return None
            raise ValueError(
                f"{self.folder} has a checkpoint of a fit: pass resume=True (or --resume) to go on with it, "
                f"give another folder, or remove {STEM}.json there"
            )
        found = read_checkpoint(self.folder)
        there, here = ({k: v for k, v in m.items() if k not in free} for m in (found["identity"], identity))
        if differ := describe_differences(there, here):
            raise ValueError(
                f"{self.folder} has a checkpoint of another fit: {'; '.join(differ)}: ask for the same, or give "
                "another folder"
            )
        state: dict[str, Any] = found["state"]
        return state

    def until(self, step: int) -> int | None:
        """The next step to keep, where steps are counted."""
        return None if self.every is None else step + self.every - step % self.every

    def due(self, step: int) -> bool:
        """Whether it is time to keep what there is after ``step`` steps."""
        if self.every is not None:
            return step % self.every == 0
        return time.monotonic() - self._last > _SECONDS

    def write(self, state: Mapping[str, Any]) -> None:
        """Keep the :data:`STATE` of a fit, of numbers, texts, tensors and containers of them.

        Raises
        ------
        TypeError
            If something else is in it.
        OSError
            If it cannot be written; the one before is then still there.
        """
        content, tensors = flatten({"identity": self._identity, "state": dict(state)})
        tensor_archive.write(self.folder, STEM, tensors, {"versions": versions(), "content": content}, SCHEMA)
        self._last = time.monotonic()

    def remove(self) -> None:
        """Remove what was kept, as when the posterior itself is saved."""
        for path in (self.folder / f"{STEM}.json", *self.folder.glob(f"{STEM}-*.safetensors")):
            path.unlink(missing_ok=True)


def has_checkpoint(folder: Path) -> bool:
    """Whether ``folder`` has one."""
    return (folder / f"{STEM}.json").exists()


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The ``identity`` and the ``state`` of the checkpoint in ``folder``.

    Warns where it was made by other versions of the packages, with which the
    rest of the steps may differ in rounding.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it is damaged, or of another schema.
    """
    path = folder / f"{STEM}.json"
    tensors, manifest = tensor_archive.read(folder, STEM, SCHEMA)
    check(path, manifest, record(versions=mapping_of(TEXT), content=ANY))
    try:
        found = unflatten(manifest["content"], tensors)
        identity, state = found["identity"], found["state"]
        known = isinstance(identity, dict) and isinstance(state, dict) and state.keys() == STATE
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is damaged ({error}): {ADVICE}") from error
    if not known:
        raise ValueError(f"{path} was not written by a fit: {ADVICE}")
    if differ := describe_differences(manifest["versions"], versions()):
        warn(f"the checkpoint in {folder} is of other versions: {'; '.join(differ)}")
    return {"identity": identity, "state": state}
