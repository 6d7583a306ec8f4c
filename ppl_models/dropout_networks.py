"""Networks with dropout that have a name: one for images, one for tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import isqrt, prod
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from ppl_models.dropout import DropoutNetwork
from ppl_models.scaling import Scaling

__all__ = ["DropoutCNN", "DropoutRegression"]


class DropoutCNN(DropoutNetwork):
    """Two convolutions, two wide layers with dropout, and classes: the network of Chainer's MNIST tutorial.

    16 filters of 3×3, pool, 32 of 3×3, pool, 1,000 units, dropout, 1,000 units,
    dropout, classes; ReLU between. Images are (N, H, W), (N, 1, H, W) or flat
    (N, H·W). Fit it with :func:`~guides.bernoulli_dropout`; the start of its
    weights is torch's, so ``torch.manual_seed`` fixes it.

    Parameters
    ----------
    image_shape
        (H, W), at least 8 × 8.
    classes
        How many.
    brightest
        The value of a white pixel, which all are divided by: 255 for bytes.
    p
        Dropout probability of both wide layers.
    hidden
        Units of each wide layer.
    length_scale
        l of the weights' prior, see :class:`DropoutNetwork`.

    Examples
    --------
    >>> import kiln
    >>> from kiln.guides import bernoulli_dropout
    >>> from kiln.data import digits
    >>> data = digits()
    >>> model = DropoutCNN((8, 8), hidden=20, brightest=16)
    >>> posterior = kiln.fit(model, bernoulli_dropout(model), data.x, data.y, steps=5, batch_size=100, progress=False)
    >>> posterior.predict(data.x, draws=3).draws.shape
    torch.Size([3, 1797, 10])
    """

    usual_fit: ClassVar[dict[str, Any]] = {"lr": 1e-3, "batch_size": 200}

    def __init__(
        self,
        image_shape: Sequence[int] = (28, 28),
        *,
        classes: int = 10,
        brightest: float = 255,
        p: float = 0.5,
        hidden: int = 1000,
        length_scale: float = 1.0,
    ) -> None:
        height, width = image_shape
        if min(height, width) < 8:
            raise ValueError(f"image_shape is {tuple(image_shape)}: two convolutions need images of at least 8 × 8")
        pool = partial(nn.MaxPool2d, 2, ceil_mode=True)
        inputs = 32 * prod(_after(_after(side)) for side in (height, width))
        net = nn.Sequential(
            _Images(height, width, brightest),
            *(nn.Conv2d(1, 16, 3), nn.ReLU(), pool(), nn.Conv2d(16, 32, 3), nn.ReLU(), pool(), nn.Flatten()),
            *(nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(p), nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(p)),
            nn.Linear(hidden, classes),
        )
        super().__init__(net, length_scale=length_scale)
        self.image_shape = (height, width)

    @staticmethod
    def suggested_options(x: Any, y: Any) -> dict[str, Any]:
        """Return the options for the command line: the side of square images, the classes, and the brightest pixel."""
        side = isqrt(np.shape(x)[1])
        if side**2 != np.shape(x)[1]:
            raise ValueError(f"dropout_cnn is for square images, but a row has {np.shape(x)[1]} columns")
        return {"image_shape": [side, side], "classes": int(np.max(y)) + 1, "brightest": float(np.max(x))}


class DropoutRegression(DropoutNetwork):
    """One hidden ReLU layer, with dropout on it and on the inputs: the regression network of Gal & Ghahramani (2016).

    Parameters
    ----------
    inputs
        D, columns of x.
    hidden
        Units of the hidden layer.
    p
        Dropout probability of inputs and units.
    noise
        σ in the units of y (1/√τ in the paper), or ``"learned"``.
    length_scale
        l of the weights' prior, see :class:`DropoutNetwork`.
    scaling
        Standardisation of x and y, see :class:`~ppl_models.scaling.Scaling`.
    """

    def __init__(
        self,
        inputs: int,
        *,
        hidden: int = 50,
        p: float = 0.05,
        noise: float | str = "learned",
        length_scale: float = 0.01,
        scaling: Scaling | Mapping[str, Any] | None = None,
    ) -> None:
        units = Scaling.read(scaling)
        net = nn.Sequential(
            *(_Units(units.inputs), nn.Dropout(p), nn.Linear(inputs, hidden), nn.ReLU()),
            *(nn.Dropout(p), nn.Linear(hidden, 1), _Units(units.target)),
        )
        super().__init__(net, noise=noise, length_scale=length_scale)

    @staticmethod
    def suggested_options(x: Any, y: Any) -> dict[str, Any]:
        """Return the options for the command line: columns and scales of the rows, N(0, 1) weights, a fifth dropped."""
        return {"inputs": np.shape(x)[1], "p": 0.2, "length_scale": 1.0, "scaling": Scaling.of(x, y).as_dict()}


def _after(side: int) -> int:
    """The side of an image after a 3×3 convolution and a pooling by 2."""
    return -(-(side - 2) // 2)


class _Images(nn.Module):
    """(N, 1, H, W) from 0 to 1."""

    def __init__(self, height: int, width: int, brightest: float) -> None:
        super().__init__()
        self.shape = (1, height, width)
        self.brightest = brightest

    def forward(self, x: Tensor) -> Tensor:
        return (x / self.brightest).reshape(-1, *self.shape)


class _Units(nn.Module):
    """A change of units as a layer."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        converted: Tensor = self.change(x)
        return converted
