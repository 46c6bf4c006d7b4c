"""Model directories, weights, and the decoder families."""
