"""Writing and moving KV blocks in Triton: bit for bit what the reference does, and nothing else touched."""

import pytest
import torch
from fakes.paged_case import PagedCase
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from penstock.kernels.errors import KernelInputError
from penstock.kernels.gpu import attention as gpu_attention
from penstock.kernels.gpu import kv_blocks as gpu
from penstock.kernels.reference import attention as reference_attention
from penstock.kernels.reference import kv_blocks as reference

ROWS = [(5, 1), (0, 9), (3, 4), (4, 1), (8, 1), (0, 1)]
CODES = [torch.float8_e4m3fn, torch.int8]


def bits(tensor):
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def written(case, layer, kv_scales=None):
    """(by the kernel, by the reference), starting from equal storages."""
    truth = case.kv.clone()
    gpu.write_kv(case.kv, layer, case.new, gpu_attention.plan_attention(case.kv, case.batch), kv_scales)
    reference.write_kv(truth, layer, case.new, reference_attention.plan_attention(truth, case.batch), kv_scales)
    return bits(case.kv), bits(truth)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "dim", "slots"), [(2, 16, 4), (3, 80, 16), (1, 33, 8)])
def test_new_tokens_are_stored_finite(layer, dtype, heads, dim, slots):
    case = PagedCase(ROWS, heads=heads, dim=dim, slots=slots, dtype=dtype)
    case.new[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    ours, truth = written(case, layer)
    assert torch.equal(ours, truth)
    assert torch.isfinite(case.kv).all()


@pytest.mark.parametrize("stored", CODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_those_of_the_reference(stored, dtype):
    case = PagedCase(ROWS, heads=3, dim=24, dtype=dtype)
    case.kv = torch.zeros(case.kv.shape, dtype=torch.uint8).view(stored)
    case.new[0, 0, 0, :4] = torch.tensor([float("nan"), float("inf"), float("-inf"), 6e4])
    ours, truth = written(case, 1, 0.01 + 0.02 * torch.rand(2, 2, 3))
    assert torch.equal(ours, truth)


@pytest.mark.parametrize("stored", CODES)
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_every_bfloat16_gets_torchs_code(stored, scale):
    """All 65,536 of them: ties to even, subnormal codes, saturation, NaN."""
    case = PagedCase([(0, 64)], heads=2, dim=256, slots=16, dtype=torch.bfloat16)
    numbers = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    case.new, case.kv = numbers.view(64, 2, 2, 256), torch.zeros(case.kv.shape, dtype=torch.uint8).view(stored)
    ours, truth = written(case, 0, torch.full((2, 2, 2), scale))
    assert torch.equal(ours, truth)


def test_new_tokens_and_storage_may_be_views():
    case = PagedCase(ROWS, heads=2, dim=16)
    case.new = torch.randn(2, case.new.shape[0], 2, 24)[:, :, :, 4:20].permute(1, 2, 0, 3)
    case.kv = torch.randn(case.kv.shape[0], 2, 3, 2, 3, 4, 16)[:, 1, :2, :, 1:]
    untouched = case.kv.clone()
    ours, truth = written(case, 1)
    assert torch.equal(ours, truth)
    assert torch.equal(case.kv[:, 0], untouched[:, 0])


@pytest.mark.parametrize("on_host", [True, False])
def test_copy_blocks_reads_before_it_writes(on_host, monkeypatch):
    case = PagedCase([(0, 20)], dtype=torch.bfloat16)
    before = case.kv.clone()
    if not on_host:  # pairs that the host cannot look at go through memory between
        monkeypatch.setattr(gpu, "may_overlap", lambda pairs: True)
    gpu.copy_blocks(case.kv, torch.tensor([[0, 1], [1, 2], [5, 4]]))
    assert torch.equal(case.kv[[1, 2, 4]], before[[0, 1, 5]])
    gpu.copy_blocks(case.kv, torch.tensor([[3, 7], [0, 6]]))
    assert torch.equal(case.kv[[7, 6]], before[[3, 0]])
    assert torch.equal(case.kv[[0, 3, 5]], before[[0, 3, 5]])
    gpu.copy_blocks(case.kv, torch.zeros(0, 2, dtype=torch.int64))


@given(
    heads=st.integers(1, 5),
    picked=st.tuples(st.integers(0, 4), st.integers(1, 5)),
    dim=st.sampled_from([16, 20, 33]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_gather_and_scatter_of_some_heads(heads, picked, dim, dtype, seed):
    first = min(picked[0], heads - 1)
    count = min(picked[1], heads - first)
    torch.manual_seed(seed)
    kv = torch.randint(
        0, 256, (7, 2, 2, heads, 4, dim * (torch.finfo(dtype).bits // 8 if dtype.is_floating_point else 1))
    )
    kv = kv.to(torch.uint8).view(dtype)
    blocks = torch.randperm(7)[:4]
    staging = torch.empty(4, 2, 2, count, 4, dim, dtype=dtype)
    gpu.gather_blocks(kv, blocks, staging, first)
    assert torch.equal(bits(staging), bits(kv)[blocks, :, :, first : first + count])
    target = torch.zeros_like(kv)
    gpu.scatter_blocks(target, blocks, staging, first)
    expected = torch.zeros_like(bits(kv))
    expected[blocks, :, :, first : first + count] = bits(staging)
    assert torch.equal(bits(target), expected)


def test_blocks_listed_more_than_once_are_gathered_more_than_once():
    kv = torch.randn(5, 2, 2, 2, 4, 16)
    staging = torch.empty(3, 2, 2, 2, 4, 16)
    gpu.gather_blocks(kv, torch.tensor([4, 0, 4]), staging)
    assert torch.equal(staging, kv[[4, 0, 4]])
    gpu.gather_blocks(kv, torch.zeros(0, dtype=torch.int64), staging[:0])


def test_runs_that_are_not_adjacent_are_refused():
    kv = torch.randn(5, 2, 2, 2, 4, 16)[..., :8]
    with pytest.raises(KernelInputError, match="gather_blocks: kv: strides") as caught:
        gpu.gather_blocks(kv, torch.tensor([1]), torch.empty(1, 2, 2, 2, 4, 8))
    assert caught.value.argument == "kv"
