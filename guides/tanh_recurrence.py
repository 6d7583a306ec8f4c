"""h_k = tanh(a_k + Σ_{j<k} m_kj h_j): the one part of a stack of planar layers that has to go layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["tanh_recurrence"]

# Kiln's compiled engine writes an operator's ``cpp`` into its program and calls
# it with the pointers of its arguments and results, then for each argument its
# rows and the numbers in a row.
_FORWARD = r"""
// Blocks of columns, four vectors at a time where there are as many, so that their sums run side by side.
template <typename T, int B>
static inline void tanh_recurrence_block(const T* a, const T* m, T* h, long rows, long columns, int count) {
    using V = at::vec::Vectorized<T>;
    for (long k = 0; k < rows; ++k) {
        V sum[B];
        for (int b = 0; b < B; ++b) sum[b] = V::loadu(a + k * columns + b * V::size(), count);
        for (long j = 0; j < k; ++j) {
            const V factor(m[k * rows + j]);
            for (int b = 0; b < B; ++b)
                sum[b] = at::vec::fmadd(factor, V::loadu(h + j * columns + b * V::size(), count), sum[b]);
        }
        for (int b = 0; b < B; ++b) tanh_of(sum[b]).store(h + k * columns + b * V::size(), count);
    }
}
template <typename T>
static void tanh_recurrence(const T* a, const T* m, T* h, long rows, long columns, long, long) {
    constexpr int W = at::vec::Vectorized<T>::size();
    long p = 0;
    for (; p + 4 * W <= columns; p += 4 * W) tanh_recurrence_block<T, 4>(a + p, m, h + p, rows, columns, W);
    for (; p + W <= columns; p += W) tanh_recurrence_block<T, 1>(a + p, m, h + p, rows, columns, W);
    if (p < columns) tanh_recurrence_block<T, 1>(a + p, m, h + p, rows, columns, columns - p);
}
"""
_BACKWARD = r"""
template <typename T, int B>
static inline void tanh_recurrence_backward_block(
    const T* g, const T* h, const T* m, T* s, long rows, long columns, int count) {
    using V = at::vec::Vectorized<T>;
    for (long k = rows - 1; k >= 0; --k) {
        V sum[B];
        for (int b = 0; b < B; ++b) sum[b] = V::loadu(g + k * columns + b * V::size(), count);
        for (long j = k + 1; j < rows; ++j) {
            const V factor(m[j * rows + k]);
            for (int b = 0; b < B; ++b)
                sum[b] = at::vec::fmadd(factor, V::loadu(s + j * columns + b * V::size(), count), sum[b]);
        }
        for (int b = 0; b < B; ++b) {
            const V here = V::loadu(h + k * columns + b * V::size(), count);
            (sum[b] * (V(1) - here * here)).store(s + k * columns + b * V::size(), count);
        }
    }
}
template <typename T>
static void tanh_recurrence_backward(
    const T* g, const T* h, const T* m, T* s, long rows, long columns, long, long, long, long) {
    constexpr int W = at::vec::Vectorized<T>::size();
    long p = 0;
    for (; p + 4 * W <= columns; p += 4 * W)
        tanh_recurrence_backward_block<T, 4>(g + p, h + p, m, s + p, rows, columns, W);
    for (; p + W <= columns; p += W)
        tanh_recurrence_backward_block<T, 1>(g + p, h + p, m, s + p, rows, columns, W);
    if (p < columns) tanh_recurrence_backward_block<T, 1>(g + p, h + p, m, s + p, rows, columns, columns - p);
}
"""


@torch.library.custom_op("kiln::tanh_recurrence", mutates_args=())
def tanh_recurrence(a: Tensor, m: Tensor) -> Tensor:
    """The h that solves h_k = tanh(a_k + Σ_{j<k} m_kj h_j), one layer after the other.

    Parameters
    ----------
    a
        (K, …): what each layer would see alone, contiguous.
    m
        (K, K): what layer k sees of layer j; only j < k is read.

    Examples
    --------
    >>> h = tanh_recurrence(torch.tensor([1.0, 0.0]), torch.tensor([[9.0, 9.0], [0.5, 9.0]]))
    >>> bool(h[1] == torch.tanh(0.5 * h[0]))
    True
    """
    h = torch.empty_like(a, memory_format=torch.contiguous_format)
    given, found = a.reshape(len(a), -1), h.view(len(a), -1)
    for k in range(len(a)):
        torch.tanh(torch.addmv(given[k], found[:k].T, m[k, :k]), out=found[k])
    return h


@torch.library.custom_op("kiln::tanh_recurrence_backward", mutates_args=())
def _backward(g: Tensor, h: Tensor, m: Tensor) -> Tensor:
    """The gradient s with respect to a: s_k = (1 − h_k²)(g_k + Σ_{j>k} m_jk s_j)."""
    s = torch.empty_like(h, memory_format=torch.contiguous_format)
    slope = (1 - h * h).reshape(len(h), -1)
    given, found = g.reshape(len(h), -1), s.view(len(h), -1)
    for k in reversed(range(len(h))):
        torch.mul(slope[k], torch.addmv(given[k], found[k + 1 :].T, m[k + 1 :, k]), out=found[k])
    return s


@tanh_recurrence.register_fake
def _(a: Tensor, m: Tensor) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(g: Tensor, h: Tensor, m: Tensor) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output, inputs[1])


def _gradient(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    h, m = ctx.saved_tensors
    s = _backward(g.contiguous(), h, m)
    return s, torch.tril(s.flatten(1) @ h.flatten(1).T, -1)


@tanh_recurrence.register_vmap
def _(info: Any, in_dims: tuple[int | None, int | None], a: Tensor, m: Tensor) -> tuple[Tensor, int]:
    if in_dims[0] is None or in_dims[1] is not None:
        raise NotImplementedError("layers that differ from particle to particle")
    return tanh_recurrence(a.movedim(in_dims[0], -1).contiguous(), m), a.dim() - 1


@_backward.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, int | None, int | None], g: Tensor, h: Tensor, m: Tensor
) -> tuple[Tensor, int]:
    if in_dims[0] is None or in_dims[1] is None or in_dims[2] is not None:
        raise NotImplementedError("layers that differ from particle to particle")
    wide = (part.movedim(place, -1).contiguous() for part, place in ((g, in_dims[0]), (h, in_dims[1])))
    return _backward(*wide, m), g.dim() - 1


tanh_recurrence.register_autograd(_gradient, setup_context=_keep)
for _operator, _source in (("tanh_recurrence", _FORWARD), ("tanh_recurrence_backward", _BACKWARD)):
    setattr(getattr(torch.ops.kiln, _operator).default, "cpp", _source)  # noqa: B010 - no such name for a type checker
