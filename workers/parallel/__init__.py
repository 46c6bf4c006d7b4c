"""Ranks of one worker: what they compute together, how they hear of a step, and how they notice each other's end."""
