"""Work spread over processes by joblib."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from joblib import Parallel, delayed
from joblib.parallel import get_active_backend

__all__ = ["jobs_at_once", "spread"]

T = TypeVar("T")


def jobs_at_once(n_jobs: int | None) -> int:
    """Return the number of processes for ``n_jobs``; None takes ``joblib.parallel_config``'s, or one.

    Raises
    ------
    ValueError
        If joblib is set to run threads.
    """
    backend, configured = get_active_backend()
    count = int(backend.effective_n_jobs(configured if n_jobs is None else n_jobs))
    if getattr(backend, "uses_threads", False) and count > 1:
        raise ValueError("joblib is set to run threads, which share torch's random numbers: use processes, or n_jobs=1")
    return count


def spread(run: Callable[[Any], T], items: Sequence[Any], n_jobs: int | None) -> Iterable[T]:
    """``run`` of each of ``items``, as they are done, in the processes of joblib's backend."""
    jobs_at_once(n_jobs)
    backend, _ = get_active_backend()
    order = "generator_unordered" if getattr(backend, "supports_return_generator", False) else "list"
    found: Iterable[T] = Parallel(n_jobs=n_jobs, return_as=order)(delayed(run)(item) for item in items)
    return found
