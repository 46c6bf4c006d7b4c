"""Recording work on a device so that it can be repeated by one call: the protocol, and torch's CUDA graphs behind it.

Used by `store.py`; tests put in a recorder that runs the same work again. It does not know what the work is.

What is recorded must read and write memory that stays, allocate no more than temporaries, and never wait for the host:
a replay repeats the kernels with the addresses of the recording.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Work = Callable[[], None]
_WARM_UPS = 2  # the first run compiles kernels and makes library handles, which must not happen while recording


class Recording(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Do it again, on the current stream. Returns before it is done."""
        ...


class Recorder(Protocol):
    """Makes recordings on one device."""

    def record(self, work: Work) -> Recording:
        """Run `work`, then record it. Raises RuntimeError where it cannot be recorded; the device is usable then."""
        ...


class CudaRecorder:
    """CUDA graphs of one GPU, all of one memory pool: they are replayed one at a time, so temporaries may share it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work) -> Recording:
        """See `Recorder.record`."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                work()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are restricted while recording: the transfer thread goes on copying blocks.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        current.wait_stream(self._stream)
        return graph
