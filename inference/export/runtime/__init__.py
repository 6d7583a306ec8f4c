"""The predictor that users take with them: NumPy alone.

Imports NumPy, the standard library and itself, since ``export.npz`` joins these modules to the one file that is
exported. No two of them may define the same name. Start with ``predictor``.
"""
