"""Layers of networks in NumPy, as torch's operators of the same names compute them below autograd."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

__all__ = [
    "avg_pool",
    "batch_norm",
    "cholesky",
    "convolution",
    "erf",
    "group_norm",
    "layer_norm",
    "lgamma",
    "max_pool",
    "softplus",
    "solve_triangular",
]

Array = Any


def convolution(  # noqa: PLR0913 - the arguments of torch's operator, in its order
    x: Array,
    weight: Array,
    bias: Array | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Array:
    """Cross-correlation of x (B, C, *size) with weight (O, C/groups, *kernel), in any number of dimensions.

    A transposed one is the plain one of x with zeros between its pixels and
    with the kernel turned round.
    """
    dims = x.ndim - 2
    stride, padding, dilation = (list(v) * dims if len(v) == 1 else list(v) for v in (stride, padding, dilation))
    if transposed:
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        x = _spread(x, stride)
        edges = [(r - p, r - p + o) for r, p, o in zip(reach, padding, output_padding, strict=True)]
        weight = _turned(weight, groups)
        stride = [1] * dims
    else:
        edges = [(p, p) for p in padding]
    x = np.pad(x, [(0, 0), (0, 0), *((max(a, 0), max(b, 0)) for a, b in edges)])
    x = x[(..., *(slice(max(-a, 0), x.shape[i + 2] - max(-b, 0)) for i, (a, b) in enumerate(edges)))]
    seen = _windows(x, list(weight.shape[2:]), stride, dilation)  # (B, C, *out, *kernel)
    batch, out = len(x), seen.shape[2 : 2 + dims]
    seen = seen.reshape(batch, groups, x.shape[1] // groups, *seen.shape[2:])
    order = [1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims)]
    columns = seen.transpose(order).reshape(groups, batch * int(np.prod(out)), -1)
    kernels = weight.reshape(groups, len(weight) // groups, -1)
    found = np.matmul(columns, kernels.transpose(0, 2, 1)).reshape(groups, batch, *out, -1)
    found = np.moveaxis(found, (0, -1), (1, 2)).reshape(batch, len(weight), *out)
    return found if bias is None else found + bias.reshape(-1, *[1] * dims)


def _spread(x: Array, stride: list[int]) -> Array:
    """X with stride − 1 zeros between its pixels."""
    size = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    wide = np.zeros((*x.shape[:2], *size), x.dtype)
    places: Any = (..., *(slice(None, None, s) for s in stride))
    wide[places] = x
    return wide


def _turned(weight: Array, groups: int) -> Array:
    """The kernel (C, O/groups, *kernel) of a transposed convolution as that of a plain one."""
    inputs, outputs, *kernel = weight.shape
    parts = np.flip(weight, tuple(range(2, weight.ndim))).reshape(groups, inputs // groups, outputs, *kernel)
    return np.swapaxes(parts, 1, 2).reshape(groups * outputs, inputs // groups, *kernel)


def _windows(x: Array, kernel: list[int], stride: list[int], dilation: list[int]) -> Array:
    """All windows of x (B, C, *size) as a view (B, C, *out, *kernel)."""
    dims = len(kernel)
    whole = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    seen = np.lib.stride_tricks.sliding_window_view(x, whole, axis=tuple(range(2, 2 + dims)))
    steps = [slice(None, None, s) for s in stride]
    return seen[(slice(None), slice(None), *steps, *(slice(None, None, d) for d in dilation))]


def _pooled(
    x: Array, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil: bool, fill: float
) -> Array:
    """Windows of x, padded with ``fill``, that start inside it."""
    dims = len(kernel)
    kernel, stride, padding, dilation = (
        list(v) * dims if len(v) == 1 else list(v) for v in (kernel, stride or kernel, padding, dilation)
    )
    edges = []
    for n, k, s, p, d in zip(x.shape[-dims:], kernel, stride, padding, dilation, strict=True):
        room = n + 2 * p - d * (k - 1) - 1
        out = -(-room // s) + 1 if ceil else room // s + 1
        out -= ceil and (out - 1) * s >= n + p
        edges.append((p, max(p, (out - 1) * s + d * (k - 1) + 1 - n - p)))
    lead = [(0, 0)] * (x.ndim - dims)
    padded = np.pad(x, [*lead, *edges], constant_values=fill)
    padded = padded.reshape(1, -1, *padded.shape[x.ndim - dims :])
    seen = _windows(padded, kernel, stride, dilation)
    return seen.reshape(*x.shape[: x.ndim - dims], *seen.shape[2:])


def max_pool(
    x: Array, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil: bool
) -> tuple[Array, None]:
    """The largest number of each window; where it was is not told."""
    dims = len(kernel)
    seen = _pooled(
        x, kernel, stride, padding, dilation, ceil, -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    )
    inside = itertools.product(*(range(n) for n in seen.shape[-dims:]))
    found = None
    for place in inside:
        part = seen[(..., *place)]
        found = part if found is None else np.maximum(found, part)
    return found, None


def avg_pool(
    x: Array,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil: bool,
    with_padding: bool,
    divisor: int | None,
) -> Array:
    """The mean of each window."""
    axes = tuple(range(-len(kernel), 0))
    one = [1] * len(kernel)
    total = _pooled(x, kernel, stride, padding, one, ceil, 0).sum(axes)
    if divisor is not None:
        return total / divisor
    inside = np.ones(x.shape[-len(kernel) :], x.dtype)
    if with_padding:  # the padding counts, what ceil_mode adds behind it does not
        wide = np.pad(inside, [(p, p) for p in (padding * len(kernel) if len(padding) == 1 else padding)], mode="edge")
        return total / _pooled(wide[None], kernel, stride, [0], one, ceil, 0).sum(axes)[0]
    return total / _pooled(inside[None], kernel, stride, padding, one, ceil, 0).sum(axes)[0]


def layer_norm(
    x: Array, shape: list[int], weight: Array | None, bias: Array | None, eps: float
) -> tuple[Array, Array, Array]:
    """(x − mean)/sd over the last dimensions, then weight and bias."""
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    mean = x.mean(axes, keepdims=True)
    rate = 1 / np.sqrt(x.var(axes, keepdims=True) + eps)
    return _scaled((x - mean) * rate, weight, bias), mean, rate


def group_norm(
    x: Array, weight: Array | None, bias: Array | None, rows: int, channels: int, size: int, groups: int, eps: float
) -> tuple[Array, Array, Array]:
    """(x − mean)/sd over each group of channels, then weight and bias for each channel."""
    parts = x.reshape(rows, groups, -1)
    mean = parts.mean(-1, keepdims=True)
    rate = 1 / np.sqrt(parts.var(-1, keepdims=True) + eps)
    shape = (1, channels, *[1] * (x.ndim - 2))
    weight, bias = (None if v is None else v.reshape(shape) for v in (weight, bias))
    return _scaled(((parts - mean) * rate).reshape(x.shape), weight, bias), mean[..., 0], rate[..., 0]


def batch_norm(
    x: Array, weight: Array | None, bias: Array | None, mean: Array, variance: Array, momentum: float, eps: float
) -> tuple[Array, None, None]:
    """(x − mean)/sd with the statistics of the training rows."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    weight, bias = (None if v is None else v.reshape(shape) for v in (weight, bias))
    rate = 1 / np.sqrt(variance.reshape(shape) + eps)
    return _scaled((x - mean.reshape(shape)) * rate, weight, bias), None, None


def _scaled(x: Array, weight: Array | None, bias: Array | None) -> Array:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _unit_triangular(x: Array, lower: bool, unit: bool) -> Array:
    x = np.tril(x) if lower else np.triu(x)
    return x - x * np.eye(x.shape[-1]) + np.eye(x.shape[-1]) if unit else x


def solve_triangular(a: Array, b: Array, upper: bool, left: bool = True, unit: bool = False) -> Array:
    """X of AX = B, or of XA = B, for a triangular A."""
    a = _unit_triangular(a, not upper, unit)
    return np.linalg.solve(a, b) if left else np.linalg.solve(a.swapaxes(-1, -2), b.swapaxes(-1, -2)).swapaxes(-1, -2)


def cholesky(x: Array, upper: bool = False, check: bool = False) -> tuple[Array, Array]:
    """The triangular factor of a positive definite matrix, and 0 for success."""
    lower = np.linalg.cholesky(x)
    return (lower.swapaxes(-1, -2) if upper else lower), np.zeros(x.shape[:-2], np.int32)


def softplus(x: Array, beta: float, threshold: float) -> Array:
    """log(1 + exp(βx))/β."""
    scaled = x * beta
    return np.where(scaled > threshold, x, np.log1p(np.exp(np.minimum(scaled, threshold))) / beta)


def _each(function: Any) -> Any:
    vectorised = np.frompyfunc(function, 1, 1)
    return lambda x: np.asarray(vectorised(x), dtype=np.float64)


erf = _each(math.erf)
lgamma = _each(lambda x: math.lgamma(x) if x > 0 or x % 1 else math.inf)
