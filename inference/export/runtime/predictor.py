"""A fitted model that predicts with NumPy alone: beside ``predictor.npz``, ``import predictor; predictor.load()``."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from inference.export.runtime.graph import Array, Graph, Random, dtype_named, size_of

__all__ = [
    "LATENT",
    "MANIFEST",
    "SCHEMA",
    "ClassPrediction",
    "Interval",
    "Prediction",
    "Predictor",
    "load",
    "over_draws",
]

SCHEMA = 1
MANIFEST = "manifest"
LATENT = "latent."
_NUMBERS = 2**24  # in the largest array of a run, which bounds the memory
_BYTES, _PACKED = 2**28, 20  # a file unpacks to at most so many, or so many times its own size
_DAMAGED = (
    *(ValueError, KeyError, AttributeError, TypeError, EOFError, OSError, RuntimeError, NotImplementedError),
    *(MemoryError, struct.error, zipfile.BadZipFile, zlib.error),
)


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


class Predictor:
    """E[y | x, zₛ] for S draws z of a fitted posterior, without torch; made by :func:`load`.

    ``latents`` are the draws, ``{site: (S, *site shape)}``, ``manifest`` what the file says of itself.
    """

    def __init__(self, manifest: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        try:
            self._read(manifest, arrays)
            one = [np.ones([1 if size is None else size for size in shape], kind) for _, shape, kind in self._inputs]
            self.run(one, 1, [0, 0], self._outputs)
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
            found = []
            for begin in range(0, rows, size):
                end = min(begin + size, rows)
                pairs = zip(inputs, self._inputs, strict=True)
                cut = [value[begin:end] if shape else value for value, (_, shape, _) in pairs]
                found.append(self.run(cut, end - begin, [seed, begin], wanted))
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
