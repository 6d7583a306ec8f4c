"""A recorded model run with NumPy: a list of operators read from JSON, checked, and called one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inference.export.runtime.operators import OPERATORS, RANDOM

__all__ = ["Array", "Graph", "Random", "dtype_named", "size_of"]

Array = Any
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
