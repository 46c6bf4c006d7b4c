"""Tool calls in a model's text: how each family writes them, how they are read back, how a grammar enforces them."""
