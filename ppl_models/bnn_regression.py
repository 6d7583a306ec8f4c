"""The Bayesian neural network of Edward's tutorial, with noise that can be learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_models.network import network_regression
from ppl_models.noise_scale import Noise
from ppl_models.scaling import Scaling

__all__ = ["bnn_regression", "suggested_options"]


def bnn_regression(
    x: Tensor,
    y: Tensor | None = None,
    *,
    hidden: Sequence[int] = (10, 10),
    weight_prior: str = "unit",
    noise: Noise = 0.1,
    scaling: Scaling | Mapping[str, Any] | None = None,
) -> Tensor:
    """Y ~ N(f(x; w), σ), f a tanh network, every weight and bias N(0, 1) or N(0, 1/fan-in).

    Sites ``w0, b0, w1, b1, …`` hold the weights (inputs × outputs) and biases.

    Parameters
    ----------
    x, y
        (N, D) and (N,).
    hidden
        Sizes of the hidden layers.
    weight_prior
        Variance of each weight: ``"unit"`` is 1, as in the tutorial; ``"fan-in"``
        is 1/inputs of its layer, so that f stays of order one in wide networks.
        Biases have variance 1.
    noise
        σ in the units of y (0.1 in the tutorial), ``"learned"`` as the site
        ``noise`` ~ HalfNormal(y_scale), or ``"heteroscedastic"``: softplus of the
        network's second output.
    scaling
        Standardisation of x and y, see :class:`~ppl_models.scaling.Scaling`.

    Returns
    -------
    Tensor
        The observations, (N,).

    References
    ----------
    Tran et al. (2016), Edward: A library for probabilistic modeling, inference, and criticism.
    Neal (1995), Bayesian learning for neural networks.
    """
    return network_regression(x, y, torch.tanh, hidden, weight_prior, noise, scaling)


def suggested_options(x: Any, y: Any) -> dict[str, Any]:
    """Return the options for the command line: learned noise, the fan-in prior, and the scales of the training rows.

    One hidden layer with a unit for every ten rows an input, between 5 and 50:
    a mean-field guide pays for each weight that the data leave open.
    """
    rows, inputs = np.asarray(x).reshape(len(x), -1).shape
    return {
        "hidden": [int(np.clip(rows // (10 * inputs), 5, 50))],
        "noise": "learned",
        "weight_prior": "fan-in",
        "scaling": Scaling.of(x, y).as_dict(),
    }
