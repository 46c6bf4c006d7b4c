"""Trains the embedded model: a small decoder that answers the first request of a new user.

Run it from the repository root as `python -m deploy.train_model --out DIR`. Every word it learns from is generated
here, from a seed; nothing is downloaded, and nothing here is imported by the serving code.
"""
