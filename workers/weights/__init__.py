"""Weights from one running worker to another that starts: what a source serves, and how a taker reads it."""
