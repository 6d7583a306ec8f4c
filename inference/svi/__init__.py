"""``fit`` and ``fit_many``: options, restarts, the training loop, resuming.

Uses everything below it; knows no command line. Start with ``fitting`` (the function ``fit``) and ``options``, then
``restarts`` (plans, and the best of them), ``restart_runner`` (one of them, with the loop over its steps) and
``state``, which checkpoints keep.
"""
