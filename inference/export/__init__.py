"""A fitted approximation in other formats: NumPy, ONNX, ArviZ.

Uses ``engine.tracing``, ``predictive`` and ``export.runtime``; draws no figures. Start with ``npz``, which goes through
``predictive_function`` and ``graph_recording``, and compares the result with torch.
"""
