"""Data known again by its hash."""

from __future__ import annotations

import hashlib

import numpy as np

__all__ = ["sha256_of"]


def sha256_of(*arrays: np.ndarray) -> str:
    """SHA-256 over shapes, types and values."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr((array.shape, str(array.dtype))).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
