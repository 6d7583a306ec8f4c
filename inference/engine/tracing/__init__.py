"""One run of Python becomes a graph of torch operators.

Uses torch alone; knows nothing of SVI and compiles nothing. Start with ``tracer``, which records the operators below
autograd, and ``random_ops``, which takes the random draws out of the graph.
"""
