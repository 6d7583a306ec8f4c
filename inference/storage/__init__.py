"""Files that survive a kill and are checked when they are read.

Uses ``utils`` and ``model``; does not decide when something is saved. Start with ``atomic_files``, on which
``json_document`` and ``tensor_archive`` are built; ``schema`` lists what each field of a document must be.
"""
