"""A graph becomes machine code or a CUDA graph, and is cached on disk.

Uses ``storage`` and ``engine.tracing``; knows nothing of models. Start with ``cache`` (a program by its key), then
``inductor`` (kernels by torch's private entry points, the only module that names them), ``cpp_codegen`` (the loop
around the kernels, with the C++ in ``cpp/``), ``cpp_build``, and ``executable`` (what runs a program).

Torch's own ways to compile, ``torch.compile`` and AOTInductor, make one step callable, and return to Python, or to
the caller's C++, after each. For a small model this return takes longer than the kernels: one step of Edward's
network of 141 latents takes 303 µs with ``torch.compile`` and 4.4 µs here, and 35 µs with the steps in Inductor's own
``while_loop`` (one thread; ``benchmarks/README.md``). What they lack is the loop over steps, which reads the next row
of random numbers and keeps each loss. So Inductor's kernels are used as they are, and only the text around them is
ours. AOTInductor has not been measured.
"""
