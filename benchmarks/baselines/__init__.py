"""The problems of the benchmarks in other frameworks: JAX and plain torch."""
