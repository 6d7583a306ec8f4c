"""``fit`` and ``fit_many``: options, restarts, the training loop, resuming.

Uses everything below it; knows no command line. Start with ``fitting`` (the function ``fit``), then ``options``,
``restarts`` and ``training_loop``.
"""
