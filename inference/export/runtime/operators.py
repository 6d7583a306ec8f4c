"""Torch's operators in NumPy, by the names that they have below autograd.

Each takes the arguments of torch's schema in their order, without those that
say where a tensor lies. Random operators have a generator in front.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from inference.export.runtime.layers import (
    avg_pool,
    batch_norm,
    cholesky,
    convolution,
    erf,
    group_norm,
    layer_norm,
    lgamma,
    max_pool,
    softplus,
    solve_triangular,
)

__all__ = ["OPERATORS", "RANDOM"]

Array = Any


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


def _clamp(x: Array, low: Any = None, high: Any = None) -> Array:
    x = x if low is None else np.maximum(x, low)
    return x if high is None else np.minimum(x, high)


def _affine(bias: Array, x: Array, y: Array, beta: float = 1, alpha: float = 1) -> Array:
    product = np.matmul(x, y)
    product = product if alpha == 1 else alpha * product
    return bias + product if beta == 1 else beta * bias + product


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
    np.put_along_axis(x, index, values if np.ndim(values) == 0 else values[tuple(map(slice, index.shape))], dim)
    return x


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


def _new(value: float) -> Callable[..., Array]:
    return lambda x, size, dtype=None: np.full(size, value, dtype or x.dtype)


OPERATORS: dict[str, Callable[..., Any]] = {
    # one number to one number
    **{name: getattr(np, name) for name in ("abs", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt")},
    **{name: getattr(np, name) for name in ("square", "reciprocal", "sin", "cos", "tan", "sinh", "cosh", "tanh")},
    **{name: getattr(np, name) for name in ("floor", "ceil", "trunc", "sign", "isnan", "isinf", "logical_not")},
    **{name: getattr(np, f"arc{name[1:]}") for name in ("asin", "acos", "atan", "asinh", "acosh", "atanh", "atan2")},
    **dict.fromkeys(
        ("detach", "alias", "_to_copy", "lift_fresh", "contiguous", "_conj", "_unsafe_masked"), lambda x, *_: x
    ),
    "neg": np.negative, "bitwise_not": np.invert, "rsqrt": lambda x: 1 / np.sqrt(x), "round": np.round,
    "erf": erf, "erfc": lambda x: 1 - erf(x), "lgamma": lgamma, "sigmoid": _sigmoid,
    "logit": lambda x, eps=None: np.log((p := x if eps is None else np.clip(x, eps, 1 - eps)) / (1 - p)),
    "relu": lambda x: np.maximum(x, 0), "leaky_relu": lambda x, slope=0.01: np.where(x > 0, x, slope * x),
    "elu": _elu, "celu": lambda x, alpha=1: _elu(x, alpha, 1, 1 / alpha),
    "special_entr": lambda x: -np.where(x == 0, 0, x * np.log(np.where(x == 0, 1, x))),
    "gelu": _gelu, "silu": lambda x: x * _sigmoid(x), "softplus": lambda x, b=1, t=20: softplus(x, b, t),
    "mish": lambda x: x * np.tanh(softplus(x, 1, 20)), "hardtanh": lambda x, low=-1, high=1: np.clip(x, low, high),
    "hardsigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1), "hardswish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "log_sigmoid_forward": lambda x, *_: (np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x))), None),
    "threshold": lambda x, low, value: np.where(x > low, x, value),
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
    "slice": lambda x, dim=0, start=None, end=None, step=1: x[
        (*[slice(None)] * (dim % x.ndim), slice(start, end, step))
    ],
    "select": lambda x, dim, index: x[(*[slice(None)] * (dim % x.ndim), index)],
    "cat": np.concatenate, "stack": np.stack,
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
    "normal": lambda g, mean, std: mean + std * g.standard_normal(np.broadcast_shapes(np.shape(mean), np.shape(std))),
    "normal_": lambda g, x, mean=0, std=1: mean + std * g.standard_normal(_shape(x)),
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
