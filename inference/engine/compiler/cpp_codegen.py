"""The C++ of a lowered step: Inductor's kernels, matrix products, and the loop over steps.

Inductor writes the kernels in C++ and, around them, Python that calls one
kernel after the other. For a model of a few hundred numbers that Python takes
longer than the kernels. Here the calls become C++ too: a step is one function
without arguments but a table of pointers, and ``run`` takes thousands of steps
without going back to Python. Matrix products, which Inductor leaves to torch,
are written out with their sizes if they are small, and call BLAS otherwise. If
one call can be made by torch alone, the step falls into parts, with
that call between them, and Python loops over the parts.

The text around the kernels is ``cpp/prelude.h``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from inference.engine.compiler.inductor import PREFIX, Call, Lowered, View

__all__ = ["PRELUDE", "source"]

PRELUDE = (Path(__file__).parent / "cpp" / "prelude.h").read_text(encoding="utf-8")

_TYPES = {torch.float32: "float", torch.float64: "double"}
_SMALL = 2**17  # multiplications up to which a call of BLAS is not faster
_PACKED = 2**15  # numbers that a product copies at most: they lie on the stack
_PRODUCTS = {"aten.mm.out": 0, "aten.addmm.out": 1, "aten.bmm.out": 0, "aten.baddbmm.out": 1}


def source(lowered: Lowered, rows: Sequence[tuple[int, int]]) -> tuple[str, list[int | Call]]:
    """Return the C++ of a step, and its parts in order: the number of a compiled part, or a call of torch.

    ``rows`` are the inputs that advance by one row a step: (slot, bytes of a row).
    If all of the step compiles it has one part, and ``run`` loops over it. The
    functions take a table of pointers, one for each slot of memory.
    """
    parts: list[int | Call] = []
    bodies: list[list[str]] = []
    for call in lowered.calls:
        line = _statement(call)
        if line is None:
            parts.append(call)
            continue
        if not parts or isinstance(parts[-1], Call):
            parts.append(len(bodies))
            bodies.append([])
        bodies[-1].append(line)
    kernels = []
    for i, text in enumerate(lowered.kernels):
        # Inductor calls every kernel "kernel" and gives it a library of its own; here they share one file.
        named = re.sub(r'extern "C"\s+void\s+kernel\b', f"static inline void kernel_{i}", text)
        # The prelude's tanh is faster: for vectors of float it is a quotient of two polynomials.
        kernels.append(re.sub(r"\b(\w+)\.tanh\(\)", r"tanh_of(\1)", named))
    brought = list(dict.fromkeys(call.cpp for call in lowered.calls if call.cpp))
    functions = [f'extern "C" void part_{i}(char** p) {{\n{_join(body)}\n}}' for i, body in enumerate(bodies)]
    return "\n".join(
        [f"#include <{PREFIX}>", PRELUDE, *brought, *kernels, *functions, _loop(lowered, rows, parts)]
    ), parts


def _join(lines: Sequence[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


def _loop(lowered: Lowered, rows: Sequence[tuple[int, int]], parts: Sequence[int | Call]) -> str:
    """Return the function that takes all steps of a chunk; empty if torch has to be called in between.

    After each step the pointers of the inputs in ``rows`` move to the next row. They are moved in the caller's own
    table, which sets them anew for each chunk.
    """
    if any(isinstance(part, Call) for part in parts):
        return ""
    size = lowered.output.dtype.itemsize * math.prod(lowered.output.shape)
    lines = [f"part_{part}(p);" for part in parts]
    lines.append(f"std::memcpy(losses + i * {size}, p[{lowered.output.slot}] + {lowered.output.start}, {size});")
    lines += [f"p[{slot}] += {width};" for slot, width in rows]
    return (
        'extern "C" void run(char** p, long steps, char* losses) {\n'
        f"    for (long i = 0; i < steps; ++i) {{\n{_join(lines)}\n    }}\n}}"
    )


def _statement(call: Call) -> str | None:
    """Return one call as a statement of C++; None if torch has to make it."""
    if call.kernel is not None:
        # A kernel's parameters have types that only Inductor's text knows: ``Any`` converts to a pointer to each.
        pointers = ", ".join(f"Any{{p[{view.slot}] + {view.start}}}" for view in call.args)
        return f"kernel_{call.kernel}({pointers});"
    if call.cpp is not None:
        return _brought(call)
    return _product(call) if call.operator in _PRODUCTS else None


def _brought(call: Call) -> str:
    """Return the call of an operator that has C++ of its own (``native_code``)."""
    views = [*call.args, *(view for _, view in call.results)]
    kind = _TYPES[views[0].dtype]
    pointers = ", ".join(f"({kind}*)(p[{view.slot}] + {view.start})" for view in views)
    sizes = ", ".join(f"{(*view.shape, 1)[0]}, {math.prod(view.shape[1:])}" for view in call.args)
    return f"{str(call.operator).split('.')[1]}<{kind}>({pointers}, {sizes});"


def _product(call: Call) -> str | None:
    """Return a matrix product, batched or not, with or without a matrix to add it to; None if torch has to do it.

    A batch is a loop in C++ over its matrices, so that the step stays one function.
    """
    adds = _PRODUCTS[str(call.operator)]
    given = [*call.args, call.kwargs["out"]]
    scales = [*call.args[adds + 2 :], *(v for k, v in call.kwargs.items() if k in ("alpha", "beta"))]
    if any(scale != 1 for scale in scales) or any(v.dtype not in _TYPES for v in given if isinstance(v, View)):
        return None
    left, right = (_Matrix.of(view) for view in call.args[adds : adds + 2])
    out = _Matrix.of(call.kwargs["out"])
    body = _small(left, right, out, bool(adds)) or _large(left, right, out, bool(adds))
    if body is None:
        return None
    if adds:  # the product adds to what lies in its result: first the summand is copied there
        start = _Matrix.of(call.args[0]).expanded(out)
        sizes = f"{out.kind}, {out.rows}, {out.columns}, {start.row}, {start.column}, {out.row}, {out.column}"
        body = f"copy_matrix<{sizes}>({start.first}, {out.first}); {body}"
    return body if out.batch == 1 else f"for (long b = 0; b < {out.batch}; ++b) {{ {body} }}"


@dataclass(frozen=True)
class _Matrix:
    """A matrix of a batch: first element (in C++), sizes, and strides in elements.

    ``step`` is the distance from one matrix of the batch to the next, 0 if all
    of the batch share one.
    """

    at: str
    kind: str
    rows: int
    columns: int
    row: int
    column: int
    batch: int
    step: int

    @classmethod
    def of(cls, view: View) -> _Matrix:
        """Read the last two dimensions of a view as a matrix, and the one before them as the batch."""
        shape = (1,) * (3 - len(view.shape)) + view.shape
        stride = (0,) * (3 - len(view.stride)) + view.stride
        kind = _TYPES[view.dtype]
        pointer = f"({kind}*)(p[{view.slot}] + {view.start})"
        step = stride[0] if shape[0] > 1 else 0
        return cls(pointer, kind, shape[1], shape[2], stride[1], stride[2], shape[0], step)

    @property
    def first(self) -> str:
        """First element of the matrix that the loop over the batch has reached."""
        return f"{self.at} + b * {self.step}" if self.step else self.at

    def turned(self) -> _Matrix:
        """Return the transpose, which is the same memory with its strides exchanged."""
        return replace(self, rows=self.columns, columns=self.rows, row=self.column, column=self.row)

    def expanded(self, like: _Matrix) -> _Matrix:
        """Return the matrix broadcast to the size of another: a stride of 0 repeats a row or a column."""
        return replace(
            self,
            rows=like.rows,
            columns=like.columns,
            row=self.row if self.rows == like.rows else 0,
            column=self.column if self.columns == like.columns else 0,
            step=self.step if self.batch == like.batch else 0,
        )

    def leading(self) -> tuple[str, int] | None:
        """Return BLAS's name for row-major (N) or column-major (T) and the distance of the lines; None for any other.

        BLAS refuses a distance that is shorter than a line, also where it is never used, as with a single line.
        """
        if self.column == 1 or self.columns == 1:
            distance = self.row if self.rows > 1 else self.columns
            return ("N", distance) if distance >= max(self.columns, 1) else None
        if self.row == 1 or self.rows == 1:
            distance = self.column
            return ("T", distance) if distance >= max(self.rows, 1) else None
        return None


def _small(left: _Matrix, right: _Matrix, out: _Matrix, add: bool) -> str | None:
    """Return a product with its sizes written out; None if BLAS is faster or the packed matrix would be too large."""
    if out.columns < 8 and out.rows > out.columns:  # vectors run along the columns: cᵀ = bᵀ aᵀ has more of them
        left, right, out = right.turned(), left.turned(), out.turned()
    inner = left.columns
    if out.rows * out.columns * inner > _SMALL or inner * max(out.columns, 16) > _PACKED:
        return None
    sizes = [out.rows, out.columns, inner, left.row, left.column, right.row, right.column, out.row, out.column]
    options = ", ".join([out.kind, str(add).lower(), *map(str, sizes)])
    return f"small_product<{options}>({left.first}, {right.first}, {out.first});"


def _large(left: _Matrix, right: _Matrix, out: _Matrix, add: bool) -> str | None:
    """Return a call of BLAS; None for a matrix whose strides BLAS cannot describe."""
    if out.column != 1 and out.columns > 1:
        left, right, out = right.turned(), left.turned(), out.turned()
    a, b, c = left.leading(), right.leading(), out.leading()
    if a is None or b is None or c is None or c[0] != "N":
        return None
    # BLAS stores matrices by columns, and so reads ours as their transposes: it computes cᵀ = bᵀ aᵀ.
    sizes = f"{out.columns}, {out.rows}, {left.columns}"
    factors = f"{right.first}, {b[1]}, {left.first}, {a[1]}"
    return f"blas('{b[0]}', '{a[0]}', {sizes}, {factors}, {int(add)}, {out.first}, {c[1]});"
