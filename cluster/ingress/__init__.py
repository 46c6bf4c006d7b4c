"""The OpenAI-compatible HTTP application that Ray Serve hosts."""
