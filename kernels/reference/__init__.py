"""Plain torch in float32 or float64: the definition of truth for every operation."""
