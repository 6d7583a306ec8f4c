"""A lowered step as one shared library: kernels, matrix products and the loop over steps in C++."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from inference.lowering import PREFIX, Call, Lowered, View

__all__ = ["source"]

_TYPES = {torch.float32: "float", torch.float64: "double"}
_SMALL = 2**17  # multiplications up to which BLAS, called, is not quicker
_PACKED = 2**15  # numbers that a product copies at most
_PRODUCTS = {"aten.mm.out": 0, "aten.addmm.out": 1, "aten.bmm.out": 0, "aten.baddbmm.out": 1}

_PRELUDE = r"""
#include <cstring>
extern "C" void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                       const int*, const float*, const int*, const float*, float*, const int*);
extern "C" void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*, const double*,
                       const int*, const double*, const int*, const double*, double*, const int*);
static inline void blas(char ta, char tb, int m, int n, int k, const float* a, int lda, const float* b, int ldb,
                        float beta, float* c, int ldc) {
    const float one = 1;
    sgemm_(&ta, &tb, &m, &n, &k, &one, a, &lda, b, &ldb, &beta, c, &ldc);
}
static inline void blas(char ta, char tb, int m, int n, int k, const double* a, int lda, const double* b, int ldb,
                        double beta, double* c, int ldc) {
    const double one = 1;
    dgemm_(&ta, &tb, &m, &n, &k, &one, a, &lda, b, &ldb, &beta, c, &ldc);
}
// tanh x = x p(x²) / q(x²) up to 9.02, beyond which it is 1: p and q of least relative error, 2.1e-8, rounding aside.
template <typename V> static inline V tanh_of(const V& x) { return x.tanh(); }
static inline at::vec::Vectorized<float> tanh_of(const at::vec::Vectorized<float>& x) {
    using V = at::vec::Vectorized<float>;
    const V z = at::vec::clamp(x, V(-9.02f), V(9.02f)), t = z * z;
    V p(1.331907166e-8f), q(7.762019095e-7f);
    for (float c : {2.058348022e-5f, 3.494034450e-3f, 1.337971783e-1f, 1.0f}) p = at::vec::fmadd(p, t, V(c));
    for (float c : {3.283092694e-4f, 2.587107272e-2f, 4.671303307e-1f, 1.0f}) q = at::vec::fmadd(q, t, V(c));
    return at::vec::clamp(z * p / q, V(-1.0f), V(1.0f));
}
struct Any {
    char* at;
    template <typename T> operator T*() const { return reinterpret_cast<T*>(at); }
};
template <typename T, int M, int N, int SR, int SC, int R, int C>
static inline void copy_matrix(const T* from, T* to) {
    for (int m = 0; m < M; ++m) {
        if constexpr (SC == 1 && C == 1) std::memmove(to + m * R, from + m * SR, N * sizeof(T));
        else for (int n = 0; n < N; ++n) to[m * R + n * C] = from[m * SR + n * SC];
    }
}
// c (+)= a b for ROWS rows and COLS vectors of columns, whose sums stay in registers; of the last vector LAST columns.
template <typename T, bool ADD, bool WHOLE, int ROWS, int COLS, int LAST, int K, int AR, int AC, int BR, int CR, int CC>
static inline void tile_of_product(const T* a, const T* b, T* c) {
    using V = at::vec::Vectorized<T>;
    constexpr int W = V::size();
    V sum[ROWS][COLS], right[COLS];
    T line[W];
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < COLS; ++j) {
            const int here = j == COLS - 1 ? LAST : W;
            T* to = c + r * CR + j * W * CC;
            if constexpr (!ADD) sum[r][j] = V(0);
            else if constexpr (CC == 1) sum[r][j] = here == W ? V::loadu(to) : V::loadu(to, here);
            else {
                for (int i = 0; i < W; ++i) line[i] = i < here ? to[i * CC] : T(0);
                sum[r][j] = V::loadu(line);
            }
        }
    for (int k = 0; k < K; ++k) {
        for (int j = 0; j < COLS; ++j) {
            const T* from = b + k * BR + j * W;
            right[j] = WHOLE || j < COLS - 1 || LAST == W ? V::loadu(from) : V::loadu(from, LAST);
        }
        for (int r = 0; r < ROWS; ++r) {
            const V left(a[r * AR + k * AC]);
            for (int j = 0; j < COLS; ++j) sum[r][j] = at::vec::fmadd(left, right[j], sum[r][j]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < COLS; ++j) {
            const int here = j == COLS - 1 ? LAST : W;
            T* to = c + r * CR + j * W * CC;
            if constexpr (CC == 1) here == W ? sum[r][j].store(to) : sum[r][j].store(to, here);
            else {
                sum[r][j].store(line);
                for (int i = 0; i < here; ++i) to[i * CC] = line[i];
            }
        }
}
template <typename T, bool ADD, bool WHOLE, int COLS, int LAST, int M, int K, int AR, int AC, int BR, int CR, int CC>
static inline void columns_of_product(const T* a, const T* b, T* c) {
    int m = 0;
    for (; m + 4 <= M; m += 4)
        tile_of_product<T, ADD, WHOLE, 4, COLS, LAST, K, AR, AC, BR, CR, CC>(a + m * AR, b, c + m * CR);
    for (; m < M; ++m)
        tile_of_product<T, ADD, WHOLE, 1, COLS, LAST, K, AR, AC, BR, CR, CC>(a + m * AR, b, c + m * CR);
}
// The same where the columns of b and the rows of a are contiguous, and rows are few: vectors run along k.
template <typename T, bool ADD, int M, int N, int K, int AR, int BC, int CR, int CC>
static inline void dots(const T* a, const T* b, T* c) {
    using V = at::vec::Vectorized<T>;
    constexpr int W = V::size();
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) {
            const T *left = a + m * AR, *right = b + n * BC;
            V sum(0), other(0);
            int k = 0;
            for (; k + 2 * W <= K; k += 2 * W) {
                sum = at::vec::fmadd(V::loadu(left + k), V::loadu(right + k), sum);
                other = at::vec::fmadd(V::loadu(left + k + W), V::loadu(right + k + W), other);
            }
            for (; k + W <= K; k += W) sum = at::vec::fmadd(V::loadu(left + k), V::loadu(right + k), sum);
            T total = at::vec::vec_reduce_all<T>([](V& x, V& y) { return x + y; }, sum + other);
            for (; k < K; ++k) total += left[k] * right[k];
            T* to = c + m * CR + n * CC;
            *to = ADD ? *to + total : total;
        }
}
// c (M, N) (+)= a (M, K) b (K, N), strides in elements.
template <typename T, bool ADD, int M, int N, int K, int AR, int AC, int BR, int BC, int CR, int CC>
static inline void small_product(const T* a, const T* b, T* c) {
    constexpr int W = at::vec::Vectorized<T>::size();
    constexpr int BLOCKS = (N + W - 1) / W, LAST = N - (BLOCKS - 1) * W;
    if constexpr (M < 4 && BR == 1 && BC != 1 && AC == 1) return dots<T, ADD, M, N, K, AR, BC, CR, CC>(a, b, c);
    constexpr bool PACK = BC != 1 || (LAST != W && M >= 4);
    constexpr int ROW = PACK ? BLOCKS * W : BR;
    T packed[PACK ? K * BLOCKS * W : 1];
    if constexpr (PACK) {
        for (int k = 0; k < K; ++k) {
            T* to = packed + k * ROW;
            for (int n = 0; n < N; ++n) to[n] = b[k * BR + n * BC];
            for (int n = N; n < ROW; ++n) to[n] = T(0);
        }
        b = packed;
    }
    constexpr int TILES = (BLOCKS - 1) / 3;
    for (int i = 0; i < TILES; ++i)
        columns_of_product<T, ADD, PACK, 3, W, M, K, AR, AC, ROW, CR, CC>(a, b + i * 3 * W, c + i * 3 * W * CC);
    columns_of_product<T, ADD, PACK, BLOCKS - 3 * TILES, LAST, M, K, AR, AC, ROW, CR, CC>(
        a, b + TILES * 3 * W, c + TILES * 3 * W * CC);
}
"""


def source(lowered: Lowered, rows: Sequence[tuple[int, int]]) -> tuple[str, list[int | Call]]:
    """The C++ of a step, and its parts in order: the number of a compiled part, or a call that only torch can make.

    ``rows`` are the inputs that advance by one row a step: (slot, bytes of a row).
    Where all of it compiles there is one part, and ``run`` loops over it; the
    functions take a table of pointers, one a slot.
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
    kernels = [_kernel(i, text) for i, text in enumerate(lowered.kernels)]
    brought = list(dict.fromkeys(call.cpp for call in lowered.calls if call.cpp))
    functions = [f'extern "C" void part_{i}(char** p) {{\n{_join(body)}\n}}' for i, body in enumerate(bodies)]
    return "\n".join(
        [f"#include <{PREFIX}>", _PRELUDE, *brought, *kernels, *functions, _loop(lowered, rows, parts)]
    ), parts


def _kernel(number: int, text: str) -> str:
    """A kernel of Inductor's under a name of its own, with the faster tanh."""
    named = re.sub(r'extern "C"\s+void\s+kernel\b', f"static inline void kernel_{number}", text)
    return re.sub(r"\b(\w+)\.tanh\(\)", r"tanh_of(\1)", named)


def _join(lines: Sequence[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


def _loop(lowered: Lowered, rows: Sequence[tuple[int, int]], parts: Sequence[int | Call]) -> str:
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
    if call.kernel is not None:
        pointers = ", ".join(f"Any{{p[{view.slot}] + {view.start}}}" for view in call.args)
        return f"kernel_{call.kernel}({pointers});"
    if call.cpp is not None:
        return _brought(call)
    return _product(call) if call.operator in _PRODUCTS else None


def _brought(call: Call) -> str:
    views = [*call.args, *(view for _, view in call.results)]
    kind = _TYPES[views[0].dtype]
    pointers = ", ".join(f"({kind}*)(p[{view.slot}] + {view.start})" for view in views)
    sizes = ", ".join(f"{view.shape[0]}, {math.prod(view.shape[1:])}" for view in call.args)
    return f"{str(call.operator).split('.')[1]}<{kind}>({pointers}, {sizes});"


def _product(call: Call) -> str | None:
    """A matrix product, batched or not, with or without a matrix to add it to; None where torch has to do it."""
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
    lines = [_copy(_Matrix.of(call.args[0]).expanded(out), out), body] if adds else [body]
    return _repeated(" ".join(lines), out.batch)


@dataclass(frozen=True)
class _Matrix:
    """A matrix of a batch: first element (in C++), sizes and strides in elements."""

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
        """The last two dimensions of a view, and the batch before them."""
        shape = (1,) * (3 - len(view.shape)) + view.shape
        stride = (0,) * (3 - len(view.stride)) + view.stride
        kind = _TYPES[view.dtype]
        pointer = f"({kind}*)(p[{view.slot}] + {view.start})"
        step = stride[0] if shape[0] > 1 else 0
        return cls(pointer, kind, shape[1], shape[2], stride[1], stride[2], shape[0], step)

    @property
    def first(self) -> str:
        """The first element of the matrix that the batch's loop is at."""
        return f"{self.at} + b * {self.step}" if self.step else self.at

    def turned(self) -> _Matrix:
        """The transpose."""
        return replace(self, rows=self.columns, columns=self.rows, row=self.column, column=self.row)

    def expanded(self, like: _Matrix) -> _Matrix:
        """Broadcast to the size of another."""
        return replace(
            self,
            rows=like.rows,
            columns=like.columns,
            row=self.row if self.rows == like.rows else 0,
            column=self.column if self.columns == like.columns else 0,
            step=self.step if self.batch == like.batch else 0,
        )

    def leading(self) -> tuple[str, int] | None:
        """BLAS's name for row-major (N) or column-major (T) and the distance of its lines; None for any other."""
        if self.column == 1 or self.columns == 1:
            distance = self.row if self.rows > 1 else self.columns
            return ("N", distance) if distance >= max(self.columns, 1) else None
        if self.row == 1 or self.rows == 1:
            distance = self.column
            return ("T", distance) if distance >= max(self.rows, 1) else None
        return None


def _repeated(body: str, batch: int) -> str:
    return body if batch == 1 else f"for (long b = 0; b < {batch}; ++b) {{ {body} }}"


def _copy(start: _Matrix, out: _Matrix) -> str:
    sizes = f"{out.kind}, {out.rows}, {out.columns}, {start.row}, {start.column}, {out.row}, {out.column}"
    return f"copy_matrix<{sizes}>({start.first}, {out.first});"


def _small(left: _Matrix, right: _Matrix, out: _Matrix, add: bool) -> str | None:
    if out.columns < 8 and out.rows > out.columns:  # vectors run along the columns
        left, right, out = right.turned(), left.turned(), out.turned()
    inner = left.columns
    if out.rows * out.columns * inner > _SMALL or inner * max(out.columns, 16) > _PACKED:
        return None
    sizes = [out.rows, out.columns, inner, left.row, left.column, right.row, right.column, out.row, out.column]
    options = ", ".join([out.kind, str(add).lower(), *map(str, sizes)])
    return f"small_product<{options}>({left.first}, {right.first}, {out.first});"


def _large(left: _Matrix, right: _Matrix, out: _Matrix, add: bool) -> str | None:
    if out.column != 1 and out.columns > 1:
        left, right, out = right.turned(), left.turned(), out.turned()
    a, b, c = left.leading(), right.leading(), out.leading()
    if a is None or b is None or c is None or c[0] != "N":
        return None
    # BLAS counts columns first: it is given cᵀ = bᵀ aᵀ.
    sizes = f"{out.columns}, {out.rows}, {left.columns}"
    factors = f"{right.first}, {b[1]}, {left.first}, {a[1]}"
    return f"blas('{b[0]}', '{a[0]}', {sizes}, {factors}, {int(add)}, {out.first}, {c[1]});"
