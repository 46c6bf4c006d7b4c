"""Rows of sampling parameters for tests of `sample_tokens`, drawn over and beyond what users send."""

import torch
from hypothesis import strategies as st

DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "choice": 0, "position": 0}
DTYPES = {"temperature": torch.float32, "top_p": torch.float64, "min_p": torch.float32}
ROW = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-5, 0.2, 0.7, 1.0, 1.7]),
        "top_k": st.sampled_from([0, 1, 2, 7, 40, 10**6]),
        "top_p": st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.01, 0.0]),
        "min_p": st.sampled_from([0.0, 0.01, 0.2, 1.0]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "choice": st.integers(0, 7),
        "position": st.integers(0, 2**32 - 1),
    }
)


def columns(rows):
    """The parameters of `sample_tokens` from one dictionary a row."""
    return [
        torch.tensor([{**DEFAULTS, **row}[key] for row in rows], dtype=DTYPES.get(key, torch.int64)) for key in DEFAULTS
    ]
