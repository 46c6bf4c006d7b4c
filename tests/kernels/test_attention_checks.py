"""Wrong arguments of the attention operations: a KernelInputError naming each, whatever the backend, and no crash."""

import copy

import numpy as np
import pytest
import torch
from fakes.paged_case import PagedCase

from penstock.kernels import dispatch, ops
from penstock.kernels.errors import KernelInputError
from penstock.kernels.ragged import RaggedBatch

F8 = torch.float8_e4m3fn


@pytest.fixture
def case():
    return PagedCase([(5, 1), (0, 7), (9, 2)])


@pytest.fixture
def checked(monkeypatch):
    monkeypatch.setenv("PENSTOCK_KERNELS_CHECKED", "1")
    dispatch.checked.cache_clear()
    yield
    monkeypatch.undo()
    dispatch.checked.cache_clear()


def refused(op, argument, call):
    with pytest.raises(KernelInputError) as caught:
        call()
    assert (caught.value.op, caught.value.argument) == (op, argument)
    assert str(caught.value).startswith(f"{op}: {argument}: ")


def batch(case, **changes):
    parts = {"starts": case.batch.starts, "offsets": case.batch.offsets, "block_tables": case.tables}
    return RaggedBatch(**{**parts, **changes})


@pytest.mark.parametrize(
    "kv",
    [
        torch.zeros(4, 2, 2, 2, 4),
        torch.zeros(4, 2, 3, 2, 4, 16),
        torch.zeros(4, 2, 2, 2, 4, 257),
        torch.zeros(4, 2, 2, 2, 4, 16, dtype=torch.int32),
        torch.zeros(4, 2, 2, 2, 2048, 1),
    ],
    ids=["dims", "parts", "head size", "dtype", "slots"],
)
def test_storages(case, kv):
    refused("plan_attention", "kv", lambda: ops.plan_attention(kv, case.batch))


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("starts", {"starts": np.zeros(2, np.int32)}),
        ("starts", {"starts": np.array([5, -1, 9], np.int32)}),
        ("starts", {"starts": np.array([5.0, 0.0, 9.0])}),
        ("starts", {"offsets": np.array([0, 1, 8], np.int32)}),
        ("offsets", {"offsets": np.array([1, 2, 9, 11], np.int32)}),
        ("offsets", {"offsets": np.array([0, 8, 1, 10], np.int32)}),
        ("block_tables", {"block_tables": np.zeros((2, 4), np.int32)}),
        ("block_tables", {"block_tables": np.zeros((3, 2), np.int32)}),
        ("block_tables", {"block_tables": np.zeros(12, np.int32)}),
    ],
)
def test_batches(case, argument, changes):
    refused("plan_attention", argument, lambda: ops.plan_attention(case.kv, batch(case, **changes)))


@pytest.mark.parametrize(
    ("argument", "q", "layer", "options"),
    [
        ("layer", torch.zeros(10, 6, 16), 2, {}),
        ("layer", torch.zeros(10, 6, 16), -1, {}),
        ("q", torch.zeros(10, 6, 8), 0, {}),
        ("q", torch.zeros(10, 96), 0, {}),
        ("q", torch.zeros(10, 7, 16), 0, {}),
        ("q", torch.zeros(10, 2 * 129, 16), 0, {}),
        ("q", torch.zeros(10, 0, 16), 0, {}),
        ("q", torch.zeros(9, 6, 16), 0, {}),
        ("q", torch.zeros(11, 6, 16), 0, {}),
        ("q", torch.zeros(10, 6, 16, dtype=torch.bfloat16), 0, {}),
        ("q", torch.zeros(10, 6, 16, device="meta"), 0, {}),
        ("window", torch.zeros(10, 6, 16), 0, {"window": -1}),
        ("kv_scales", torch.zeros(10, 6, 16), 0, {"kv_scales": torch.ones(2, 2, 2)}),
    ],
)
def test_queries(case, argument, q, layer, options):
    plan = ops.plan_attention(case.kv, case.batch)
    for name in ("paged_attention", "paged_attention_with_lse"):
        refused(name, argument, lambda n=name: getattr(ops, n)(q, case.kv, layer, plan, 0.3, **options))


@pytest.mark.parametrize(
    ("argument", "new", "scales"),
    [
        ("new", torch.zeros(10, 2, 3, 16), None),
        ("new", torch.zeros(9, 2, 2, 16), None),
        ("new", torch.zeros(10, 2, 2, 16, dtype=torch.float16), None),
        ("kv_scales", torch.zeros(10, 2, 2, 16), torch.ones(2, 2, 2)),
    ],
)
def test_new_tokens(case, argument, new, scales):
    plan = ops.plan_attention(case.kv, case.batch)
    refused("write_kv", argument, lambda: ops.write_kv(case.kv, 0, new, plan, scales))


@pytest.mark.parametrize(
    "scales",
    [None, torch.ones(2, 2), torch.ones(2, 2, 2, dtype=torch.float64), torch.ones(2, 2, 4)[..., ::2]],
    ids=["missing", "shape", "dtype", "strides"],
)
@pytest.mark.parametrize("stored", [F8, torch.int8])
def test_scales_of_codes(case, scales, stored):
    kv = torch.zeros(case.kv.shape, dtype=torch.uint8).view(stored)
    plan = ops.plan_attention(kv, case.batch)
    refused("paged_attention", "kv_scales", lambda: ops.paged_attention(case.q, kv, 0, plan, 0.3, kv_scales=scales))
    refused("write_kv", "kv_scales", lambda: ops.write_kv(kv, 0, case.new, plan, scales))


def test_moved_blocks(case):
    blocks, staging = torch.tensor([1, 0]), torch.zeros(2, 2, 2, 2, 4, 16)
    for name in ("gather_blocks", "scatter_blocks"):
        op = getattr(ops, name)
        op(case.kv.clone(), blocks, staging)
        refused(name, "blocks", lambda op=op: op(case.kv, blocks.int(), staging))
        refused(name, "blocks", lambda op=op: op(case.kv, blocks[None], staging))
        refused(name, "staging", lambda op=op: op(case.kv, blocks, staging[:1]))
        refused(name, "staging", lambda op=op: op(case.kv, blocks, staging.double()))
        refused(name, "staging", lambda op=op: op(case.kv, blocks, torch.zeros(2, 2, 2, 2, 4, 32)[..., ::2]))
        refused(name, "first_head", lambda op=op: op(case.kv, blocks, staging, 1))
    refused("copy_blocks", "pairs", lambda: ops.copy_blocks(case.kv, torch.tensor([[0, 1, 2]])))


def test_states():
    o, lse, indptr = torch.zeros(3, 2, 16), torch.zeros(3, 2), torch.tensor([0, 3])
    refused("merge_states", "o", lambda: ops.merge_states(o[0], lse, indptr))
    refused("merge_states", "lse", lambda: ops.merge_states(o, lse[:2], indptr))
    refused("merge_states", "lse", lambda: ops.merge_states(o, lse.half(), indptr))
    refused("merge_states", "merge_indptr", lambda: ops.merge_states(o, lse, indptr[:0]))
    refused("merge_states", "merge_indptr", lambda: ops.merge_states(o, lse, indptr.float()))


def test_values_are_looked_at_in_checked_mode_only(case):
    tables = case.tables.copy()
    tables[1, 1] = len(case.kv)
    dispatch.checked.cache_clear()
    assert not dispatch.checked()
    dispatch.REFERENCE.plan_attention(case.kv, batch(case, block_tables=tables))


def test_checked_values(case, checked):
    half = case.kv.half()  # a dtype whose backend does not look at the numbers itself
    for wrong in (-1, len(case.kv)):
        tables = case.tables.copy()
        tables[1, 1] = wrong
        refused(
            "plan_attention", "block_tables", lambda t=tables: ops.plan_attention(half, batch(case, block_tables=t))
        )
    tables = case.tables.copy()
    tables[0, 3:] = -1  # past the row's end: nobody reads it
    ops.plan_attention(case.kv, batch(case, block_tables=tables))
    empty = batch(case, offsets=np.array([0, 1, 1, 3], np.int32))
    refused("plan_attention", "offsets", lambda: ops.plan_attention(case.kv, empty))
    plan = ops.plan_attention(case.kv, case.batch)
    case.q[3, 1, 0] = float("nan")
    refused("paged_attention", "q", lambda: ops.paged_attention(case.q, case.kv, 0, plan, 0.3))
    staging = torch.zeros(1, 2, 2, 2, 4, 16)
    refused("gather_blocks", "blocks", lambda: ops.gather_blocks(case.kv, torch.tensor([len(case.kv)]), staging))
    refused("copy_blocks", "pairs", lambda: ops.copy_blocks(case.kv, torch.tensor([[0, -1]])))


def test_an_error_is_rebuilt_from_its_parts():
    """As when it crosses a process border."""
    error = copy.copy(KernelInputError("op", "argument", "problem"))
    assert (error.op, error.argument, error.problem) == ("op", "argument", "problem")
    assert str(error) == "op: argument: problem"
