"""One run of Python recorded as a graph of torch operators, so that it need not run again.

The tracer sees every operator below autograd, with its real tensors. A tensor is
*live* if it depends on the graph's inputs or on a random number; an operator
becomes a node only if one of its arguments is live. Everything else, such as
the prior's parameters or a standardised design matrix, is computed while the model
runs and enters the graph as a constant. A graph is right for every step if

* no live number was read by Python: a branch on it would be fixed for ever;
* no tensor that outlives the run was written to: the write would not repeat;
* no constant was changed after the graph had read it.

Each of these is refused with the line of the model that does it.
"""

from __future__ import annotations

import operator
import os
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from inference.engine.tracing.random_ops import RandomOp, is_random
from inference.engine.tracing.traced_graph import DispatchMode, GraphInput, InputKind, add_input

__all__ = ["Substitution", "Tracer", "Untraceable", "shape_only"]

aten = torch.ops.aten
_SHAPE_ONLY = {
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like",
    "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided",
}  # fmt: skip
_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor)
_READS = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__}
_DYNAMIC = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_OURS = (
    *(f"{Path(folder).resolve()}{os.sep}" for folder in (Path(__file__).parents[2], *torch.__path__, *pyro.__path__)),
    sysconfig.get_path("stdlib"),
)


class Untraceable(ValueError):
    """Reason why a model or guide cannot be turned into a graph, with the line it comes from."""


class Substitution(TorchFunctionMode):
    """Replace, in each call of torch, the first tensor of a pair in ``replacements`` by the second.

    A model holds its parameters as tensors of its own; in a trace these have to be views of θ. The mode also refuses
    calls that read numbers out of ``tape``'s tensors without an operator, which the tracer would not see.
    """

    def __init__(self, replacements: list[tuple[Tensor, Tensor]], tape: Tracer) -> None:
        super().__init__()
        self._tape = tape
        self._by_id = {id(old): new for old, new in replacements}
        self._old = [old for old, _ in replacements]  # an id is only good while its tensor lives

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func`` with the replacements."""
        if func in _READS and self._tape.depends(tree_map(self._swap, args)):
            raise Untraceable(f"{_where()} needs the value of a drawn or learned number (Tensor.{func.__name__})")
        return func(*tree_map(self._swap, args), **tree_map(self._swap, kwargs or {}))

    def _swap(self, value: Any) -> Any:
        return self._by_id.get(id(value), value)


class Tracer(DispatchMode):
    """Record what is computed from ``inputs`` inside the block, below autograd, as ``graph``.

    Only what depends on the inputs, or on random numbers, is recorded. Other
    results are computed here and now: those the graph needs are its
    ``constants``, inputs of the kind CONSTANT in order. A random
    call with a fixed distribution becomes an input of the kind DRAW, described
    in ``draws``; any other (a Gamma whose shape is learned) stays in the graph,
    and is a None in ``randoms``, which lists all of them in order. ``failures``
    holds the error codes of matrix factorisations, which eager torch raises on;
    ``largest`` is the size of the largest tensor, in numbers.
    With ``folds_scalars`` numbers made on the way are written into the graph; without ``folds`` no number is, so
    that graphs which differ in their constants alone are the same.
    """

    def __init__(
        self,
        inputs: Mapping[GraphInput, Tensor],
        forbidden: Callable[[Tensor], str | None] | None = None,
        folds_scalars: bool = False,
        folds: bool = True,
    ) -> None:
        super().__init__()
        self._folds_scalars = folds_scalars
        self._folds = folds
        self.graph = fx.Graph()
        self.constants: list[Tensor] = []
        self.draws: list[RandomOp] = []
        self.randoms: list[int | None] = []
        self.failures: list[Tensor] = []
        self.largest = 0
        self._forbidden = forbidden
        # Tensors are known by their ids, which are used again once a tensor is gone: ``_alive`` keeps all of them.
        self._nodes: dict[int, fx.Node] = {}
        self._live: set[int] = set()  # ids of tensors that depend on an input or a random number
        self._alive: list[Any] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._fresh: set[int] = set()  # addresses of memory that was allocated inside the block
        self._variables: set[int] = set()  # addresses of memory that the graph writes to: all its tensors are live
        self._views: dict[int, tuple[Any, Any, Any, int]] = {}  # how each view of memory that is not live was made
        self._without_grad: list[tuple[fx.Node, Tensor]] = []
        self._end = self.graph.create_node("call_function", _end_of_inputs)
        for given, value in inputs.items():
            self._follow(value, self._placeholder(given))

    def finish(self, *outputs: Tensor) -> fx.Graph:
        """Return the graph that computes ``outputs``, without the nodes that they do not need."""
        self.graph.output(tuple(self._argument(out) for out in outputs))
        self.graph.erase_node(self._end)
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or _has_effect(node))
        for node, value in self._without_grad:  # an operator with a gradient of its own runs without autograd too
            node.meta["cut"] = not value.requires_grad
        if any(value._version != version for value, version in self._versions):
            raise Untraceable("a tensor is changed in place after the model has read it")
        return self.graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator, and record it if the graph has to."""
        kwargs = kwargs or {}
        if func is aten._linalg_check_errors.default and self.depends(args):
            # It would read the error code to raise. The code is kept instead: the loss becomes NaN where it is not 0.
            self.failures.append(args[0])
            return None
        if is_random(func):
            # An operator that fills a tensor, or looks at its shape alone, draws from a distribution that does not
            # depend on the numbers in it, live or not.
            values = args[1:] if func._schema.is_mutable or shape_only(func) else args
            if not self.depends(values, kwargs):
                return self._record_draw(func, args, kwargs)
            self.randoms.append(None)
        elif shape_only(func) or not self.depends(args, kwargs):
            return self._run_now(func, args, kwargs)
        return self._record(func, args, kwargs)

    def depends(self, *structure: Any) -> bool:
        """Return True if a tensor in ``structure`` depends on the inputs or on random numbers."""
        return any(isinstance(leaf, Tensor) and self._is_live(leaf) for leaf in tree_leaves(structure))

    def _is_live(self, value: Tensor) -> bool:
        return id(value) in self._live or (bool(self._variables) and _address(value) in self._variables)

    def _run_now(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator that the graph does not need, and note which memory is new and which results are views.

        The memory of a view may become the graph's later, when something live is written into it: :meth:`_view_again`
        then takes the view in the graph.
        """
        for value in _written(func, args, kwargs):
            self._refuse_outliving(value, func)
        out = func(*args, **kwargs)
        given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for i, leaf in enumerate(tree_leaves(out)):
            if not isinstance(leaf, Tensor):
                continue
            if _address(leaf) not in given:
                self._fresh.add(_address(leaf))
            elif not func._schema.is_mutable:
                self._views[id(leaf)] = (func, args, kwargs, i)
            self._alive.append(leaf)
        return out

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator and add its node; memory that it writes to becomes the graph's first."""
        if func in _INDEXED:
            args = (args[0], self._without_masks(args[1]), *args[2:])
        elif not _DYNAMIC.isdisjoint(func.tags):
            raise Untraceable(f"{_where()} needs the value of a drawn or learned number ({func})")
        for value in _written(func, args, kwargs):
            self._make_variable(value, func)
        out = func(*args, **kwargs)
        node = self.graph.call_function(func, tree_map(self._argument, args), tree_map(self._argument, kwargs))
        if isinstance(out, Tensor):
            self._follow(out, node)
        else:
            for i, part in enumerate(out if isinstance(out, list | tuple) else ()):
                if isinstance(part, Tensor):
                    self._follow(part, self.graph.call_function(operator.getitem, (node, i)))
        return out

    def _without_masks(self, indices: Any) -> list[Any]:
        """Return indices in which each fixed mask is replaced by the rows that it picks: every shape is then known."""
        whole: list[Any] = []
        for index in indices:
            if not isinstance(index, Tensor) or index.dtype not in (torch.bool, torch.uint8):
                whole.append(index)
            elif self._is_live(index):
                raise Untraceable(f"{_where()} picks rows by a mask that depends on a drawn or learned number")
            else:
                whole.extend(index.nonzero(as_tuple=True))
        return whole

    def _record_draw(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a random call with a fixed distribution; its result becomes an input of the graph.

        So random numbers can be drawn for many steps at once, outside the graph. An operator that fills a tensor of
        new memory needs no copy: the tensor, and all that it is a view of, *is* the input. If the tensor is a part of
        something larger the numbers are copied into it.
        """
        out = func(*args, **kwargs)
        given = args[1:] if func._schema.is_mutable else args
        frozen = tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, given)
        draw = RandomOp(func, tuple(frozen), dict(kwargs), tuple(out.shape), out.dtype, out.device)
        self.randoms.append(len(self.draws))
        node = self._placeholder(GraphInput(InputKind.DRAW, len(self.draws)))
        self.draws.append(draw)
        if not draw.in_place:
            self._follow(out, node)
            return out
        target = args[0]
        whole = target.is_contiguous() and target.untyped_storage().nbytes() == target.nbytes
        aliases = self._chain(target)
        if whole and _address(target) in self._fresh and all(a.shape == target.shape for a in aliases):
            self._variables.add(_address(target))
            for alias in aliases:
                self._follow(alias, node)
        else:
            self._make_variable(target, func)
            self.graph.call_function(aten.copy_.default, (self._argument(target), node))
        return target

    def _make_variable(self, value: Tensor, func: Any) -> None:
        """Let the graph own the memory of ``value``, which it is about to write to: it begins each run with a clone.

        Without the clone, the second step would find what the first one has written.
        """
        if self._is_live(value):
            return
        self._refuse_outliving(value, func)
        address = _address(value)
        value = self._chain(value)[-1]
        start = self._constant(value.detach().clone(), fresh=True)
        self._variables.add(address)
        self._follow(value, self.graph.call_function(aten.clone.default, (start,)))

    def _refuse_outliving(self, value: Tensor, func: Any) -> None:
        if _address(value) not in self._fresh:
            raise Untraceable(f"{_where()} changes a tensor that outlives the step ({func}), which a graph cannot")

    def _chain(self, value: Tensor) -> list[Tensor]:
        """Return ``value``, the tensor that it is a view of, the tensor that this is a view of, and so on."""
        chain = [value]
        while id(chain[-1]) in self._views:
            _, args, kwargs, _ = self._views[id(chain[-1])]
            chain.append(
                next(
                    leaf
                    for leaf in tree_leaves((args, kwargs))
                    if isinstance(leaf, Tensor) and _address(leaf) == _address(value)
                )
            )
        return chain

    def _argument(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in self._nodes:
            return self._nodes[id(value)]
        if _address(value) in self._variables and id(value) in self._views:
            return self._view_again(value)
        return self._constant(value, fresh=_address(value) in self._fresh)

    def _view_again(self, value: Tensor) -> fx.Node:
        """Take, in the graph, a view that was taken before its memory became the graph's."""
        func, args, kwargs, part = self._views[id(value)]
        node = self.graph.call_function(func, tree_map(self._argument, args), tree_map(self._argument, kwargs))
        if isinstance(func(*args, **kwargs), list | tuple):
            node = self.graph.call_function(operator.getitem, (node, part))
        self._follow(value, node)
        return node

    def _constant(self, value: Tensor, fresh: bool) -> fx.Node:
        """Add a tensor that no input determines, and note its version: whoever changes it later makes the graph wrong.

        Zeros and ones that were made in the block are written into the graph, where Inductor removes the operators
        that they make trivial. A tensor from outside is never written in, as its values may differ in another fit.
        """
        name = self._forbidden(value) if self._forbidden is not None else None
        if name is not None:
            raise Untraceable(
                f"{_where()} reads the parameter {name!r} where torch cannot see it (a scripted function?)"
            )
        folded = _as_literal(value, any_scalar=self._folds_scalars) if fresh and self._folds else None
        if folded is not None:
            options: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
            node = self.graph.call_function(aten.full.default, (list(value.shape), folded), options)
        else:
            node = self._placeholder(GraphInput(InputKind.CONSTANT, len(self.constants)))
            self.constants.append(value)
        self._nodes[id(value)] = node
        self._alive.append(value)
        self._versions.append((value, value._version))
        return node

    def _follow(self, value: Tensor, node: fx.Node) -> None:
        """Note that ``value`` is live and that ``node`` computes it."""
        self.largest = max(self.largest, value.numel())
        if node.op == "call_function" and not torch.is_grad_enabled():
            self._without_grad.append((node, value))
        self._nodes[id(value)] = node
        self._live.add(id(value))
        self._alive.append(value)

    def _placeholder(self, given: GraphInput) -> fx.Node:
        with self.graph.inserting_before(self._end):
            return add_input(self.graph, given)


def _end_of_inputs() -> None:
    """Do nothing: a node that stands between the inputs of a graph and its operators while it grows."""


def _has_effect(node: fx.Node) -> bool:
    """Return True for operators that are kept even if nothing uses their result.

    Torch's own operators that write to no memory have no other effect. Of others that is not known.
    """
    target: Any = node.target
    return hasattr(target, "_schema") and (target._schema.is_mutable or target.namespace != "aten")


def shape_only(func: Any) -> bool:
    """Return True if the operator looks at the shape of its argument alone."""
    return func._schema.name.partition("::")[2] in _SHAPE_ONLY


def _address(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    if not func._schema.is_mutable:
        return []
    named = {a.name: a for a in func._schema.arguments}
    given = [*zip(func._schema.arguments, args, strict=False), *((named[k], v) for k, v in kwargs.items())]
    written = [v for a, v in given if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for leaf in tree_leaves(written) if isinstance(leaf, Tensor)]


def _as_literal(value: Tensor, any_scalar: bool) -> float | None:
    """Return the number that all of ``value`` is, if it is 0 or 1, which make operators vanish; else None."""
    if value.numel() == 0 or value.numel() > 4096 or value.dtype not in (torch.float32, torch.float64):
        return None
    first = value.detach().reshape(-1)[0].item()
    if any_scalar and value.dim() == 0:
        return first
    return first if first in (0.0, 1.0) and bool((value == first).all()) else None


def _where() -> str:
    """Return the line of the model or guide that is running, as ``file.py:12 (name)``."""
    frame: Any = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(_OURS) and not code.co_filename.startswith("<"):
            return f"{Path(code.co_filename).name}:{frame.f_lineno} ({code.co_name})"
        frame = frame.f_back
    return "the model"
