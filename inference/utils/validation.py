"""The data and options a caller hands in: checked once, with errors that say what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = [
    "as_device",
    "as_dtype",
    "flag",
    "one_of",
    "positive_integer",
    "positive_number",
    "seed_number",
    "share",
]

_MOST = 2**31


def as_device(device: str | torch.device) -> torch.device:
    """The device to run on; ``"auto"`` takes a CUDA GPU where there is one.

    Raises
    ------
    ValueError
        If this machine does not have the device.
    """
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        if found.type not in ("cpu", "cuda"):
            raise NotImplementedError(found.type)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(
            f"device {str(device)!r} is not on this machine, which has {have}: pass one of them"
        ) from error
    return found


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """The floating-point type of data and parameters; None is torch's default."""
    if dtype is None:
        return torch.get_default_dtype()
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype!r}: pass torch.float32 or torch.float64")
    return found


def positive_integer(value: Any, name: str) -> int:
    """``value`` as an int from 1 to 2³¹ − 1, or a ValueError that names it."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} is {value!r}: pass a whole number of at least 1")
    if value >= _MOST:
        raise ValueError(f"{name} is {value!r}: pass a whole number below {_MOST}")
    return int(value)


def seed_number(value: Any) -> int:
    """``value`` as a seed from 0 to 2³² − 1, or a ValueError that says so."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < 2**32:
        raise ValueError(f"seed is {value!r}: pass a whole number from 0 to {2**32 - 1}")
    return int(value)


def positive_number(value: Any, name: str) -> float:
    """``value`` as a finite float above 0, or a ValueError that names it."""
    number = _float(value)
    if not (0 < number < math.inf):
        raise ValueError(f"{name} is {value!r}: pass a number above 0")
    return number


def share(value: Any, name: str) -> float:
    """``value`` as a float between 0 and 1, or a ValueError that names it."""
    number = _float(value)
    if not 0 < number < 1:
        raise ValueError(f"{name} is {value!r}: pass a share between 0 and 1, such as 0.9")
    return number


def _float(value: Any) -> float:
    """``value`` as a float, NaN where it is no number or none that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def flag(value: Any, name: str) -> bool:
    """``value`` as a bool, or a ValueError that names it."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} is {value!r}: pass True or False")
    return bool(value)


def one_of(value: Any, name: str, choices: Sequence[str]) -> str:
    """``value``, if it is one of the ``choices``, or a ValueError that names it."""
    if isinstance(value, str) and value in choices:
        return value
    known = list(map(repr, choices))
    raise ValueError(f"{name} is {value!r}: pass {' or '.join([*filter(None, [', '.join(known[:-1])]), known[-1]])}")
