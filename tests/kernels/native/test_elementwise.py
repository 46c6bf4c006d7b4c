"""C++ norms, gates and the way into the KV blocks against the reference."""

import pytest
import torch
from fakes.paged_case import PagedCase
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.kernels.dispatch import REFERENCE
from penstock.kernels.errors import KernelInputError
from penstock.kernels.native import attention
from penstock.kernels.native import elementwise as native
from penstock.kernels.ragged import AttentionPlan

UNITS = {torch.float32: 8e-6, torch.bfloat16: 2**-7}


def close(ours, truth, dtype):
    torch.testing.assert_close(ours.double(), truth.double(), atol=UNITS[dtype] / 8, rtol=UNITS[dtype])


@given(st.integers(0, 20), st.integers(1, 130), st.sampled_from(list(UNITS)), st.booleans(), st.integers(0, 99))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_norms(level, rows, size, dtype, wide, seed):
    torch.manual_seed(seed)
    x, residual, weight = torch.randn(rows, size).to(dtype), torch.randn(rows, size).to(dtype), torch.randn(size)
    weight = weight if wide else weight.to(dtype)
    close(native.rms_norm(x, weight, 1e-6), REFERENCE.rms_norm(x, weight, 1e-6), dtype)
    ours, theirs = native.add_rms_norm(x, residual, weight, 1e-6), REFERENCE.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(ours[1], theirs[1])
    close(ours[0], theirs[0], dtype)


@pytest.mark.parametrize("dtype", UNITS)
def test_gates_over_the_whole_range(level, dtype):
    gate = torch.cat((torch.linspace(-120, 120, 4001), torch.linspace(-1, 1, 999), torch.tensor([torch.inf, -1e30])))
    x = torch.cat((gate, torch.ones_like(gate)))[None].to(dtype)
    for name in ("silu_and_mul", "gelu_and_mul"):
        ours, truth = getattr(native, name)(x), getattr(REFERENCE, name)(x.double())
        kept = torch.isfinite(truth)
        # 1 + tanh cancels for large negative numbers, in float32 by up to four units of 1
        torch.testing.assert_close(ours[kept].double(), truth[kept], atol=1e-6, rtol=UNITS[dtype])
        assert torch.equal(torch.isfinite(ours.double()), kept) or name == "silu_and_mul"
    assert torch.isnan(native.silu_and_mul(torch.tensor([[torch.nan, 1.0]]).to(dtype))).all()


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("dim", [16, 48, 64, 80])
@pytest.mark.parametrize("normed", [False, True])
def test_rotate_and_store(level, dtype, dim, normed):
    torch.manual_seed(0)
    case = PagedCase([(0, 5), (7, 1), (20, 12), (3, 400)], heads=2, group=3, dim=dim, dtype=dtype)
    tokens = case.batch.num_tokens
    qkv = torch.randn(tokens, 10, dim).to(dtype)
    qkv[0, 9, 3], qkv[1, 8, 3], qkv[2, 9, 0] = torch.nan, torch.inf, -torch.inf
    cos, sin = torch.randn(2, tokens, dim // 2)
    norms = torch.randn(8, dim) if normed else None
    ours, theirs, kv, truth = qkv.clone(), qkv.clone(), case.kv.clone(), case.kv.clone()
    plan = attention.plan_attention(case.kv, case.batch)
    q = native.rotate_and_store(ours, norms, 1e-6, cos, sin, kv, 0, plan)
    wanted = REFERENCE.rotate_and_store(theirs, norms, 1e-6, cos, sin, truth, 0, AttentionPlan(case.batch))
    close(q, wanted, dtype)
    close(kv, truth, dtype)
    assert torch.isfinite(kv).all()


def test_wrong_shapes_are_refused():
    case = PagedCase([(0, 5)], heads=2, group=3, dim=32)
    plan = attention.plan_attention(case.kv, case.batch)
    qkv, table = torch.randn(5, 10, 32), torch.randn(5, 16)
    latent = PagedCase([(0, 5)], heads=1, group=3, dim=32, parts=1).kv
    for arguments, name in (
        ((qkv[:4], None, 1e-6, table, table, case.kv, 0, plan), "qkv"),
        ((qkv.bfloat16(), None, 1e-6, table, table, case.kv, 0, plan), "qkv"),
        ((qkv, torch.randn(7, 32), 1e-6, table, table, case.kv, 0, plan), "head_norms"),
        ((qkv, None, 1e-6, table[:4], table, case.kv, 0, plan), "cos"),
        ((qkv, None, 1e-6, table, table, case.kv, 9, plan), "kv"),
        ((qkv, None, 1e-6, table, table, latent, 0, plan), "expected keys and values"),
    ):
        with pytest.raises(KernelInputError, match=name):
            native.rotate_and_store(*arguments)
