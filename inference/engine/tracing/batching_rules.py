"""Batching rules: a traced function run for many particles, or fits, at once, which lie in the last dimension.

``torch.vmap`` puts them first, which makes vectors as short as a particle's few
numbers; here they run along the particles.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from inference.engine.tracing.traced_graph import GraphInput, input_of, native_code

__all__ = ["NoRule", "run_batched"]

aten = torch.ops.aten
_CPP = (Path(__file__).parent / "cpp" / "batched_products.h").read_text(encoding="utf-8")
_SHORT = 8  # an inner dimension that is summed by multiplications rather than by a matrix product


class NoRule(Exception):
    """Reason why a graph has no batched form here: an operator without a rule, or one that writes to memory."""


@torch.library.custom_op("kiln::products_beside", mutates_args=())
def batched_products(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ_k a_mkc b_knc, (M, N, C), of a, (M, K, C), and b, (K, N, C), both contiguous.

    The C products of one element lie side by side in memory. BLAS has no such
    product: it would first move the fits to the front, which copies both
    matrices. The operator's C++ keeps a tile of sums in registers instead, each
    of them a vector that runs along C.

    Examples
    --------
    >>> a, b = torch.randn(2, 3, 8), torch.randn(3, 4, 8)
    >>> bool(torch.allclose(batched_products(a, b)[..., 5], a[..., 5] @ b[..., 5], atol=1e-6))
    True
    """
    return torch.einsum("mkc,knc->mnc", a, b).contiguous()


@batched_products.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], *b.shape[1:])


setattr(torch.ops.kiln.products_beside.default, "cpp", _CPP)  # noqa: B010 - no such name for a type checker


def run_batched(
    graph: fx.Graph, inputs: Mapping[GraphInput, Tensor], many: Mapping[GraphInput, Tensor], long_products: bool = False
) -> list[Tensor]:
    """Return the outputs of ``graph`` for every particle, each of shape (…, P).

    ``inputs`` are shared; each of ``many`` has the particles in its last dimension.
    With ``long_products`` a product of matrices that all differ is a sum of
    multiplications, however many.

    Raises
    ------
    NoRule
        At an operator that is not elementwise, a sum, a change of shape or a
        product of short vectors; also where memory is written to.
    """
    return _BatchedRun(inputs, many, long_products).outputs(graph)


class _BatchedRun:
    """The values of a graph's nodes, of which those in ``batched`` have the particles as one more, last dimension.

    What does not depend on the particles is computed once, without that dimension.
    """

    def __init__(
        self, inputs: Mapping[GraphInput, Tensor], many: Mapping[GraphInput, Tensor], long_products: bool
    ) -> None:
        self.long_products = long_products
        self.inputs = inputs
        self.many = many
        self.count = next(iter(many.values())).shape[-1]
        self.values: dict[fx.Node, Any] = {}
        self.batched: set[fx.Node] = set()

    def outputs(self, graph: fx.Graph) -> list[Tensor]:
        for node in graph.nodes:
            given = input_of(node)
            if given is not None:
                if given in self.many:
                    self.batched.add(node)
                self.values[node] = self.many[given] if given in self.many else self.inputs[given]
            elif node.op == "output":
                return [self._expanded(part) for part in node.args[0]]
            else:
                self._compute(node)
        raise NoRule("no output")

    def _expanded(self, node: fx.Node) -> Tensor:
        value: Tensor = self.values[node]
        return value if node in self.batched else value.unsqueeze(-1).expand(*value.shape, self.count)

    def _compute(self, node: fx.Node) -> None:
        """Run one operator: as it is if nothing in its arguments is batched, else by the rule for its kind."""
        nodes = [leaf for leaf in tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)]
        function: Any = node.target
        if not any(leaf in self.batched for leaf in nodes):
            args, kwargs = tree_map(lambda a: self.values[a] if isinstance(a, fx.Node) else a, (node.args, node.kwargs))
            if function is not operator.getitem and function._schema.is_mutable:
                raise NoRule(str(function))
            self.values[node] = function(*args, **kwargs)
            return
        self.batched.add(node)
        if function is operator.getitem:
            parts, index = (self.values[a] if isinstance(a, fx.Node) else a for a in node.args)
            self.values[node] = operator.getitem(parts, index)
        elif function._schema.is_mutable:
            raise NoRule(str(function))
        elif torch.Tag.pointwise in function.tags:
            self.values[node] = function(*map(self._aligned, node.args), **node.kwargs)
        elif native_code(function) is not None:
            self.values[node] = self._along_rows(function, *node.args)
        elif function in _RULES:
            self.values[node] = _RULES[function](self, *node.args, **node.kwargs)
        else:
            raise NoRule(str(function))

    def _along_rows(self, function: Any, first: Any, *shared: Any) -> Any:
        """Run an operator with C++ of its own: the particles make the rows of its first argument longer."""
        if any(node in self.batched for node in shared):
            raise NoRule(str(function))
        return function(self.values[first].contiguous(), *(self.values[node] for node in shared))

    def _aligned(self, value: Any) -> Any:
        """Return an argument of an elementwise operator; one that all particles share gets a last dimension of size 1.

        Broadcasting would otherwise put a shared vector beside the particles instead of beside its own dimension.
        """
        if not isinstance(value, fx.Node):
            return value
        found = self.values[value]
        return found if value in self.batched or found.dim() == 0 else found.unsqueeze(-1)

    def rank(self, node: fx.Node) -> int:
        """Return the number of dimensions without that of the particles."""
        dimensions: int = self.values[node].dim()
        return dimensions - (node in self.batched)

    def dim(self, node: fx.Node, dim: int) -> int:
        """Return a dimension counted from the front, as the particles at the end would shift the others."""
        return dim % max(self.rank(node), 1)

    def dims(self, node: fx.Node, dims: Any) -> list[int]:
        """Return the dimensions to reduce, counted from the front; all but that of the particles if none are named."""
        return [self.dim(node, d) for d in dims] if dims else list(range(self.rank(node)))

    def shape(self, node: fx.Node) -> list[int]:
        """Return the shape without the particles."""
        return list(self.values[node].shape[:-1] if node in self.batched else self.values[node].shape)


def _sum(run: _BatchedRun, x: fx.Node, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    chosen = run.dims(x, dims)
    value: Tensor = run.values[x]
    return value.sum(chosen, keepdim, dtype=dtype) if chosen else value.clone()


def _mean(run: _BatchedRun, x: fx.Node, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    chosen = run.dims(x, dims)
    value: Tensor = run.values[x]
    return value.mean(chosen, keepdim, dtype=dtype) if chosen else value.clone()


def _norm(
    run: _BatchedRun, x: fx.Node, order: float = 2, dims: Any = None, keepdim: bool = False, **options: Any
) -> Tensor:
    chosen = range(run.rank(x)) if dims is None else [run.dim(x, d) for d in dims]
    return torch.linalg.vector_norm(run.values[x], order, list(chosen), keepdim, **options)


def _view(run: _BatchedRun, x: fx.Node, shape: list[int]) -> Tensor:
    size = torch.Size(run.shape(x)).numel()
    whole = list(shape)
    if -1 in whole:
        whole[whole.index(-1)] = size // -torch.Size(whole).numel()
    return run.values[x].reshape(*whole, run.count)


def _expand(run: _BatchedRun, x: fx.Node, shape: list[int], *, implicit: bool = False) -> Tensor:
    own = run.shape(x)
    value = run.values[x].reshape(*[1] * (len(shape) - len(own)), *own, run.count)
    return value.expand(*shape, run.count)


def _squeeze(run: _BatchedRun, x: fx.Node, dims: Any = None) -> Tensor:
    given = range(run.rank(x)) if dims is None else [dims] if isinstance(dims, int) else dims
    single = [run.dim(x, d) for d in given if run.rank(x) and run.shape(x)[run.dim(x, d)] == 1]
    return run.values[x].squeeze(single) if single else run.values[x]


def _transpose(run: _BatchedRun, x: fx.Node, first: int = 0, second: int = 1) -> Tensor:
    return run.values[x].transpose(run.dim(x, first), run.dim(x, second)) if run.rank(x) > 1 else run.values[x]


def _split(run: _BatchedRun, x: fx.Node, sizes: Any, dim: int = 0) -> Any:
    return torch.split(run.values[x], sizes, run.dim(x, dim))


def _product(run: _BatchedRun, left: fx.Node, right: fx.Node) -> Tensor:
    """Return a matrix product: a sum of multiplications if it is short, else one product for all if a matrix is shared.

    A short sum is fused by Inductor with what surrounds it, and its vectors run along the particles.
    """
    if run.shape(left)[-1] > _SHORT:
        return _shared_product(run, left, right)
    a, b = run._expanded(left), run._expanded(right)
    if run.rank(right) == 1:  # a matrix or a vector times a vector
        terms = [a[..., k, :] * b[k] for k in range(len(b))]
    else:
        terms = [a[..., :, k, None, :] * b[..., k, None, :, :] for k in range(a.shape[-2])]
    return torch.as_tensor(sum(terms[1:], terms[0]))


def _shared_product(run: _BatchedRun, left: fx.Node, right: fx.Node) -> Tensor:
    """Return the product of a matrix that all particles share with a vector or matrix of each.

    The particles are then columns of one larger matrix, and BLAS has one product to compute. If both matrices differ
    there is no such form: ``long_products`` allows the operator that multiplies them side by side.
    """
    if left not in run.batched and run.rank(left) == 2:
        return torch.tensordot(run.values[left], run.values[right], ([1], [0]))
    if right not in run.batched and run.rank(left) < 3 and run.rank(right) == 2:
        turned = torch.tensordot(run.values[right], run.values[left], ([0], [run.rank(left) - 1]))
        return turned.movedim(0, run.rank(left) - 1)
    if not run.long_products:
        raise NoRule("a matrix product with a long inner dimension, of matrices that differ from particle to particle")
    a, b = run._expanded(left), run._expanded(right)
    if run.rank(left) == 2 == run.rank(right):
        return batched_products(a.contiguous(), b.contiguous())
    if run.rank(right) == 1:
        return (a * b).sum(-2)
    return (a.unsqueeze(-2) * b.unsqueeze(-4)).sum(-3)


def _elementwise(function: Any) -> Any:
    def rule(run: _BatchedRun, *args: Any, **kwargs: Any) -> Any:
        return function(*map(run._aligned, args), **kwargs)

    return rule


def _same(run: _BatchedRun, x: fx.Node, **_: Any) -> Tensor:
    return run.values[x]


# A rule is given the run and an operator's arguments, in which nodes stand for tensors. Negative dimensions are counted
# from the front first: in the tensors of a run, the last dimension is that of the particles.
_RULES: dict[Any, Any] = {
    aten.alias.default: _same,
    aten.bmm.default: _product,
    aten.cat.default: lambda run, parts, dim=0: torch.cat(
        [run._expanded(part) for part in parts], run.dim(parts[0], dim)
    ),
    aten.clone.default: _same,
    aten.detach.default: lambda run, x: run.values[x].detach(),
    aten.dot.default: _product,
    aten.expand.default: _expand,
    aten.linalg_vector_norm.default: _norm,
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten.mm.default: _product,
    aten.mv.default: _product,
    aten.permute.default: lambda run, x, order: run.values[x].permute(*[run.dim(x, d) for d in order], run.rank(x)),
    aten.select.int: lambda run, x, dim, index: run.values[x].select(run.dim(x, dim), index),
    aten.slice.Tensor: lambda run, x, dim=0, start=None, end=None, step=1: aten.slice.Tensor(
        run.values[x], run.dim(x, dim), start, end, step
    ),
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.stack.default: lambda run, parts, dim=0: torch.stack(
        [run._expanded(part) for part in parts], dim % (run.rank(parts[0]) + 1)
    ),
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten._unsafe_view.default: _view,
    aten.unsqueeze.default: lambda run, x, dim: run.values[x].unsqueeze(dim % (run.rank(x) + 1)),
    aten.view.default: _view,
    aten.copy.default: lambda run, to, value: _expand(run, value, run.shape(to)).to(run.values[to].dtype),
    aten.select_backward.default: lambda run, grad, sizes, dim, index: aten.select_backward(
        run.values[grad], [*sizes, run.count], dim % len(sizes), index
    ),
    aten.slice_backward.default: lambda run, grad, sizes, dim, *places: aten.slice_backward(
        run.values[grad], [*sizes, run.count], dim % len(sizes), *places
    ),
    **{
        function: _elementwise(function)
        for function in (
            aten.elu_backward.default,
            aten.gelu_backward.default,
            aten.hardtanh_backward.default,
            aten.leaky_relu_backward.default,
            aten.log_sigmoid_backward.default,
            aten.sigmoid_backward.default,
            aten.silu_backward.default,
            aten.softplus_backward.default,
            aten.tanh_backward.default,
            aten.threshold_backward.default,
        )
    },
}
