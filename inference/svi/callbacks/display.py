"""Where a picture that changes is shown: under a notebook's cell, in a file, or as a line in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from inference.storage.atomic_files import make_folder, replacing

__all__ = ["Display", "display_for"]


class Display(Protocol):
    """Shows a picture, or a line of text, in place of the one before; each makes only what it shows."""

    def show(self, png: Callable[[], bytes], line: Callable[[], str]) -> None:
        """Replace what is shown."""

    def close(self) -> None:
        """Leave it as it is."""


class Notebook:
    """Under the cell that runs, and at ``path`` too where one is given."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else File(path)
        self._handle: Any = None

    def show(self, png: Callable[[], bytes], line: Callable[[], str]) -> None:
        """Replace the picture in place."""
        from IPython.display import Image, display

        data = png()
        image = Image(data=data, format="png", alt=line())
        if self._handle is None:
            self._handle = display(image, display_id=True)
        else:
            self._handle.update(image)
        if self._file is not None:
            self._file.show(lambda: data, line)

    def close(self) -> None:
        """Nothing: the picture stays."""


class File:
    """A PNG that is whole at any time."""

    def __init__(self, path: Path) -> None:
        make_folder(path.parent)
        self._path = path

    def show(self, png: Callable[[], bytes], line: Callable[[], str]) -> None:
        """Replace the file."""
        with replacing(self._path) as partial:
            partial.write_bytes(png())

    def close(self) -> None:
        """Nothing: the file stays."""


class Terminal:
    """A line of its own on standard error, above the progress bars that begin later."""

    def __init__(self) -> None:
        self._line: tqdm[Any] = tqdm(bar_format="{desc}", desc=" ")

    def show(self, png: Callable[[], bytes], line: Callable[[], str]) -> None:
        """Replace the line."""
        self._line.set_description_str(line())

    def close(self) -> None:
        """Go on below the line."""
        self._line.close()


def display_for(path: Path | None) -> Display:
    """The notebook if this is one, else the file at ``path``, else the terminal.

    Raises
    ------
    OSError
        If the folder of ``path`` cannot be written.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and hasattr(shell, "kernel"):
        return Notebook(path)
    return Terminal() if path is None else File(path)
