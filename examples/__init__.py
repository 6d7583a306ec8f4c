"""One script a tutorial; each runs on its own."""
