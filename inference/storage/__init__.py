"""Files that survive a kill and are checked when they are read.

Uses ``utils`` and ``model``; does not decide when something is saved. Start with ``atomic_files``, on which
``json_document`` (with the schemas of its fields) and ``tensor_archive`` are built.
"""
