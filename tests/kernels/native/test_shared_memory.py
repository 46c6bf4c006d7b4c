"""Exchanges through shared memory, as each instruction set compiles them; ranks are threads here."""

import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from penstock.kernels.native import library
from penstock.kernels.native.shared_memory import (
    BUFFER_BYTES,
    ExchangeError,
    Outcome,
    SharedExchange,
    available,
    memory_bytes,
    sums,
)


@pytest.fixture(autouse=True)
def _compiled(level):
    library.answering_function.cache_clear()
    yield
    library.answering_function.cache_clear()


def exchanges(width, timeout_s=20.0, processes=()):
    memory = mmap.mmap(-1, memory_bytes(width))
    return [SharedExchange(memory, rank, width, timeout_s=timeout_s, processes=processes) for rank in range(width)]


def together(ranks, work):
    with ThreadPoolExecutor(len(ranks)) as pool:
        return [each.result(30) for each in [pool.submit(work, rank, one) for rank, one in enumerate(ranks)]]


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("count", [1, 17, 40_000, BUFFER_BYTES // 2 + 5])
def test_sums_in_the_order_of_ranks(width, dtype, count):
    torch.manual_seed(count)
    parts = [(torch.randn(count) * 100).to(dtype) for _ in range(width)]
    wide = torch.float32 if dtype is torch.bfloat16 else dtype
    expected = parts[0].to(wide)
    for part in parts[1:]:
        expected = expected + part.to(wide)
    results = [part.clone() for part in parts]
    together(exchanges(width), lambda rank, one: one.all_reduce(results[rank]))
    for result in results:
        assert torch.equal(result, expected.to(dtype))


def test_a_sum_does_not_depend_on_what_is_summed_beside_it():
    torch.manual_seed(0)
    parts = [torch.randn(100_000) for _ in range(3)]
    whole, some = [part.clone() for part in parts], [part[777:5000].clone() for part in parts]
    together(exchanges(3), lambda rank, one: one.all_reduce(whole[rank]))
    together(exchanges(3), lambda rank, one: one.all_reduce(some[rank]))
    assert torch.equal(whole[1][777:5000], some[2])


def test_all_to_all_of_sizes_that_differ_by_turns():
    counts = [[0, 300_000, 3], [7, 0, 0], [100_000, 1, 50_000]]
    rows = [torch.arange(sum(own), dtype=torch.float32) + 1e6 * rank for rank, own in enumerate(counts)]

    def work(rank, one):
        results = []
        for turn in range(3):
            own = [count // (turn + 1) for count in counts[rank]]
            receive = [counts[peer][rank] // (turn + 1) for peer in range(3)]
            received = torch.empty(sum(receive))
            one.all_to_all(rows[rank][: sum(own)], own, received, receive)
            results.append(received)
        return results

    for rank, results in enumerate(together(exchanges(3), work)):
        for turn, received in enumerate(results):
            cut = [[count // (turn + 1) for count in own] for own in counts]
            pieces = [torch.split(rows[peer][: sum(cut[peer])], cut[peer])[rank] for peer in range(3)]
            assert torch.equal(received, torch.cat(pieces))


def test_a_rank_that_is_late_or_has_left_or_does_something_else():
    first, second = exchanges(2, timeout_s=0.2)
    with pytest.raises(ExchangeError) as late:
        first.barrier()
    assert (late.value.outcome, late.value.rank) == (Outcome.LATE, 1)
    first, second = exchanges(2)
    second.leave()
    with pytest.raises(ExchangeError) as left:
        first.barrier()
    assert (left.value.outcome, left.value.rank) == (Outcome.LEFT, 1)
    first, second = exchanges(2, timeout_s=2.0)

    def sum_instead():
        with pytest.raises(ExchangeError):
            second.all_reduce(torch.zeros(3))

    other = threading.Thread(target=sum_instead)
    other.start()
    with pytest.raises(ExchangeError) as differs:
        first.barrier()
    other.join()
    assert (differs.value.outcome, differs.value.rank) == (Outcome.OTHER, 1)


def test_a_process_that_has_ended():
    pid = os.posix_spawn("/bin/true", ["true"], {})
    pidfd = os.pidfd_open(pid)
    first, _ = exchanges(2, processes=[-1, pidfd])
    with pytest.raises(ExchangeError) as ended:
        first.barrier()
    assert (ended.value.outcome, ended.value.rank) == (Outcome.ENDED, 1)
    os.waitpid(pid, 0)
    os.close(pidfd)


def test_sizes_and_dtypes():
    assert available()
    assert sums(torch.bfloat16)
    assert not sums(torch.float16)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        SharedExchange(mmap.mmap(-1, memory_bytes(2)), 2, 2, timeout_s=1.0)
    with pytest.raises(ValueError, match="rank 0 of 3"):
        SharedExchange(mmap.mmap(-1, memory_bytes(2)), 0, 3, timeout_s=1.0)
