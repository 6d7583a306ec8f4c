"""Log of a fit that any program can read: one JSON object per line."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from inference.storage.atomic_files import make_folder
from inference.svi.callbacks.base import CHUNK, Progress
from inference.utils.background_writer import Gathered
from inference.utils.validation import positive_integer

__all__ = ["JsonLines"]


class JsonLines:
    """Callback that writes a line of JSON: ``step``, ``loss``, ``elbo``, ``kl``, ``seconds``.

    Losses are means over the steps since the line before, in nats; ``kl`` is
    null where the fit has none. With restarts a line has ``start`` too, from 1.
    Lines reach the disk once a second at least, as long as steps are taken, so
    a killed process leaves all but the last second, and may cut the last line.

    Parameters
    ----------
    path
        A new file; its folder is created if it is missing.
    every
        Steps between two lines.
    params
        Names of parameters to write too, under ``params``, in the user's space.
    overwrite
        Replace the file where there is one. A fit that goes on (``resume=True``) keeps
        the lines of the steps that it has taken, and adds to them.

    Raises
    ------
    ValueError
        Before the fit starts, if the file is there and ``overwrite`` is false;
        at the first line, if there is no parameter of a given name.
    OSError
        Before the fit starts, if it cannot be written.

    Examples
    --------
    >>> import json, tempfile, torch
    >>> from pathlib import Path
    >>> import kiln
    >>> from kiln.guides import mean_field_normal
    >>> from kiln.models import linear_regression
    >>> x, guide = torch.linspace(-1, 1, 20).reshape(-1, 1), mean_field_normal(linear_regression)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     log = kiln.JsonLines(Path(folder, "fit.jsonl"))
    ...     _ = kiln.fit(linear_regression, guide, x, x[:, 0], steps=250, callbacks=[log], progress=False)
    ...     lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    >>> [line["step"] for line in lines]
    [100, 200, 250]
    >>> sorted(lines[0])
    ['elbo', 'kl', 'loss', 'seconds', 'step']
    """

    only_looks = True

    def __init__(
        self, path: str | Path, every: int = CHUNK, *, params: Sequence[str] = (), overwrite: bool = False
    ) -> None:
        self.path = Path(path)
        self.every = positive_integer(every, "every")
        self.params = [params] if isinstance(params, str) else list(params)
        self.overwrite = overwrite
        self._kept = ""
        self._resumed = False
        self._lines: Gathered[dict[str, Any]] | None = None

    def resume(self, restart: int, step: int) -> None:
        """Keep the lines up to this step of this restart."""
        self._resumed, self._kept = True, ""
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            self._kept = "".join(line for line in lines if _is_before(line, (restart, step)))

    def __enter__(self) -> JsonLines:
        if self.path.exists() and not (self.overwrite or self._resumed):
            raise ValueError(f"{self.path} is there already: give another path, or overwrite=True to replace it")
        make_folder(self.path.parent)
        self.path.write_text(self._kept, encoding="utf-8")
        self._lines = Gathered("json-lines", self._write)
        return self

    def __call__(self, now: Progress) -> None:
        """Add a line."""
        if self._lines is None:
            raise ValueError("JsonLines are written while a fit runs: pass them in callbacks=[…]")
        loss, kl = now.means
        line: dict[str, Any] = {"start": now.start} if now.starts > 1 else {}
        line |= {"step": now.step, "loss": loss, "elbo": -loss, "kl": kl if math.isfinite(kl) else None}
        line["seconds"] = round(now.seconds, 6)
        if self.params:
            values = now.layout.constrained(now.flat_params, self.params)
            line["params"] = {name: value.tolist() for name, value in values.items()}
        self._lines.add(line)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lines is not None:
            lines, self._lines = self._lines, None
            lines.close(quietly=error is not None)

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def _is_before(line: str, reached: tuple[int, int]) -> bool:
    """Return True if a line is complete, and of a step up to ``reached``, a restart and its step."""
    try:
        found = json.loads(line)
        return line.endswith("\n") and (found.get("start", 1), found["step"]) <= reached
    except (ValueError, KeyError, AttributeError, TypeError):
        return False
