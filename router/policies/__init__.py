"""Placement policies: one class with one method per file, chosen by name (table in `placement.py`)."""
