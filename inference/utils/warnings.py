"""Warnings that point at the user's line of code."""

import contextlib
import os
import sys
import warnings
from pathlib import Path

import pyro
import torch

__all__ = ["warn"]

_ROOT = Path(__file__).parents[2]
# Frames of torch, Pyro and contextlib lie between two frames of ours: a hook, a messenger, a context manager.
_SKIPPED = (
    *(str(_ROOT / package) + os.sep for package in ("inference", "guides", "ppl_models", "kiln")),
    *(str(Path(str(module.__file__)).parent) + os.sep for module in (torch, pyro)),
    contextlib.__file__,
)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning at the innermost frame outside this distribution, which is the user's.

    Parameters
    ----------
    message : str
        Text of the warning.
    category : type[Warning]
        Its class.
    """
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_SKIPPED) and frame.f_back is not None:
        frame = frame.f_back
    # Not warnings.warn with a stack level: that counts frames in a way of its own, without those of imports.
    warnings.warn_explicit(
        message,
        category,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )
