"""Which implementation is picked, and how to be told otherwise."""

import logging

import pytest
import torch

from penstock.kernels import dispatch


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("PENSTOCK_KERNELS", raising=False)
    dispatch.choose.cache_clear()
    yield
    dispatch.choose.cache_clear()


def test_usual_dtypes_are_fast_and_float64_is_the_reference(caplog):
    with caplog.at_level(logging.INFO):
        assert dispatch.backend_for(torch.zeros(1)) is dispatch.NATIVE
        assert dispatch.backend_for(torch.zeros(1, dtype=torch.float16)) is dispatch.CPU
        assert dispatch.backend_for(torch.zeros(1, dtype=torch.float64)) is dispatch.REFERENCE
        dispatch.backend_for(torch.zeros(1))
    assert [r.getMessage() for r in caplog.records if r.name == dispatch.__name__] == [
        "kernels for cpu torch.float32: native",
        "kernels for cpu torch.float16: cpu",
        "kernels for cpu torch.float64: reference",
    ]


def test_the_environment_overrides(monkeypatch):
    monkeypatch.setenv("PENSTOCK_KERNELS", "reference")
    assert dispatch.backend_for(torch.zeros(1)) is dispatch.REFERENCE


def test_an_unknown_name_is_refused(monkeypatch):
    monkeypatch.setenv("PENSTOCK_KERNELS", "fastest")
    with pytest.raises(ValueError, match="'fastest': expected one of auto, reference, cpu, native, gpu"):
        dispatch.backend_for(torch.zeros(1))
