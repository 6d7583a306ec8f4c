"""A fitted model that predicts with NumPy alone, written by Kiln.

    import predictor
    p = predictor.load().predict(x)
    p.mean, p.std, p.interval(0.9), p.draws    # or p.probs, p.labels, p.entropy

It reads predictor.npz, beside it, and needs Python 3.10 and NumPy 1.26 or newer.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import numpy as np
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

Array = Any


def convolution(
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


def _log_gamma(x: float) -> float:
    return math.lgamma(x) if x > 0 or x % 1 else math.inf


erf = _each(math.erf)
lgamma = _each(_log_gamma)


def _axes(dim: Any) -> Any:
    """All dimensions where torch gives none."""
    if dim is None or dim == []:
        return None
    return tuple(dim) if isinstance(dim, list) else dim


def _wide(x: Array) -> Any:
    """What to add such numbers up in."""
    return np.float64 if x.dtype.kind == "f" else None


def _sum(x: Array, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Array:
    return x.sum(_axes(dim), keepdims=keepdim, dtype=_wide(x))


def _mean(x: Array, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Array:
    return x.mean(_axes(dim), keepdims=keepdim, dtype=_wide(x))


def _var(x: Array, dim: Any = None, correction: Any = 1, keepdim: bool = False) -> Array:
    return x.var(_axes(dim), keepdims=keepdim, ddof=1 if correction is None else correction, dtype=_wide(x))


def _over(function: Any) -> Callable[..., Array]:
    return lambda x, dim=None, keepdim=False, dtype=None: function(x, axis=_axes(dim), keepdims=keepdim)


def _ends(function: Any, place: Any) -> Callable[..., Array]:
    def both(x: Array, dim: int, keepdim: bool = False) -> Array:
        return function(x, axis=dim, keepdims=keepdim), place(x, axis=dim, keepdims=keepdim)

    return both


def _norm(x: Array, order: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Array:
    if order == math.inf:
        return np.abs(x).max(_axes(dim), keepdims=keepdim)
    return (np.abs(x) ** order).sum(_axes(dim), keepdims=keepdim) ** (1 / order)


def _logsumexp(x: Array, dim: Any, keepdim: bool = False) -> Array:
    top = x.max(_axes(dim), keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    found = np.log(np.exp(x - top).sum(_axes(dim), keepdims=True)) + top
    return found if keepdim else found.squeeze(_axes(dim))


def _softmax(x: Array, dim: int, half: bool = False) -> Array:
    parts = np.exp(x - x.max(dim, keepdims=True))
    return parts / parts.sum(dim, keepdims=True)


def _log_softmax(x: Array, dim: int, half: bool = False) -> Array:
    lower = x - x.max(dim, keepdims=True)
    return lower - np.log(np.exp(lower).sum(dim, keepdims=True))


def _divide(x: Array, y: Array, mode: str | None = None) -> Array:
    if mode is None:
        return x / y
    return np.floor_divide(x, y) if mode == "floor" else np.trunc(x / y)


def _elu(x: Array, alpha: float = 1, scale: float = 1, inner: float = 1) -> Array:
    below = np.minimum(x, 0)
    bent = np.expm1(below if inner == 1 else inner * below)
    bent = np.maximum(x, 0) + (bent if alpha == 1 else alpha * bent)
    return bent if scale == 1 else scale * bent


def _gelu(x: Array, form: str = "none") -> Array:
    if form == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + erf(x * math.sqrt(0.5)))


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _log_sigmoid(x: Array) -> tuple[Array, None]:
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x))), None


def _clamp(x: Array, low: Any = None, high: Any = None) -> Array:
    x = x if low is None else np.maximum(x, low)
    return x if high is None else np.minimum(x, high)


def _affine(bias: Array, x: Array, y: Array, beta: float = 1, alpha: float = 1) -> Array:
    product = np.matmul(x, y)
    product = product if alpha == 1 else alpha * product
    return bias + product if beta == 1 else beta * bias + product


def _slice(x: Array, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Array:
    return x[(*[slice(None)] * (dim % x.ndim), slice(start, end, step))]


def _select(x: Array, dim: int, index: int) -> Array:
    return x[(*[slice(None)] * (dim % x.ndim), index)]


def _squeeze(x: Array, dim: Any) -> Array:
    dims = dim if isinstance(dim, list) else [dim]
    return x.squeeze(tuple(d for d in dims if x.ndim and x.shape[d] == 1))


def _expand(x: Array, size: list[int], implicit: bool = False) -> Array:
    have = [1] * (len(size) - x.ndim) + list(x.shape)
    return np.broadcast_to(x, [h if s == -1 else s for h, s in zip(have, size, strict=True)])


def _split(x: Array, size: Any, dim: int = 0) -> list[Array]:
    whole = x.shape[dim]
    sizes = size if isinstance(size, list) else [min(size, whole - i) for i in range(0, whole, size)]
    return np.split(x, np.cumsum(sizes)[:-1], dim)


def _pad(x: Array, pad: list[int], value: float = 0) -> Array:
    """Pairs of ``pad`` are for the last dimension first; a negative one cuts."""
    pairs = [(0, 0)] * (x.ndim - len(pad) // 2) + list(zip(pad[::2], pad[1::2], strict=True))[::-1]
    x = np.pad(x, [(max(a, 0), max(b, 0)) for a, b in pairs], constant_values=value)
    return x[tuple(slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(pairs, x.shape, strict=True))]


def _index(x: Array, indices: list[Any]) -> Array:
    return x[tuple(slice(None) if index is None else index for index in indices)]


def _put(x: Array, indices: list[Any], values: Array, accumulate: bool = False) -> Array:
    x = x.copy()
    places: Any = tuple(slice(None) if index is None else index for index in indices)
    if accumulate:
        np.add.at(x, places, values)
    else:
        x[places] = values
    return x


def _scatter(x: Array, dim: int, index: Array, values: Any) -> Array:
    x = x.copy()
    np.put_along_axis(x, index, values if np.ndim(values) == 0 else _part(values, index), dim)
    return x


def _part(values: Array, index: Array) -> Array:
    return values[tuple(slice(0, n) for n in index.shape)]


def _batch_norm(
    x: Array, w: Array, b: Array, mean: Array, var: Array, training: bool, momentum: float, eps: float
) -> Any:
    if training:
        raise ValueError("batch normalisation in training mode")
    return batch_norm(x, w, b, mean, var, momentum, eps)


def _diag_embed(x: Array, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Array:
    side = x.shape[-1] + abs(offset)
    wide = np.zeros((*x.shape[:-1], side, side), x.dtype)
    places = np.arange(x.shape[-1])
    wide[..., places + max(-offset, 0), places + max(offset, 0)] = x
    return np.moveaxis(wide, (-2, -1), (dim1, dim2))


def _gather(x: Array, dim: int, index: Array, sparse: bool = False) -> Array:
    whole = (slice(None) if i == dim % x.ndim else slice(0, n) for i, n in enumerate(index.shape))
    return np.take_along_axis(x[tuple(whole)], index, dim)


def _add(sign: int) -> Callable[..., Array]:
    def add(x: Array, y: Array, alpha: float = 1) -> Array:
        y = y if alpha == 1 else alpha * y
        return x + y if sign > 0 else x - y

    return add


def _same(x: Array, *_: object) -> Array:
    return x


def _new(value: float) -> Callable[..., Array]:
    return lambda x, size, dtype=None: np.full(size, value, dtype or x.dtype)


OPERATORS: dict[str, Callable[..., Any]] = {
    # one number to one number
    **{name: getattr(np, name) for name in ("abs", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt")},
    **{name: getattr(np, name) for name in ("square", "reciprocal", "sin", "cos", "tan", "sinh", "cosh", "tanh")},
    **{name: getattr(np, name) for name in ("floor", "ceil", "trunc", "sign", "isnan", "isinf", "logical_not")},
    **{name: getattr(np, f"arc{name[1:]}") for name in ("asin", "acos", "atan", "asinh", "acosh", "atanh", "atan2")},
    **dict.fromkeys(("detach", "alias", "_to_copy", "lift_fresh", "contiguous", "_conj", "_unsafe_masked"), _same),
    "neg": np.negative, "bitwise_not": np.invert, "rsqrt": lambda x: 1 / np.sqrt(x), "round": np.round,
    "erf": erf, "erfc": lambda x: 1 - erf(x), "lgamma": lgamma, "sigmoid": _sigmoid,
    "logit": lambda x, eps=None: np.log((p := x if eps is None else np.clip(x, eps, 1 - eps)) / (1 - p)),
    "relu": lambda x: np.maximum(x, 0), "leaky_relu": lambda x, slope=0.01: np.where(x > 0, x, slope * x),
    "elu": _elu, "celu": lambda x, alpha=1: _elu(x, alpha, 1, 1 / alpha),
    "special_entr": lambda x: -np.where(x == 0, 0, x * np.log(np.where(x == 0, 1, x))),
    "gelu": _gelu, "silu": lambda x: x * _sigmoid(x), "softplus": lambda x, b=1, t=20: softplus(x, b, t),
    "mish": lambda x: x * np.tanh(softplus(x, 1, 20)), "hardtanh": lambda x, low=-1, high=1: np.clip(x, low, high),
    "hardsigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1), "hardswish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "log_sigmoid_forward": _log_sigmoid, "threshold": lambda x, low, value: np.where(x > low, x, value),
    "_prelu_kernel": lambda x, slope: np.where(x > 0, x, slope * x), "nan_to_num": np.nan_to_num,
    # two numbers to one
    **{name: getattr(np, name) for name in ("maximum", "minimum", "fmod", "remainder", "logaddexp", "floor_divide")},
    **{name: getattr(np, name) for name in ("logical_and", "logical_or", "logical_xor", "where")},
    **{f"bitwise_{name}": getattr(np, f"bitwise_{name}") for name in ("and", "or", "xor")},
    "add": _add(1), "sub": _add(-1), "mul": np.multiply, "div": _divide, "div.Tensor_mode": _divide, "pow": np.power,
    "rsub": lambda x, y, alpha=1: y - x if alpha == 1 else y - alpha * x,
    "lerp": lambda x, y, weight: x + weight * (y - x),
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "clamp": _clamp, "clamp_min": np.maximum, "clamp_max": np.minimum,
    "xlogy": lambda x, y: np.where(x == 0, 0, x * np.log(np.where(x == 0, 1, y))),
    "addcmul": lambda x, a, b, value=1: x + value * a * b, "addcdiv": lambda x, a, b, value=1: x + value * a / b,
    "masked_fill": lambda x, mask, value: np.where(mask, value, x),
    # products and layers
    **dict.fromkeys(("mm", "bmm", "mv", "dot"), np.matmul), **dict.fromkeys(("addmm", "baddbmm", "addmv"), _affine),
    "addbmm": lambda bias, x, y, beta=1, alpha=1: beta * bias + alpha * np.matmul(x, y).sum(0),
    "convolution": convolution, "max_pool2d_with_indices": max_pool, "max_pool3d_with_indices": max_pool,
    "avg_pool2d": avg_pool, "avg_pool3d": avg_pool, "native_layer_norm": layer_norm, "native_group_norm": group_norm,
    "_native_batch_norm_legit_no_training": batch_norm, "native_batch_norm": _batch_norm,
    "_softmax": _softmax, "_safe_softmax": lambda x, dim, dtype=None: np.nan_to_num(_softmax(x, dim)),
    "_log_softmax": _log_softmax,
    "embedding": lambda weight, places, *_: weight[places],
    "linalg_cholesky_ex": cholesky, "linalg_solve_triangular": solve_triangular,
    "linalg_inv_ex": lambda x, check=False: (np.linalg.inv(x), np.zeros(x.shape[:-2], np.int32)),
    # many numbers to one
    "sum": lambda x, dtype=None: _sum(x), "sum.dim_IntList": _sum, "mean": lambda x, dtype=None: _mean(x),
    "mean.dim": _mean, "var.correction": _var, "std.correction": lambda *args: np.sqrt(_var(*args)),
    "prod": lambda x, dtype=None: x.prod(), "prod.dim_int": _over(np.prod),
    "amax": _over(np.max), "amin": _over(np.min), "any": np.any, "all": np.all, "max": np.max, "min": np.min,
    **{f"{name}.{dim}": _over(getattr(np, name)) for name in ("any", "all") for dim in ("dim", "dims")},
    "max.dim": _ends(np.max, np.argmax), "min.dim": _ends(np.min, np.argmin), "argmax": _over(np.argmax),
    "argmin": _over(np.argmin), "logsumexp": _logsumexp, "linalg_vector_norm": _norm,
    "norm.ScalarOpt_dim": lambda x, p, dim, keep=False: _norm(x, 2 if p is None else p, dim, keep),
    "cumsum": lambda x, dim, dtype=None: np.cumsum(x, dim), "cumprod": lambda x, dim, dtype=None: np.cumprod(x, dim),
    # places and shapes
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), lambda x, size, *_: x.reshape(size)),
    "expand": _expand, "permute": np.transpose, "transpose": np.swapaxes, "t": np.transpose,
    "unsqueeze": np.expand_dims, "squeeze": np.squeeze, "squeeze.dim": _squeeze, "squeeze.dims": _squeeze,
    "slice": _slice, "select": _select, "cat": np.concatenate, "stack": np.stack,
    "split": _split, "unsafe_split": _split, "split_with_sizes": _split,
    "unbind": lambda x, dim=0: list(np.moveaxis(x, dim, 0)),
    "getitem": lambda parts, i: parts[i], "index": _index, "_unsafe_index": _index, "index_put": _put,
    "index_select": lambda x, dim, index: np.take(x, index, dim), "gather": _gather,
    "scatter.src": _scatter, "scatter.value": _scatter, "flip": np.flip,
    "roll": lambda x, by, dims: np.roll(x, by, tuple(dims) or None), "repeat": np.tile,
    "constant_pad_nd": _pad, "tril": np.tril, "triu": np.triu, "clone": np.array,
    "diagonal": np.diagonal,
    "diag_embed": _diag_embed, "copy": lambda x, source, *_: np.broadcast_to(source, x.shape),
    "fill": lambda x, value: np.full(x.shape, value),
    "zero": np.zeros_like, "full": np.full, "arange.start": np.arange,
    "arange.start_step": np.arange, "arange": np.arange,
    "full_like": lambda x, value, dtype=None: np.full(x.shape, value, dtype or x.dtype),
    "zeros_like": lambda x, dtype=None: np.zeros(x.shape, dtype or x.dtype),
    "ones_like": lambda x, dtype=None: np.ones(x.shape, dtype or x.dtype), "new_zeros": _new(0), "new_ones": _new(1),
}  # fmt: skip


def _shape(x: Any) -> Any:
    """The shape, where that is all that a random operator is given of a tensor."""
    return tuple(x) if isinstance(x, list) else x.shape


def _normal(g: Any, mean: Any, std: Any) -> Array:
    return mean + std * g.standard_normal(np.broadcast_shapes(np.shape(mean), np.shape(std)))


def _dirichlet(g: Any, alpha: Array) -> Array:
    parts = g.standard_gamma(alpha)
    return parts / parts.sum(-1, keepdims=True)


def _multinomial(g: Any, probs: Array, count: int, replacement: bool = False) -> Array:
    if count > 1 and not replacement:
        raise ValueError("draws without replacement")
    steps = np.cumsum(probs, -1)[..., None, :]
    places = g.random((*probs.shape[:-1], count, 1)) * steps[..., -1:]
    return np.minimum((places >= steps).sum(-1), probs.shape[-1] - 1)


RANDOM: dict[str, Callable[..., Any]] = {
    "normal": _normal, "normal_": lambda g, x, mean=0, std=1: mean + std * g.standard_normal(_shape(x)),
    "randn": lambda g, size, *_: g.standard_normal(tuple(size)), "rand": lambda g, size, *_: g.random(tuple(size)),
    "randn_like": lambda g, x, *_: g.standard_normal(_shape(x)), "rand_like": lambda g, x, *_: g.random(_shape(x)),
    "uniform_": lambda g, x, low=0, high=1: g.uniform(low, high, _shape(x)),
    "exponential_": lambda g, x, rate=1: g.exponential(1 / rate, _shape(x)),
    "cauchy_": lambda g, x, median=0, sigma=1: median + sigma * g.standard_cauchy(_shape(x)),
    "geometric_": lambda g, x, p: g.geometric(p, _shape(x)),
    "log_normal_": lambda g, x, mean=1, std=2: np.exp(mean + std * g.standard_normal(_shape(x))),
    "bernoulli": lambda g, p: g.random(p.shape) < p, "bernoulli_": lambda g, x, p=0.5: g.random(_shape(x)) < p,
    "poisson": lambda g, rate: g.poisson(rate), "binomial": lambda g, n, p: g.binomial(n.astype(np.int64), p),
    "_standard_gamma": lambda g, alpha: g.standard_gamma(alpha), "_sample_dirichlet": _dirichlet,
    "multinomial": _multinomial,
}  # fmt: skip


Random = Callable[[int, str, list[Any]], Array]
_DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")


@dataclass(frozen=True)
class _Step:
    """One call: value number ``place`` is what ``function`` makes of earlier values."""

    place: int
    operator: str
    arguments: Callable[[list[Any], int], list[Any]]
    needs: tuple[int, ...]
    dtype: Any
    into: bool


class Graph:
    """The operators of one manifest with the ``arrays`` that they read.

    Values are numbered: first the inputs, then the constants, then what each
    node makes. Outputs are known by name.

    Raises
    ------
    ValueError
        If an operator is unknown, or refers to what is not there.
    """

    def __init__(self, described: Mapping[str, Any], arrays: Mapping[str, Array], inputs: int) -> None:
        self.each = bool(described["each"])
        self._inputs = inputs
        self._constants = [_constant(spec, arrays) for spec in _items(described["constants"])]
        first = inputs + len(self._constants)
        self._steps = [_step(first + i, node) for i, node in enumerate(_items(described["nodes"]))]
        self._size = first + len(self._steps)
        self._outputs = {name: _place(place, self._size) for name, place in described["outputs"].items()}
        self._plans: dict[tuple[str, ...], list[tuple[_Step, tuple[int, ...]]]] = {}

    def run(
        self,
        inputs: Sequence[Array],
        rows: int,
        seed: Sequence[int],
        wanted: tuple[str, ...],
        random: Random | None = None,
    ) -> list[Array]:
        """The outputs ``wanted`` for ``rows`` rows; each random node has a generator of its own, from ``seed``.

        With ``random`` that makes the random numbers, from the place of a node,
        its operator and its arguments.
        """

        def drawn(place: int, operator: str, given: list[Any]) -> Array:
            return RANDOM[operator](np.random.default_rng([*seed, place]), *given)

        values: list[Any] = [None] * self._size
        values[: self._inputs] = [np.array(value) for value in inputs]
        values[self._inputs : self._inputs + len(self._constants)] = [make(rows) for make in self._constants]
        with np.errstate(all="ignore"):
            for step, done in self._plan(wanted):
                values[step.place] = _called(step, values, rows, random or drawn)
                for place in done:
                    values[place] = None
        return [values[self._outputs[name]] for name in wanted]

    def _plan(self, wanted: tuple[str, ...]) -> list[tuple[_Step, tuple[int, ...]]]:
        """The steps that the outputs need, each with the values that nothing after it reads."""
        if wanted not in self._plans:
            kept = {self._outputs[name] for name in wanted}
            needed = set(kept)
            chosen = []
            whole = any(step.into for step in self._steps)
            for step in reversed(self._steps):
                if whole or step.place in needed:
                    chosen.append((step, tuple({*step.needs, step.place} - needed - kept)))
                    needed |= {*step.needs, step.place}
            self._plans[wanted] = chosen[::-1]
        return self._plans[wanted]


def _called(step: _Step, values: list[Any], rows: int, random: Random) -> Any:
    try:
        given = step.arguments(values, rows)
        if step.operator in RANDOM:
            found = random(step.place, step.operator, given)
        else:
            found = OPERATORS[step.operator](*given)
        if step.dtype is not None:
            found = np.asarray(found, step.dtype)
        if step.into:
            np.copyto(given[0], found)
            found = given[0]
    except Exception as error:
        raise ValueError(f"operator {step.place} ({step.operator}) cannot run: {error}; the file is damaged") from error
    return found


def _step(place: int, node: Any) -> _Step:
    if not isinstance(node, list) or len(node) != 4:
        raise ValueError(f"node {place} is not [operator, arguments, dtype, into]: the file is damaged")
    operator, arguments, dtype, into = node
    if operator not in OPERATORS and operator not in RANDOM:
        raise ValueError(f"operator {operator!r} is unknown: read the file with the predictor.py written beside it")
    needs: list[int] = []
    read = _reader(_items(arguments), place, needs)
    made = None if dtype is None else dtype_named(dtype)
    return _Step(place, operator, read, tuple(needs), made, bool(into))


def _reader(value: Any, before: int, needs: list[int]) -> Callable[[list[Any], int], Any]:
    """How to find an argument: ``{"v": place}`` is a value made before, ``{"n": [a, b]}`` is a + b·rows."""
    if isinstance(value, list):
        parts = [_reader(part, before, needs) for part in value]
        return lambda values, rows: [part(values, rows) for part in parts]
    if isinstance(value, dict):
        (kind, content), *more = value.items() or [("", None)]
        if kind == "v" and not more:
            place = _place(content, before)
            needs.append(place)
            return lambda values, rows: values[place]
        if kind == "n" and not more:
            return lambda values, rows: size_of(value, rows)
        if kind == "t" and not more:
            dtype = dtype_named(content)
            return lambda values, rows: dtype
        raise ValueError(f"argument {value!r} is unknown: the file is damaged")
    return lambda values, rows: value


def size_of(value: Any, rows: int) -> int:
    """A size as it is, or a + b·rows for ``{"n": [a, b]}``."""
    size = value
    if isinstance(value, dict):
        pair = value.get("n")
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, int) for part in pair)):
            raise ValueError(f"size {value!r} is unknown: the file is damaged")
        size = pair[0] + pair[1] * rows
    if not isinstance(size, int):
        raise ValueError(f"size {value!r} is no whole number: the file is damaged")
    return size


def dtype_named(name: Any) -> Any:
    """The type of that name, if it is one of plain numbers."""
    if name not in _DTYPES:
        raise ValueError(f"type {name!r} is none of {', '.join(_DTYPES)}: the file is damaged")
    return np.dtype(name)


def _constant(spec: Any, arrays: Mapping[str, Array]) -> Callable[[int], Array]:
    """How to make a constant: an array seen in another shape and order, then repeated; or 0, 1, … up to the rows."""
    if not isinstance(spec, dict):
        raise ValueError("a constant is not described: the file is damaged")
    if "rows" in spec:
        dtype = dtype_named(spec["rows"])
        return lambda rows: np.arange(rows, dtype=dtype)
    name: Any = spec.get("array")
    shape, order, sizes = (_items(spec.get(key)) for key in ("shape", "order", "sizes"))
    if name not in arrays:
        raise ValueError(f"array {name!r} is missing: the file is damaged")
    try:
        seen = np.transpose(arrays[name].reshape(shape), order)
        np.broadcast_to(seen, [size_of(size, 1) for size in sizes])
    except (TypeError, ValueError) as error:
        raise ValueError(f"array {name!r} has shape {arrays[name].shape}, not {shape}: the file is damaged") from error
    if list(seen.shape) == sizes:
        return lambda rows: seen
    return lambda rows: np.broadcast_to(seen, [size_of(size, rows) for size in sizes])


def _items(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a list: the file is damaged")
    return value


def _place(value: Any, before: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < before:
        raise ValueError(f"value {value!r} is not among the {before} made before: the file is damaged")
    return value


class Interval(NamedTuple):
    """Lower and upper ends, each of the prediction's row shape."""

    lower: Array
    upper: Array


@dataclass(frozen=True)
class Prediction:
    """The posterior predictive at N rows, from S draws.

    Attributes
    ----------
    draws
        (S, N, …): E[y | x, zₛ], one function a row of the array.
    noise
        (N, …): E_z Var[y | x, z], the variance that stays when z is known.
    """

    site: str
    draws: Array
    noise: Array
    _sample: Callable[[], Array]

    @cached_property
    def samples(self) -> Array:
        """(S, N, …): y ~ p(y | x, zₛ), the function with its noise, by NumPy's random numbers."""
        return self._sample()

    @property
    def mean(self) -> Array:
        """E[y | x], shape (N, …)."""
        return over_draws(self.draws)

    @property
    def epistemic(self) -> Array:
        """Var_z E[y | x, z], shape (N, …): what more data would reduce."""
        return self.draws.var(0, dtype=np.float64).astype(self.draws.dtype)

    @property
    def variance(self) -> Array:
        """Var[y | x] = Var_z E[y | x, z] + E_z Var[y | x, z], shape (N, …)."""
        return self.epistemic + self.noise

    @property
    def std(self) -> Array:
        """The square root of ``variance``, in the units of y."""
        return np.sqrt(self.variance)

    def interval(self, prob: float = 0.9, of: str = "observations") -> Interval:
        """The central interval that holds ``prob`` of new observations, or of ``of="functions"``.

        Its ends are quantiles of ``samples``, one observation a draw, or of ``draws``.
        """
        if not 0 < prob < 1:
            raise ValueError(f"prob is {prob!r}: pass a share between 0 and 1, such as 0.9")
        if of not in ("observations", "functions"):
            raise ValueError(f"of is {of!r}: pass 'observations' or 'functions'")
        values = self.samples if of == "observations" else self.draws
        tail = (1 - prob) / 2
        return Interval(*np.quantile(values, [tail, 1 - tail], axis=0))


@dataclass(frozen=True)
class ClassPrediction:
    """Class probabilities at N rows, from S draws.

    Attributes
    ----------
    draws
        (S, N, C): p(class | x, zₛ), one function a row of the array.
    """

    site: str
    draws: Array
    _sample: Callable[[], Array]

    @cached_property
    def samples(self) -> Array:
        """(S, N): a class drawn from each, by NumPy's random numbers."""
        return self._sample()

    @property
    def probs(self) -> Array:
        """p(class | x), shape (N, C)."""
        return over_draws(self.draws)

    @property
    def labels(self) -> Array:
        """The most probable class, shape (N,)."""
        return self.probs.argmax(-1)

    @property
    def entropy(self) -> Array:
        """H[y | x] = −Σ p log p in nats, shape (N,): all uncertainty about the class."""
        return _entropy(self.probs)

    @property
    def mutual_information(self) -> Array:
        """I[y; z | x] = H[E_z p] − E_z H[p] in nats, shape (N,): the part that more data would reduce."""
        return np.maximum(self.entropy - over_draws(_entropy(self.draws)), 0)

    @property
    def variation_ratio(self) -> Array:
        """1 − f/S, shape (N,): the share of the S sampled classes that are not the most frequent one."""
        counts = (self.samples[..., None] == np.arange(self.draws.shape[-1])).sum(0)
        return 1 - counts.max(-1) / len(self.samples)


def over_draws(values: Array) -> Array:
    """The mean over S draws, added up in double precision."""
    return values.mean(0, dtype=np.float64).astype(values.dtype)


def _entropy(probs: Array) -> Array:
    return -(probs * np.log(np.where(probs > 0, probs, 1))).sum(-1)


SCHEMA = 1
MANIFEST = "manifest"
LATENT = "latent."
_NUMBERS = 2**24  # in the largest array of a run, which bounds the memory
_BYTES, _PACKED = 2**28, 20  # a file unpacks to at most so many, or so many times its own size
_DAMAGED = (
    *(ValueError, KeyError, AttributeError, TypeError, EOFError, OSError, RuntimeError, NotImplementedError),
    *(MemoryError, struct.error, zipfile.BadZipFile, zlib.error),
)


class Predictor:
    """E[y | x, zₛ] for S draws z of a fitted posterior, without torch; made by :func:`load`.

    ``latents`` are the draws, ``{site: (S, *site shape)}``, ``manifest`` what the file says of itself.
    """

    def __init__(self, manifest: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        try:
            self._read(manifest, arrays)
            self._check_one_row()
        except (KeyError, TypeError, AttributeError, IndexError, OverflowError, MemoryError) as error:
            raise ValueError(f"the manifest lacks or garbles {error}: the file is damaged") from error

    def _read(self, manifest: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        if manifest["schema"] != SCHEMA:
            raise ValueError(f"the file has schema {manifest['schema']!r}, this reader knows {SCHEMA}: export it anew")
        self.manifest = {key: value for key, value in manifest.items() if key != "graph"}
        self._draws, self._site, self._classes = manifest["draws"], manifest["site"], manifest["kind"] == "classes"
        self._inputs = [(i["name"], list(i["shape"]), dtype_named(i["dtype"])) for i in manifest["inputs"]]
        self._shape = [*manifest["row_shape"]]
        self.latents: dict[str, Array] = {}
        for name, shape in manifest["latents"].items():
            found = arrays.get(LATENT + name)
            if found is None or list(found.shape) != [self._draws, *shape]:
                given = "missing" if found is None else f"of shape {found.shape}"
                raise ValueError(f"draws of {name!r} are {given}, not {(self._draws, *shape)}: the file is damaged")
            self.latents[name] = found
        graph = manifest["graph"]
        self._outputs = ("draws", "samples") if self._classes else ("draws", "samples", "variance")
        if tuple(sorted(graph["outputs"])) != self._outputs:
            raise ValueError(f"the outputs are {sorted(graph['outputs'])}, not {self._outputs}: the file is damaged")
        self._each = [self.latents[name] for name in graph["latents"]] if graph["each"] else []
        self._graph = Graph(graph, arrays, len(self._inputs) + len(self._each))
        self._at_once = max(1, _NUMBERS // max(1, manifest["numbers_a_row"])) if manifest["rows_apart"] else None

    def _check_one_row(self) -> None:
        one = [np.ones([1 if size is None else size for size in shape], kind) for _, shape, kind in self._inputs]
        self.run(one, 1, [0, 0], self._outputs)

    def predict(self, *x: Any, seed: int = 0, batch_size: int | None = None) -> Prediction | ClassPrediction:
        """What is known of y at new rows: mean, variance, draws, or the probabilities of classes.

        ``draws`` are those of ``posterior.predict(x, draws=S, seed=s)`` for the
        S and s of the export; where rows have latents of their own these are
        drawn anew, from ``seed``, as observations are. At most ``batch_size``
        rows are run together; if left out, as many as fit in the memory where
        rows do not depend on each other, else all.

        Raises
        ------
        ValueError
            If x has other columns than the fit, or is not made of finite numbers.
        """
        inputs = self._checked(x)
        counts = [len(value) for value, (_, shape, _) in zip(inputs, self._inputs, strict=True) if shape]
        rows = counts[0] if counts else 1
        size = min(rows, (self._at_once or rows) if batch_size is None else _whole(batch_size, "batch_size", 1))
        seed = _whole(seed, "seed", 0)

        def parts(*wanted: str) -> list[Array]:
            cuts = [(begin, min(begin + size, rows)) for begin in range(0, rows, size)]
            found = [self.run(self._cut(inputs, *cut), cut[1] - cut[0], [seed, cut[0]], wanted) for cut in cuts]
            return [np.concatenate(part, 1) if len(part) > 1 else part[0] for part in zip(*found, strict=True)]

        def sample() -> Array:
            return parts("samples")[0]

        if self._classes:
            return ClassPrediction(self._site, parts("draws")[0], sample)
        draws, variance = parts("draws", "variance")
        return Prediction(self._site, draws, over_draws(variance), sample)

    __call__ = predict

    def describe(self) -> str:
        """What the file says it holds, one thing a line."""
        return "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in self.manifest.items())

    def __repr__(self) -> str:
        given = ", ".join(f"{name} {_words(shape)} {kind}" for name, shape, kind in self._inputs) or "nothing"
        return f"<Predictor of {self._site!r} by {self.manifest.get('model')!r} from {given}: {self._draws} draws>"

    def _cut(self, inputs: list[Array], begin: int, end: int) -> list[Array]:
        pairs = zip(inputs, self._inputs, strict=True)
        return [value[begin:end] if shape else value for value, (_, shape, _) in pairs]

    def run(
        self,
        inputs: list[Array],
        rows: int,
        seed: list[int],
        wanted: tuple[str, ...],
        random: Random | None = None,
    ) -> list[Array]:
        """The outputs ``wanted`` at all draws, (S, …), all at once or one after the other."""
        if not self._graph.each:
            found = self._graph.run(inputs, rows, seed, wanted, random)
        else:
            points = ([value[s] for value in self._each] for s in range(self._draws))
            runs = [self._graph.run([*inputs, *z], rows, [*seed, s], wanted, random) for s, z in enumerate(points)]
            found = [np.stack(values) for values in zip(*runs, strict=True)]
        shape = tuple(size_of(size, rows) for size in self._shape)
        for name, value in zip(wanted, found, strict=True):
            wanted_shape = shape[:-1] if self._classes and name == "samples" else shape
            if np.shape(value) != (self._draws, *wanted_shape):
                raise ValueError(f"{name} come out as {np.shape(value)}, not {(self._draws, *wanted_shape)}")
        return found

    def _checked(self, x: tuple[Any, ...]) -> list[Array]:
        if len(x) != len(self._inputs):
            names = ", ".join(f"{name} {_words(shape)}" for name, shape, _ in self._inputs) or "none"
            raise ValueError(f"predict was given {len(x)} arrays: it takes {len(self._inputs)}, {names}")
        found = [_as_input(value, *spec) for value, spec in zip(x, self._inputs, strict=True)]
        rows = {spec[0]: len(value) for value, spec in zip(found, self._inputs, strict=True) if spec[1]}
        if len(set(rows.values())) > 1:
            raise ValueError(f"the inputs have different numbers of rows, {rows}: give as many of each")
        return found


def _as_input(value: Any, name: str, shape: list[Any], dtype: Any) -> Array:
    """``value`` as an array of the type that the model was fitted on, or a ValueError that says what is wrong."""
    try:
        found = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is not one array: give numbers of shape {_words(shape)}") from error
    if found.dtype.kind not in "fiub":
        raise ValueError(f"{name} has type {found.dtype}: give numbers of shape {_words(shape)}")
    fits = found.ndim == len(shape) and all(w is None or w == n for w, n in zip(shape, found.shape, strict=True))
    if not fits or found.size == 0:
        raise ValueError(f"{name} has shape {found.shape}: give rows as in the fit, of shape {_words(shape)}")
    with np.errstate(all="ignore"):
        made = found.astype(dtype)
        same = made.dtype.kind == "f" or np.array_equal(made, found)
    if not np.isfinite(made).all():
        raise ValueError(f"{name} has values that are NaN, infinite or too large: give finite {_words(shape)}")
    if not same:
        raise ValueError(f"{name} was of type {dtype} in the fit, and some values given are not: round them first")
    return made


def _words(shape: list[Any]) -> str:
    return "(" + ", ".join("rows" if size is None else str(size) for size in shape) + ("," * (len(shape) == 1)) + ")"


def _whole(value: Any, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is {value!r}: pass a whole number of at least {least}")
    return int(value)


def _unpacked(stream: BinaryIO, size: int) -> dict[str, Array]:
    """The arrays of an NPZ file of so many bytes, each whole by its checksum, and never of Python objects."""
    with zipfile.ZipFile(stream) as packed:
        members = packed.infolist()
        total = sum(member.file_size for member in members)
        if total > max(_BYTES, _PACKED * size):
            raise ValueError(f"its {size:,} bytes would unpack to {total:,}")
        return {
            member.filename.removesuffix(".npy"): np.lib.format.read_array(
                io.BytesIO(packed.read(member)), allow_pickle=False
            )
            for member in members
        }


def load(path: str | Path | None = None) -> Predictor:
    """The predictor in an NPZ file, by default the one of the same name beside this module; nothing is unpickled.

    Raises
    ------
    ValueError
        If the file is damaged, or is not one that ``Posterior.export`` wrote.
    FileNotFoundError
        If it is not there.
    """
    place = Path(__file__).with_suffix(".npz") if path is None else Path(path)
    if not place.is_file():
        raise FileNotFoundError(f"{place} is no file that is there: give the one that Posterior.export wrote")
    with place.open("rb") as stream:
        try:
            arrays = _unpacked(stream, place.stat().st_size)
            text = arrays.pop(MANIFEST)
            manifest = json.loads(str(text[()])) if text.dtype.kind == "U" and text.shape == () else None
        except _DAMAGED as error:
            raise ValueError(f"{place} is not a predictor, or is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != "kiln predictor":
        raise ValueError(f"{place} was not written by Posterior.export")
    if any(array.dtype.kind not in "fiub" for array in arrays.values()):
        raise ValueError(f"{place} holds more than numbers: it was not written by Posterior.export")
    try:
        return Predictor(manifest, arrays)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
