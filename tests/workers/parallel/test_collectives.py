"""What ranks compute together, over sockets and through shared memory, against plain tensors; and how it fails."""

import time

import pytest
import torch
from fakes.rank_threads import RankThreads

from penstock.workers.errors import GroupError, IntegrityError
from penstock.workers.parallel.collectives import Alone, GroupCollectives
from penstock.workers.parallel.shared_collectives import SharedCollectives

KINDS = {"sockets": GroupCollectives, "memory": SharedCollectives}


@pytest.fixture(
    scope="module", params=[(2, "sockets"), (3, "sockets"), (2, "memory"), (3, "memory"), (4, "memory")], ids=str
)
def ranks(request):
    width, kind = request.param
    with RankThreads(width, share_memory=kind == "memory") as group:
        assert {type(each) for each in group.groups} == {KINDS[kind]}
        assert [each.rank for each in group.groups] == list(range(width))
        yield group


def part(rank, *shape, dtype=torch.float32, seed=0):
    own = torch.Generator().manual_seed(100 * seed + rank)  # ranks are threads: the common one is nobody's
    return torch.randint(-50, 50, shape, generator=own).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(1,), (7, 5), (3, 0), (1000, 37), (70001,)], ids=str)
def test_all_reduce(ranks, dtype, shape):
    expected = sum(part(rank, *shape, dtype=dtype) for rank in range(ranks.width))

    def work(group):
        x = part(group.rank, *shape, dtype=dtype)
        assert group.all_reduce(x) is x
        return x

    for result in ranks.all(work):
        assert torch.equal(result, expected)


def test_all_reduce_is_the_same_on_all_ranks_to_the_bit(ranks):
    def work(group):
        own = torch.Generator().manual_seed(group.rank)
        return group.all_reduce(torch.randn(200_000, generator=own))

    first, *others = ranks.all(work)
    assert all(torch.equal(first, other) for other in others)


def test_all_reduce_of_a_part_of_a_tensor(ranks):
    def work(group):
        whole = part(group.rank, 6, 8)
        group.all_reduce(whole[:, 2:5])
        return whole

    wholes = [part(rank, 6, 8) for rank in range(ranks.width)]
    for rank, result in enumerate(ranks.all(work)):
        assert torch.equal(result[:, 2:5], sum(whole[:, 2:5] for whole in wholes))
        assert torch.equal(result[:, 5:], wholes[rank][:, 5:])


@pytest.mark.parametrize("shape", [(1, 1), (4, 3), (5, 70_000), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_columns(ranks, shape, dtype):
    parts = [part(rank, *shape, dtype=dtype) for rank in range(ranks.width)]
    first, *others = ranks.all(lambda group: group.gather_columns(parts[group.rank].transpose(0, 0)))
    assert torch.equal(first, torch.cat(parts, dim=-1))
    assert others == [None] * (ranks.width - 1)


@pytest.mark.parametrize("shape", [(1,), (3, 4), (0, 4), (300_000, 2)], ids=str)
def test_all_gather(ranks, shape):
    parts = [part(rank, *shape) for rank in range(ranks.width)]
    for result in ranks.all(lambda group: group.all_gather(parts[group.rank])):
        assert torch.equal(result, torch.cat(parts))


@pytest.mark.parametrize("scale", [0, 1, 40_000])
def test_all_to_all_keeps_the_order_of_rows(ranks, scale):
    width = ranks.width
    counts = [[scale * ((sender * 3 + receiver) % 4) for receiver in range(width)] for sender in range(width)]
    rows = [part(rank, sum(counts[rank]), 5) for rank in range(width)]
    pieces = [torch.split(rows[rank], counts[rank]) for rank in range(width)]

    def work(group):
        receive = [counts[sender][group.rank] for sender in range(width)]
        return group.all_to_all(rows[group.rank], counts[group.rank], receive)

    for rank, result in enumerate(ranks.all(work)):
        assert torch.equal(result, torch.cat([pieces[sender][rank] for sender in range(width)]))


@pytest.mark.parametrize("source", [0, 1])
@pytest.mark.parametrize("size", [3, 400_000])
def test_broadcast(ranks, source, size):
    for result in ranks.all(lambda group: group.broadcast(part(group.rank, size), source)):
        assert torch.equal(result, part(source, size))


def test_barrier_waits_for_the_last(ranks):
    def work(group):
        if group.rank == 1:
            time.sleep(0.2)
        group.barrier()
        return time.monotonic()

    ends = ranks.all(work)
    assert max(ends) - min(ends) < 0.15


def test_many_calls_of_all_kinds_in_a_row(ranks):
    """Turns of a buffer must not overtake each other, whoever is slow."""

    def work(group):
        total = 0.0
        for turn in range(60):
            if turn % 7 == group.rank:
                time.sleep(0.0005)
            total += float(group.all_reduce(torch.full((turn % 50 + 1,), float(group.rank + turn)))[0])
            joined = group.gather_columns(torch.full((2, 3), float(turn)))
            assert joined is None or bool((joined == turn).all())
            assert group.all_gather(torch.tensor([turn])).tolist() == [turn] * group.width
        return total

    assert len(set(ranks.all(work))) == 1


def test_wrong_counts_are_refused_before_anything_is_sent(ranks):
    with pytest.raises(IntegrityError, match="rows to send"):
        ranks.groups[0].all_to_all(torch.zeros(3, 2), [1] * ranks.width, [1] * ranks.width) if ranks.width != 3 else (
            ranks.groups[0].all_to_all(torch.zeros(4, 2), [1] * 3, [1] * 3)
        )
    with pytest.raises(IntegrityError, match="counts in a group"):
        ranks.groups[0].all_to_all(torch.zeros(3, 2), [3], [3])
    with pytest.raises(IntegrityError, match="no rank"):
        ranks.groups[0].broadcast(torch.zeros(3), ranks.width)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_has_left_is_an_error_for_the_others(kind):
    with RankThreads(2, share_memory=kind == "memory") as ranks:
        ranks.groups[1].close()
        ranks.groups[1].close()
        began = time.monotonic()
        with pytest.raises(GroupError, match="rank 0: all_reduce failed"):
            ranks.groups[0].all_reduce(torch.zeros(4))
        assert time.monotonic() - began < 10.0  # it is not waited for
        with pytest.raises(GroupError, match="after the group was closed"):
            ranks.groups[1].all_reduce(torch.zeros(4))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_does_not_come_is_an_error_after_the_time_out(kind):
    with RankThreads(2, timeout_s=0.5, share_memory=kind == "memory") as ranks:
        began = time.monotonic()
        with pytest.raises(GroupError, match="barrier failed"):
            ranks.groups[0].barrier()
        assert 0.4 < time.monotonic() - began < 3.0


def test_a_group_of_one_does_nothing():
    alone, x = Alone(), torch.arange(6.0).view(3, 2)
    assert alone.all_reduce(x) is x
    assert alone.gather_columns(x) is x
    assert alone.all_gather(x) is x
    assert alone.all_to_all(x, [3], [3]) is x
    assert alone.broadcast(x) is x
    alone.barrier()
    alone.close()
    with pytest.raises(IntegrityError):
        alone.all_to_all(x, [3], [2])
    with pytest.raises(IntegrityError):
        alone.broadcast(x, 1)
