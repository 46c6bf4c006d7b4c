"""Norm, rotation and storing in Triton against the same composed of reference operations in float64."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from penstock.kernels import dispatch
from penstock.kernels.errors import KernelInputError
from penstock.kernels.gpu import attention, rotate_and_store
from penstock.kernels.ragged import RaggedBatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("dim", "turned"), [(16, 16), (48, 48), (64, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_reference(norm, dim, turned, dtype):
    torch.manual_seed(dim)
    heads, kv_heads, slots = 5, 2, 4
    batch = RaggedBatch(np.array([0, 5], np.int32), np.array([0, 3, 4], np.int32), np.array([[2, 0], [1, 3]], np.int32))
    storage = torch.zeros(4, 2, 2, kv_heads, slots, dim, dtype=dtype, device=DEVICE)
    qkv = torch.randn(4, heads + 2 * kv_heads, dim, device=DEVICE).to(dtype)
    weight = torch.randn(heads + kv_heads, dim, device=DEVICE) if norm else None
    angles = torch.randn(4, turned // 2, device=DEVICE)
    exact_kv = storage.double().cpu()
    exact = dispatch.REFERENCE.rotate_and_store(
        qkv.double().cpu(),
        None if weight is None else weight.double().cpu(),
        1e-6,
        angles.cos().double().cpu(),
        angles.sin().double().cpu(),
        exact_kv,
        1,
        dispatch.REFERENCE.plan_attention(exact_kv, batch),
    )
    plan = attention.plan_attention(storage, batch)
    found = rotate_and_store.rotate_and_store(qkv, weight, 1e-6, angles.cos(), angles.sin(), storage, 1, plan)
    rounding = 1e-5 if dtype is torch.float32 else 2**-8
    assert found.shape == (4, heads, dim)
    for ours, truth in ((found.double().cpu(), exact), (storage.double().cpu(), exact_kv)):
        assert ((ours - truth).abs() <= truth.abs() * (rounding + 1e-6) + 1e-5).all()
    assert not storage[:, 0].any()


def test_wrong_arguments_are_named():
    storage = torch.zeros(2, 1, 2, 1, 4, 16)
    plan = attention.plan_attention(
        storage, RaggedBatch(np.zeros(1, np.int32), np.array([0, 1], np.int32), np.zeros((1, 1), np.int32))
    )
    table = torch.zeros(1, 8)
    for argument, qkv, weight, cos in (
        ("qkv_TAD", torch.zeros(1, 5, 8), None, table),
        ("qkv_TAD", torch.zeros(1, 2, 16), None, table),
        ("head_norms", torch.zeros(1, 5, 16), torch.zeros(5, 16), table),
        ("cos", torch.zeros(1, 5, 16), None, torch.zeros(2, 8)),
        ("cos", torch.zeros(1, 5, 16), None, torch.zeros(1, 9)),
    ):
        with pytest.raises(KernelInputError) as refusal:
            rotate_and_store.rotate_and_store(qkv, weight, 1e-6, cos, torch.zeros(1, cos.shape[1]), storage, 0, plan)
        assert refusal.value.argument == argument
