"""Ray's Serve is imported here once: it warns about itself, and the library imports it late."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve.schema  # noqa: F401
