"""The predictor that users take with them: NumPy alone.

Imports NumPy, the standard library and itself, since ``export.npz`` joins these modules to the one file that is
exported. No two of them may define the same name. Start with ``predictor``.

``torch.export`` with onnxruntime is the usual way, and ``export.onnx`` offers it. It does not serve here, as the reader
of a predictor is promised NumPy alone, and as ONNX has no operators for most random draws: a model with noise of its
own, or with latents of each row, could answer with its mean alone.
"""
