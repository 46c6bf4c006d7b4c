"""Fast CPU versions of the operations."""
