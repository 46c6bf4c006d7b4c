"""The face of the kernels: every operation says what it means and has a reference and a CPU twin of one signature."""

import inspect

import pytest

from penstock.kernels import dispatch, latent_attention, ops

SHARED = {"route_experts"}  # the CPU runs the reference's own
FACES = (ops.__name__, latent_attention.__name__)
OPS = {name: f for name, f in inspect.getmembers(ops, inspect.isfunction) if f.__module__ in FACES}


def test_operations_are_found():
    assert {"paged_attention", "latent_attention", "rms_norm", "rotary", "gumbel", "copy_blocks"} <= set(OPS)


@pytest.mark.parametrize("name", OPS)
def test_docstring_and_twins(name):
    doc = inspect.getdoc(OPS[name])
    assert "Semantics:" in doc
    assert "Shapes:" in doc
    for backend in (dispatch.REFERENCE, dispatch.CPU):
        twin = getattr(backend, name)
        assert twin.__name__ == name
        homes = [f"kernels.{backend.name}.", "kernels.composed", *(["kernels.reference."] if name in SHARED else [])]
        assert any(home in twin.__module__ for home in homes)
        assert list(inspect.signature(twin).parameters) == list(inspect.signature(OPS[name]).parameters)
