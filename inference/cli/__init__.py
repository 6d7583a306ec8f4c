"""Command line: flags become calls of the public functions.

May use everything; only ``kiln.__main__`` uses it. Start with ``commands``; ``registry`` finds models, guides, data and
readers by entry points, and ``runs`` is the folder that ``kiln fit`` writes, with its reports.
"""
