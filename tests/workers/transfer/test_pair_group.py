"""Two ends of a pair over Gloo; calls on a GPU are watched and end in time, which a backend of this file stands for."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from penstock.workers.errors import ConfigError, GroupError
from penstock.workers.parallel.process_group import serve_store
from penstock.workers.transfer.pair_group import ACCEPTING, OPENING, BackendPair, open_pair, require_nccl

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_what_is_sent_is_received_in_order() -> None:
    store, address = serve_store("127.0.0.1", 10)
    with ThreadPoolExecutor(2) as threads:
        ends = [
            threads.submit(open_pair, address, "pair", rank, "127.0.0.1", CPU, 10.0) for rank in (ACCEPTING, OPENING)
        ]
        accepting, opening = (end.result(20) for end in ends)
        frames = [torch.full((size,), size % 251, dtype=torch.uint8) for size in (1 << 20, 3, 5000)]
        sending = threads.submit(lambda: [opening.send(frame) for frame in frames])
        for frame in frames:
            found = torch.empty_like(frame)
            accepting.receive(found)
            assert torch.equal(found, frame)
        sending.result(10)
    for end in (accepting, opening):
        end.abort()
        end.abort()
        with pytest.raises(GroupError, match="ended"):
            end.send(frames[0])
    del store


def test_a_peer_that_does_not_come_is_not_waited_for_longer() -> None:
    store, address = serve_store("127.0.0.1", 10)
    began = time.monotonic()
    with pytest.raises(GroupError, match="did not meet"):
        open_pair(address, "alone", ACCEPTING, "127.0.0.1", CPU, 0.5)
    assert time.monotonic() - began < 5
    del store


class Device:
    """A backend whose calls end when told to; `failing`: with an error."""

    def __init__(self, failing: bool = False) -> None:
        self.done = threading.Event()
        self.aborted = 0
        self.failing = failing

    def rank(self) -> int:
        return 1

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Device:
        assert (len(tensors), peer) == (1, 0)
        return self

    def is_completed(self) -> bool:
        return self.done.is_set()

    def wait(self) -> None:
        if self.failing:
            raise RuntimeError("NCCL error: remote process exited\nmore")

    def abort(self) -> None:
        self.aborted += 1


def receive(device: Device, timeout_s: float) -> BackendPair:
    pair = BackendPair(device, GPU, timeout_s)
    threading.Timer(0.1, device.done.set).start()
    pair.receive(torch.zeros(1))
    return pair


def test_a_call_on_a_gpu_that_ends() -> None:
    device = Device()
    receive(device, 5.0)
    assert device.aborted == 0


def test_a_call_on_a_gpu_that_fails() -> None:
    with pytest.raises(GroupError, match=r"remote process exited$"):
        receive(Device(failing=True), 5.0)


def test_a_call_on_a_gpu_that_does_not_end_is_aborted() -> None:
    device = Device()
    with pytest.raises(GroupError, match=r"within 0\.05 s"):
        receive(device, 0.05)
    assert device.aborted == 1


def test_a_call_on_a_gpu_ends_when_another_thread_says_so() -> None:
    device = Device()
    pair = BackendPair(device, GPU, 30.0)
    threading.Timer(0.1, pair.abort).start()
    began = time.monotonic()
    with pytest.raises(GroupError, match="was ended"):
        pair.receive(torch.zeros(1))
    assert time.monotonic() - began < 5
    assert device.aborted == 1


def test_what_nccl_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="host memory"):
        require_nccl(CPU)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(ConfigError, match="no NCCL") as caught:
        require_nccl(GPU)
    assert caught.value.key == "transfer.transport"
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    require_nccl(GPU)
