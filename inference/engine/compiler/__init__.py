"""A graph becomes machine code or a CUDA graph, and is cached on disk.

Uses ``storage`` and ``engine.tracing``; knows nothing of models. Start with ``cache`` (a program by its key), then
``inductor`` (kernels by torch's private entry points, the only module that names them), ``cpp_codegen`` (the loop
around the kernels, with the C++ in ``cpp/``), ``cpp_build``, and ``executable`` (what runs a program).
"""
