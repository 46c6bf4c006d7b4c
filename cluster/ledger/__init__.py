"""What became of every request, written down a second time and judged."""
