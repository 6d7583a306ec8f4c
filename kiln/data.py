"""Data sets, and readers of tables."""

from ppl_models.data.datasets import (
    concrete,
    cosine,
    diabetes,
    digits,
    energy,
    fashion_mnist,
    mnist,
    mnist_bits,
    uci,
    yacht,
)
from ppl_models.data.tables import Table, read_csv, read_npz, read_parquet

__all__ = [
    "Table",
    "concrete",
    "cosine",
    "diabetes",
    "digits",
    "energy",
    "fashion_mnist",
    "mnist",
    "mnist_bits",
    "read_csv",
    "read_npz",
    "read_parquet",
    "uci",
    "yacht",
]
