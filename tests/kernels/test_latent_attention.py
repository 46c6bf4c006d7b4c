"""Latent attention: the reference against a dense formula, the CPU kernels against float64, refusals."""

import os
import subprocess
import sys

import pytest
import torch
from fakes.paged_case import PagedCase
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels import dispatch, ops
from penstock.kernels.cpu import attention as cpu_attention
from penstock.kernels.cpu import kv_blocks as cpu_kv_blocks
from penstock.kernels.cpu import latent_attention as cpu
from penstock.kernels.errors import KernelInputError
from penstock.kernels.native.latent_attention import heads_of_group
from penstock.kernels.reference import attention as reference_attention
from penstock.kernels.reference import latent_attention as reference

MIXES = {
    "decodes": [(0, 1), (3, 1), (4, 1), (15, 1), (200, 1)],
    "fresh prompts": [(0, 2), (0, 5), (0, 4), (0, 100), (0, 97)],
    "later chunks": [(4, 3), (8, 16), (5, 2), (64, 40), (61, 33)],
    "everything": [(9, 1), (0, 7), (30, 1), (6, 6), (0, 1), (0, 12), (7, 2), (2, 1)],
    "one token": [(0, 1)],
}
SHAPES = [(1, 16, 8), (6, 40, 32), (5, 33 * 2, 50), (16, 576, 512), (20, 72, 64)]  # heads, stored width, value width


def latent_case(rows, heads=6, dim=40, **options):
    return PagedCase(rows, heads=1, group=heads, dim=dim, parts=1, **options)


def truth(case, layer, scale, value_dim):
    plan = reference_attention.plan_attention(case.kv, case.batch)
    return reference.latent_attention(case.q.double(), case.kv.double(), layer, plan, scale, value_dim)


def by_hand(case, layer, scale, value_dim):
    """Token by token and head by head, from the formula alone."""
    slots = case.kv.shape[4]
    out = torch.empty(*case.q.shape[:2], value_dim, dtype=torch.float64)
    for row, (start, count) in enumerate(zip(case.batch.starts, case.batch.counts, strict=True)):
        for new in range(count):
            token, position = int(case.batch.offsets[row]) + new, int(start) + new
            stored = [case.kv[case.tables[row, p // slots], layer, 0, 0, p % slots] for p in range(position + 1)]
            keys = torch.stack(stored).double()
            for head in range(case.q.shape[1]):
                weights = torch.softmax(scale * keys @ case.q[token, head].double(), -1)
                out[token, head] = weights @ keys[:, :value_dim]
    return out


@pytest.mark.parametrize("rows", MIXES.values(), ids=MIXES.keys())
def test_reference_against_the_formula(rows):
    case = latent_case(rows, heads=3, dim=12)
    torch.testing.assert_close(truth(case, 1, 0.4, 9), by_hand(case, 1, 0.4, 9), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rows", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize(("heads", "dim", "value_dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_float64(rows, heads, dim, value_dim, dtype):
    case = latent_case(rows, heads, dim, dtype=dtype)
    scale = dim**-0.5
    out = ops.latent_attention(case.q, case.kv, 1, ops.plan_attention(case.kv, case.batch), scale, value_dim)
    assert out.shape == (case.batch.num_tokens, heads, value_dim)
    assert out.dtype == dtype
    error = (out.double() - truth(case, 1, scale, value_dim)).abs().max()
    rounding = {torch.float32: 1e-5, torch.bfloat16: 1.5 * 2**-8, torch.float16: 1.5 * 2**-11}[dtype]
    assert error <= (rounding + torch.finfo(dtype).eps) * case.kv.abs().max()


@pytest.mark.parametrize("rows", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize(("heads", "dim", "value_dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_path_against_float64(rows, heads, dim, value_dim, dtype):
    case = latent_case(rows, heads, dim, dtype=dtype, slots=5)
    out = cpu.latent_attention(
        case.q, case.kv, 0, cpu_attention.plan_attention(case.kv, case.batch), dim**-0.5, value_dim
    )
    error = (out.double() - truth(case, 0, dim**-0.5, value_dim)).abs().max()
    rounding = {torch.float32: 1e-5, torch.bfloat16: 1.5 * 2**-8}[dtype]
    assert error <= (rounding + torch.finfo(dtype).eps) * case.kv.abs().max()


@given(
    rows=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 40)), min_size=1, max_size=8),
    heads=st.integers(1, 20),
    dim=st.integers(1, 40).map(lambda half: 2 * half),
    slots=st.sampled_from([1, 3, 16]),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_any_ragged_batch(rows, heads, dim, slots, share, seed):
    case = latent_case(rows, heads, dim, slots=slots, seed=seed)
    value_dim = max(1, round(share * dim))
    expected = truth(case, 1, 0.2, value_dim)
    out = ops.latent_attention(case.q, case.kv, 1, ops.plan_attention(case.kv, case.batch), 0.2, value_dim)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)
    plain = cpu.latent_attention(case.q, case.kv, 1, cpu_attention.plan_attention(case.kv, case.batch), 0.2, value_dim)
    torch.testing.assert_close(plain.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("score_elements", [1, 300, 1 << 20])
def test_the_size_of_tiles_does_not_matter(monkeypatch, score_elements):
    monkeypatch.setattr(cpu, "SCORE_ELEMENTS", score_elements)
    case = latent_case([(0, 30), (7, 20), (0, 2)])
    out = cpu.latent_attention(case.q, case.kv, 0, cpu_attention.plan_attention(case.kv, case.batch), 0.3, 32)
    torch.testing.assert_close(out.double(), truth(case, 0, 0.3, 32), atol=1e-5, rtol=1e-5)


def test_a_row_does_not_depend_on_the_batch():
    case = latent_case([(9, 1), (0, 7), (30, 1), (6, 6)], heads=16, dim=96)
    together = ops.latent_attention(case.q, case.kv, 0, ops.plan_attention(case.kv, case.batch), 0.2, 64)
    for row in range(4):
        begin, end = case.batch.offsets[row : row + 2]
        alone = PagedCase.__new__(PagedCase)
        alone.batch = type(case.batch)(
            case.batch.starts[row : row + 1], (case.batch.offsets[row : row + 2] - begin), case.tables[row : row + 1]
        )
        plan = ops.plan_attention(case.kv, alone.batch)
        out = ops.latent_attention(case.q[begin:end], case.kv, 0, plan, 0.2, 64)
        assert torch.equal(out, together[begin:end])


@pytest.mark.parametrize("write", [ops.write_kv, cpu_kv_blocks.write_kv])
def test_rows_are_written_where_they_belong(write):
    case = latent_case([(9, 1), (0, 7), (30, 1), (6, 6)])
    before = case.kv.clone()
    case.new[3, 0, 0, 5] = float("nan")
    native = write is ops.write_kv
    plan = ops.plan_attention(case.kv, case.batch) if native else cpu_attention.plan_attention(case.kv, case.batch)
    write(case.kv, 1, case.new, plan)
    for row, (start, count) in enumerate(zip(case.batch.starts, case.batch.counts, strict=True)):
        for new in range(count):
            block, slot = case.tables[row, (start + new) // 4], (start + new) % 4
            assert torch.equal(
                case.kv[block, 1, 0, 0, slot], case.new[case.batch.offsets[row] + new, 0, 0].nan_to_num()
            )
            before[block, 1, 0, 0, slot] = case.kv[block, 1, 0, 0, slot]
    assert torch.equal(case.kv, before)


def test_blocks_move_bit_by_bit():
    case = latent_case([(40, 3), (9, 1)])
    staging = torch.empty(2, *case.kv.shape[1:])
    ops.gather_blocks(case.kv, torch.tensor([5, 2]), staging)
    assert torch.equal(staging, case.kv[[5, 2]])
    ops.scatter_blocks(case.kv, torch.tensor([7, 8]), staging)
    ops.copy_blocks(case.kv, torch.tensor([[7, 3]]))
    assert torch.equal(case.kv[3], staging[0])
    assert torch.equal(case.kv[8], staging[1])


def test_groups_of_heads():
    assert {heads: heads_of_group(heads) for heads in (1, 2, 5, 6, 16, 17, 20, 32, 128)} == {
        1: 1, 2: 2, 5: 5, 6: 6, 16: 16, 17: 1, 20: 10, 32: 16, 128: 16,
    }  # fmt: skip


def test_refusals():
    case = latent_case([(3, 2)])
    plan = ops.plan_attention(case.kv, case.batch)
    with pytest.raises(KernelInputError, match="value_dim: 41; expected 1 to 40"):
        ops.latent_attention(case.q, case.kv, 0, plan, 1.0, 41)
    with pytest.raises(KernelInputError, match=r"q: shape \[2, 6, 39\]"):
        ops.latent_attention(case.q[..., 1:].contiguous(), case.kv, 0, plan, 1.0, 32)
    with pytest.raises(KernelInputError, match="layer: 2; the storage has 2"):
        ops.latent_attention(case.q, case.kv, 2, plan, 1.0, 32)
    with pytest.raises(KernelInputError, match=r"expected \[T, 1, 1, 40\]"):
        ops.write_kv(case.kv, 0, torch.zeros(2, 2, 1, 40), plan)
    with pytest.raises(KernelInputError, match="latent_attention reads those"):
        ops.paged_attention(case.q, case.kv, 0, plan, 1.0)
    pair = PagedCase([(3, 2)])
    with pytest.raises(KernelInputError, match=r"expected \[B, L, 1, 1, P, D\]"):
        ops.latent_attention(pair.q, pair.kv, 0, ops.plan_attention(pair.kv, pair.batch), 1.0, 8)
    with pytest.raises(KernelInputError, match="head size 1025; supported are 1 to 1024"):
        ops.plan_attention(torch.zeros(1, 1, 1, 1, 4, 1025), case.batch)
    with pytest.raises(KernelInputError, match=r"or \[B, L, 1, 1, P, D\]"):
        ops.plan_attention(torch.zeros(1, 1, 1, 2, 4, 8), case.batch)


def test_every_backend_has_it():
    assert dispatch.REFERENCE.latent_attention is reference.latent_attention
    assert dispatch.CPU.latent_attention is cpu.latent_attention
    code = (
        "import torch; from penstock.kernels import dispatch; "
        "print(dispatch.choose('cpu', torch.float32).latent_attention.__module__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PENSTOCK_KERNELS": "cpu"}, capture_output=True, timeout=60
    )
    assert done.stdout.decode().strip() == cpu.__name__
