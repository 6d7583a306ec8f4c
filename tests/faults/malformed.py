"""Arrays in every form that NumPy, pandas, torch and Python have for them, beside the plain numbers that they mean.

A form takes float64 numbers, whole ones from 0 to 3, so that every type can hold
them, and gives what is handed in. Those of ``MEANT`` mean the same numbers; those
of ``WRONG`` mean none, and are to be refused by name.
"""

import tempfile
import warnings
from decimal import Decimal

import numpy as np
import pandas as pd
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays


class Own(np.ndarray):
    """A subclass of arrays."""


class Reading:
    """An object that is no array, but can be read as one."""

    def __init__(self, numbers):
        self.numbers = numbers

    def __array__(self, dtype=None, copy=None):
        return np.array(self.numbers, dtype=dtype)


def frame(v, **options):
    return pd.DataFrame(v.reshape(len(v), -1), **options)


def same_shape(v, table):
    """The frame of a matrix, the series of a vector."""
    return table if v.ndim == 2 else table.iloc[:, 0]


def pandas_as(dtype):
    return lambda v: same_shape(v, frame(v).astype(dtype))


def numpy_as(dtype):
    return lambda v: v.astype(dtype)


def torch_as(dtype):
    return lambda v: torch.tensor(v).to(dtype)


def spread_out(v):
    wide = np.full((2 * len(v), *v.shape[1:]), np.nan)
    wide[::2] = v
    return wide[::2]


def from_file(v):
    with tempfile.TemporaryFile() as stream:
        stored = np.memmap(stream, dtype=np.float64, shape=v.shape, mode="w+")
        stored[:] = v
        return stored


def read_only(v):
    fixed = v.copy()
    fixed.setflags(write=False)
    return fixed


def without_gradients(v):
    with torch.inference_mode():
        return torch.tensor(v) * 1


FLOATS = ("f2", "f4", ">f2", ">f4", ">f8", "longdouble")
WHOLE = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i2", ">i4", ">i8", ">u4", ">u8")
TORCH = ("float16", "bfloat16", "float32", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64")
PANDAS = ("Int64", "UInt8", "Float32", "Float64", "category", "int64[pyarrow]", "double[pyarrow]", "float32", "int16")

MEANT = {
    **{f"numpy {dtype}": numpy_as(dtype) for dtype in (*FLOATS, *WHOLE)},
    **{f"torch {name}": torch_as(getattr(torch, name)) for name in TORCH},
    **{f"pandas {dtype}": pandas_as(dtype) for dtype in PANDAS},
    "Fortran": np.asfortranarray,
    "strides below 0": lambda v: v[::-1].copy()[::-1],
    "every second row": spread_out,
    "transposed": lambda v: v.T.copy().T,
    "memmap": from_file,
    "read-only": read_only,
    "subclass": lambda v: v.view(Own),
    "read as an array": Reading,
    "masked, nothing under it": lambda v: np.ma.masked_array(v, mask=np.zeros_like(v, bool)),
    "list": lambda v: v.tolist(),
    "list of arrays": list,
    "list of tensors": lambda v: list(torch.tensor(v)),
    "torch, needs gradients": lambda v: torch.tensor(v, requires_grad=True),
    "torch, result of a graph": lambda v: torch.tensor(v, requires_grad=True) * 1,
    "torch, parameter": lambda v: torch.nn.Parameter(torch.tensor(v)),
    "torch, inference mode": without_gradients,
    "torch, negated view": lambda v: torch.complex(torch.tensor(v), -torch.tensor(v)).conj().imag,
    "torch, other strides": lambda v: torch.tensor(v).T.contiguous().T if v.ndim > 1 else torch.tensor(v),
    "pandas, rows out of order": lambda v: same_shape(v, frame(v, index=[7, *range(len(v) - 1)])),
    "pandas, one label for all rows": lambda v: same_shape(v, frame(v, index=[0] * len(v))),
    "pandas, one name for all columns": lambda v: same_shape(v, frame(v).set_axis(["a"] * frame(v).shape[1], axis=1)),
    "pandas, sparse": pandas_as(pd.SparseDtype("float64", 0.0)),
    "pandas, mixed": lambda v: same_shape(v, frame(v).astype({0: "Int64"})),
}


def holed(value):
    def form(v):
        changed = v.copy()
        changed.reshape(-1)[-1] = value
        return changed

    return form


def masked(v):
    return np.ma.masked_array(v, mask=holed(1)(np.zeros_like(v)).astype(bool))


def quietly(make):
    """Without torch's own warnings that what is made is new, or old."""

    def form(v):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(torch.tensor(v))

    return form


WRONG = {
    **{f"numpy {dtype}": numpy_as(dtype) for dtype in ("S3", "U3", "c8", "clongdouble", "M8[s]", "m8[s]", "O", "V8")},
    **{f"holds {value}": holed(value) for value in (np.nan, np.inf, -np.inf, 1e300, -1e39)},
    "too large for float64": lambda v: holed(1)(v).astype(np.longdouble) * np.longdouble("1e400"),
    "too large for int64": lambda v: v.astype(np.uint64) + np.uint64(2**63),
    "torch, too large for int64": lambda v: torch.tensor(v.astype(np.uint64) + np.uint64(2**63)),
    "torch, NaN": lambda v: torch.tensor(holed(np.nan)(v)),
    "torch, complex": lambda v: torch.tensor(v) + 0j,
    "torch, meta": lambda v: torch.tensor(v, device="meta"),
    "torch, sparse": lambda v: torch.tensor(v).to_sparse(),
    "torch, sparse rows": quietly(lambda t: t.reshape(len(t), -1).to_sparse_csr()),
    "torch, nested": quietly(lambda t: torch.nested.nested_tensor([t, t])),
    "torch, quantised": quietly(lambda t: torch.quantize_per_tensor(t.float(), 1.0, 0, torch.quint8)),
    "strings of numbers": lambda v: v.astype(str),
    "variable strings": lambda v: v.astype(str).astype(np.dtypes.StringDType()),
    "structured": lambda v: np.zeros(len(v), [("a", float), ("b", int)]),
    "masked": masked,
    "objects": lambda v: np.full(v.shape, None),
    "decimals": lambda v: np.full(v.shape, Decimal(1)),
    "empty": lambda v: v[:0],
    "no columns": lambda v: v.reshape(len(v), -1)[:, :0],
    "nested list with a word": lambda v: [*v.tolist()[:-1], "word"],
    "nested list with a gap": lambda v: [*v.tolist()[:-1], None],
    "ragged list": lambda v: [*v.tolist(), [1.0] * 9],
    "list of meta tensors": lambda v: list(torch.tensor(v, device="meta")),
    "empty list": lambda v: [],
    "tuple": lambda v: tuple(v.tolist()),
    "dictionary": lambda v: dict(enumerate(v.tolist())),
    "generator": iter,
    "word": lambda v: "numbers",
    "bytes": lambda v: v.tobytes(),
    "number": lambda v: 1.0,
    "array of one number": lambda v: np.array(1.0),
    "three dimensions": lambda v: v.reshape(len(v), -1, 1, 1),
    "a row too many": lambda v: np.concatenate([v, v[:1]]),
    "pandas, text": lambda v: frame(v).assign(word="a"),
    "pandas, text of numbers": lambda v: same_shape(v, frame(v).astype(str)),
    "pandas, categories of text": lambda v: same_shape(v, frame(v).astype(str).astype("category")),
    "pandas, dates": lambda v: frame(v).assign(day=pd.Timestamp("2020-01-01")),
    "pandas, NA": lambda v: same_shape(v, frame(v).astype("Int64").mask(frame(v) == v.reshape(-1)[0])),
    "pandas, Boolean NA": lambda v: same_shape(v, (frame(v) > 9).astype("boolean").mask(frame(v) == v.reshape(-1)[0])),
    "pandas, no rows": lambda v: frame(v)[:0],
    "pandas, complex": lambda v: same_shape(v, frame(v) + 0j),
}


def numbers(shape):
    return arrays.arrays(np.float64, shape, elements=st.integers(0, 3).map(float))


MATRICES = st.tuples(st.integers(1, 6), st.integers(1, 3)).flatmap(numbers)

ODD = st.one_of(
    st.integers(-4, 4),
    st.sampled_from([2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, -(10**30)]),
    st.floats(),
    st.text(max_size=6),
    st.binary(max_size=4),
    st.booleans(),
    st.none(),
    st.complex_numbers(),
    st.decimals(),
    st.fractions(),
    st.lists(st.integers(-2, 2), min_size=1, max_size=3),
    st.tuples(st.integers(-2, 2), st.floats()),
    st.sets(st.integers(0, 2), min_size=1),
    st.dictionaries(st.integers(0, 2), st.integers(), min_size=1),
    st.dates(),
    st.integers(-4, 4).map(np.int64),
    st.integers(0, 4).map(np.uint8),
    st.floats(width=32).map(np.float32),
    st.booleans().map(np.bool_),
    st.text(max_size=4).map(np.str_),
    st.floats().map(np.array),
    arrays.arrays(np.float64, st.integers(1, 3)),
    st.floats(width=32).map(torch.tensor),
    st.integers(1, 3).map(torch.ones),
    st.sampled_from([object(), len, int, Ellipsis, pd.NA, pd.NaT, torch.int32, torch.device("meta"), range(3)]),
)
