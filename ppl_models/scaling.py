"""Units: models work on standardised numbers and speak in the user's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Scaling"]


@dataclass(frozen=True)
class Scaling:
    """Location and scale of each input column and of the target: x' = (x − x_loc)/x_scale, y = y_loc + y_scale·y'.

    Bound into a model, it keeps weights of order one while the observed site,
    its noise and its density stay in the units of y.

    >>> import numpy as np
    >>> Scaling.of(np.array([[1.0], [3.0]]), np.array([10.0, 30.0]))
    Scaling(x_loc=(2.0,), x_scale=(1.0,), y_loc=20.0, y_scale=10.0)
    """

    x_loc: tuple[float, ...] = (0.0,)
    x_scale: tuple[float, ...] = (1.0,)
    y_loc: float = 0.0
    y_scale: float = 1.0

    @classmethod
    def of(cls, x: Any, y: Any) -> Scaling:
        """Means and standard deviations of the training rows; a column without spread is divided by 1."""
        inputs = np.asarray(x, dtype=float).reshape(len(x), -1)
        target = np.asarray(y, dtype=float)
        spread = inputs.std(0)
        return cls(
            tuple(inputs.mean(0).tolist()),
            tuple(np.where(spread > 0, spread, 1.0).tolist()),
            float(target.mean()),
            float(target.std() or 1.0),
        )

    @classmethod
    def read(cls, value: Scaling | Mapping[str, Any] | None) -> Scaling:
        """From a Scaling, from the mapping that :meth:`as_dict` gives, or none at all."""
        if value is None:
            return cls()
        return value if isinstance(value, Scaling) else cls(**value)

    def as_dict(self) -> dict[str, Any]:
        """A mapping that JSON can hold."""
        return asdict(self)

    def inputs(self, x: Tensor) -> Tensor:
        """Standardised inputs, shape (N, D), whole numbers too; one column may come as (N,)."""
        if x.dim() not in (1, 2):
            raise ValueError(f"x has shape {tuple(x.shape)}: give rows of numbers, (N, D), or one column, (N,)")
        columns = x.unsqueeze(-1) if x.dim() == 1 else x
        columns = columns if columns.is_floating_point() else columns.to(torch.get_default_dtype())
        if self == _IDENTITY:
            return columns
        loc = torch.as_tensor(self.x_loc, dtype=columns.dtype, device=columns.device)
        scale = torch.as_tensor(self.x_scale, dtype=columns.dtype, device=columns.device)
        return (columns - loc) / scale

    def target(self, standardised: Tensor) -> Tensor:
        """A location on the standardised scale, in the units of y."""
        return self.y_loc + self.y_scale * standardised


_IDENTITY = Scaling()
