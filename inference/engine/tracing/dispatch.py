"""A dispatch mode without TorchDynamo, and operators that carry their own C++."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["DispatchMode", "native_code"]


class DispatchMode(TorchDispatchMode):
    """A mode that runs as plain Python: torch's own would first import TorchDynamo, most of a second."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def native_code(func: Any) -> str | None:
    """The C++ that an operator carries as its attribute ``cpp``: a template of the operator's own name.

    It is called with the pointers of its arguments and results, then for each
    argument its rows and the numbers in a row.
    """
    return getattr(func, "cpp", None)
