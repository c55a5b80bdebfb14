"""Other programs that measure our checkpoints; none of them is imported here, and each runs in an environment of its own."""
