"""The inputs of a step in memory that was allocated once: a plan's arrays become tensors on the device in one copy.

Used by `runner.py`. Everything a step needs besides its attention plan is written side by side into one host buffer,
page-locked where the device is a GPU, by whole-array numpy assignments, and sent by one asynchronous copy. Where a part
lies depends only on the numbers of tokens, wanted rows and sampled rows, so a captured step finds its inputs again. Two
host buffers alternate: one may be filled while the other is still being copied. On the CPU the host buffer is the
device's, and nothing is copied. It knows plans and tensors; no model, and no graph.

Invariant: a host buffer is written only after the copy that last read it is done.
Legend: N rows, T packed tokens, W wanted tokens, S sampled rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels.ragged import RaggedBatch
from penstock.workers.errors import IntegrityError
from penstock.workers.scheduler.plan import SamplingBatch, StepPlan
from penstock.workers.static_memory import StaticMemory

_ALIGN = 8
_WIDE = 8  # bytes of an int64
_PER_TOKEN = 2 * _WIDE  # id, position
_PER_SAMPLED = 5 * _WIDE + 2 * 4  # top_k, seed, choice, position, top_p; temperature, min_p
_NUM_HOST_BUFFERS = 2


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step there will be."""

    max_rows: int
    max_tokens: int
    table_width: int  # blocks of the longest sequence

    @property
    def num_bytes(self) -> int:
        """Of one buffer: every token may be wanted besides every row."""
        wanted = self.max_rows + self.max_tokens
        used = self.max_tokens * _PER_TOKEN + wanted * _WIDE + self.max_rows * _PER_SAMPLED
        return -(-used // _ALIGN) * _ALIGN


@dataclass(frozen=True, slots=True, eq=False)
class SamplingTensors:
    """A `SamplingBatch` without edits and logprobs, on the device; all [S], of the dtypes of `ops.sample_tokens`."""

    temperature: Tensor  # float32
    top_k: Tensor  # int64
    top_p: Tensor  # float64
    min_p: Tensor  # float32
    seed: Tensor  # int64 with the bits of an unsigned number
    choice: Tensor  # int64
    position: Tensor  # int64

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """In the order of `ops.sample_tokens`."""
        return self.temperature, self.top_k, self.top_p, self.min_p, self.seed, self.choice, self.position


@dataclass(frozen=True, slots=True, eq=False)
class StepTensors:
    """What `DecoderModel.forward` and sampling take, on the device; valid until the next but one `fill`."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    wanted: Tensor  # [W] int64
    sampling: SamplingTensors


@dataclass(frozen=True, slots=True, eq=False)
class _HostArrays:
    """The same parts as numpy arrays over a host buffer."""

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    wanted: NDArray[np.int64]
    ints: NDArray[np.int64]  # [4, S]: top_k, seed, choice, position
    top_p: NDArray[np.float64]
    floats: NDArray[np.float32]  # [2, S]: temperature, min_p


_Shape = tuple[int, int, int]  # T, W, S


class _HostBuffer:
    """One host buffer, its views of the last shape, and the end of its last copy."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._bytes: NDArray[np.uint8] = tensor.numpy()
        self._shape: _Shape | None = None
        self._arrays: _HostArrays | None = None
        self._copied: torch.cuda.Event | None = None

    def arrays(self, shape: _Shape) -> _HostArrays:
        """Views for this shape, made anew only where it changed; waits for the copy under way."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._arrays is None or self._shape != shape:
            self._arrays, self._shape = _host_arrays(self._bytes, *shape), shape
        return self._arrays

    def send(self, target: Tensor, num_bytes: int) -> None:
        """Start the copy of the leading bytes on the current stream."""
        if self._copied is None:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        target[:num_bytes].copy_(self.tensor[:num_bytes], non_blocking=True)
        self._copied.record()


class StepInputs:
    """Buffers for steps within `limits`; `fill` is called on one thread."""

    def __init__(self, limits: StepLimits, memory: StaticMemory) -> None:
        self.limits = limits
        size = (limits.num_bytes,)
        self._on_cpu = memory.device.type == "cpu"
        count = 1 if self._on_cpu else _NUM_HOST_BUFFERS
        self._hosts = [
            _HostBuffer(memory.on_host(f"step inputs, host {number}", size, torch.uint8)) for number in range(count)
        ]
        self._device = self._hosts[0].tensor
        if not self._on_cpu:
            self._device = memory.on_device("step inputs, device", size, torch.uint8)
        self._arange = np.arange(limits.max_rows + limits.max_tokens, dtype=np.int64)
        self._turn = 0
        self._shape: _Shape | None = None
        self._tensors: StepTensors | None = None
        self._sampled: tuple[int, Tensor] | None = None  # a step and its tokens
        # Tables of padded steps keep their full width, so that a captured step finds every row where it was.
        self._starts = np.zeros(limits.max_rows, np.int32)
        self._offsets = np.arange(limits.max_rows + 1, dtype=np.int32)
        self._tables = np.zeros((limits.max_rows, limits.table_width), np.int32)

    def fill(self, plan: StepPlan, rows: int = 0) -> StepTensors:
        """The plan's inputs on the device. With `rows`, a plan that only decodes is padded to so many rows.

        Padded rows feed token 0 at position 0 and want their state, which the caller drops. Raises IntegrityError for
        a plan beyond the limits, and for one that follows another step than that of the last `sampled`.
        """
        num_rows, padding = len(plan.starts), 0
        if rows:
            padding = rows - num_rows
        num_tokens = plan.num_tokens
        sampled = len(plan.sample_rows)
        wanted = sampled + padding + (0 if plan.scored is None else len(plan.scored.token_rows))
        self._check(plan, num_rows + padding, num_tokens + padding, wanted)
        shape = num_tokens + padding, wanted, sampled
        host = self._hosts[self._turn]
        self._turn = (self._turn + 1) % len(self._hosts)
        arrays = host.arrays(shape)
        self._write(arrays, plan, num_tokens, sampled, padding)
        if not self._on_cpu:
            if len(plan.sampling):  # a part of a plan is sampled elsewhere
                _write_sampling(arrays, plan.sampling)
            host.send(self._device, _used(*shape))
        if self._tensors is None or self._shape != shape:
            self._tensors, self._shape = _device_tensors(self._device, *shape), shape
        if plan.follows:
            _fetch(self._tensors.token_ids, self._tokens_before(plan))
        return self._tensors

    def sampled(self, step: int, tokens: Tensor) -> None:
        """The tokens [S] int64 that this step samples, on the device; the next may be planned before they are known."""
        self._sampled = step, tokens

    @property
    def columns(self) -> tuple[Tensor, ...] | None:
        """The last step's parameters of `ops.sample_tokens` on the device; None on the CPU, where nobody needs them."""
        return None if self._on_cpu or self._tensors is None else self._tensors.sampling.columns

    def padded_batch(self, plan: StepPlan, rows: int, scratch_block: int) -> RaggedBatch:
        """The plan's attention batch with `rows` rows of one token; padded ones live in `scratch_block` alone.

        Valid until the next call, since it is made of buffers that are kept.
        """
        used, width = plan.block_tables.shape
        self._starts[:used], self._starts[used:rows] = plan.starts, 0
        self._tables[:used, :width] = plan.block_tables
        self._tables[used:rows] = scratch_block
        return RaggedBatch(self._starts[:rows], self._offsets[: rows + 1], self._tables[:rows])

    def _check(self, plan: StepPlan, rows: int, tokens: int, wanted: int) -> None:
        limits = self.limits
        most = limits.max_rows + limits.max_tokens
        if rows > limits.max_rows or tokens > limits.max_tokens or wanted > most:
            raise IntegrityError(
                f"a step of {rows} rows and {tokens} tokens was planned; the runner holds {limits.max_rows} rows and "
                f"{limits.max_tokens} tokens"
            )
        if plan.block_tables.shape[1] > limits.table_width:
            raise IntegrityError(
                f"a block table is {plan.block_tables.shape[1]} wide; the runner holds {limits.table_width}"
            )

    def _tokens_before(self, plan: StepPlan) -> Tensor:
        if self._sampled is None or self._sampled[0] != plan.step - 1:
            raise IntegrityError(f"step {plan.step} follows {plan.step - 1}, whose tokens are not here")
        return self._sampled[1]

    def _write(self, arrays: _HostArrays, plan: StepPlan, tokens: int, sampled: int, padding: int) -> None:
        rows = len(plan.starts)
        arrays.token_ids[:tokens] = plan.token_ids
        if tokens == rows:  # every row has one token
            arrays.positions[:tokens] = plan.starts
        else:
            shift = np.repeat(plan.starts - plan.offsets[:-1], np.diff(plan.offsets))
            np.add(self._arange[:tokens], shift, out=arrays.positions[:tokens])
        if tokens == rows == sampled:
            arrays.wanted[:sampled] = self._arange[:sampled]
        else:
            np.subtract(plan.offsets[plan.sample_rows + 1], 1, out=arrays.wanted[:sampled], dtype=np.int64)
        if padding:
            arrays.token_ids[tokens:], arrays.positions[tokens:] = 0, 0
            arrays.wanted[sampled:] = self._arange[sampled : sampled + padding]
        elif plan.scored is not None:
            arrays.wanted[sampled:] = plan.scored.token_rows


def _fetch(token_ids: Tensor, before: Tensor) -> None:
    """Put the token that was sampled as the i-th of `before` where -1 - i stands; asynchronous on a GPU."""
    if len(before):
        places = -1 - token_ids
        torch.where(places >= 0, before[places.clamp_(min=0, max=len(before) - 1)], token_ids, out=token_ids)


def _used(tokens: int, wanted: int, sampled: int) -> int:
    """Bytes of a step of this shape."""
    return tokens * _PER_TOKEN + wanted * _WIDE + sampled * _PER_SAMPLED


def _cuts(tokens: int, wanted: int, sampled: int) -> tuple[int, ...]:
    """Where the parts begin: token ids, positions, wanted, ints, top_p, floats, and the end."""
    sizes = (tokens * _WIDE, tokens * _WIDE, wanted * _WIDE, 4 * sampled * _WIDE, sampled * _WIDE, 2 * 4 * sampled)
    return tuple(accumulate(sizes, initial=0))


def _host_arrays(data: NDArray[np.uint8], tokens: int, wanted: int, sampled: int) -> _HostArrays:
    ids, positions, want, ints, top_p, floats, end = _cuts(tokens, wanted, sampled)
    return _HostArrays(
        data[ids:positions].view(np.int64),
        data[positions:want].view(np.int64),
        data[want:ints].view(np.int64),
        data[ints:top_p].view(np.int64).reshape(4, sampled),
        data[top_p:floats].view(np.float64),
        data[floats:end].view(np.float32).reshape(2, sampled),
    )


def _device_tensors(data: Tensor, tokens: int, wanted: int, sampled: int) -> StepTensors:
    ids, positions, want, ints, top_p, floats, end = _cuts(tokens, wanted, sampled)
    top_k, seed, choice, position = data[ints:top_p].view(torch.int64).view(4, sampled).unbind()
    temperature, min_p = data[floats:end].view(torch.float32).view(2, sampled).unbind()
    mass = data[top_p:floats].view(torch.float64)
    return StepTensors(
        data[ids:positions].view(torch.int64),
        data[positions:want].view(torch.int64),
        data[want:ints].view(torch.int64),
        SamplingTensors(temperature, top_k, mass, min_p, seed, choice, position),
    )


def _write_sampling(arrays: _HostArrays, batch: SamplingBatch) -> None:
    ints, floats = arrays.ints, arrays.floats
    ints[0], ints[1], ints[2], ints[3] = batch.top_k, batch.seed.view(np.int64), batch.choice, batch.position
    arrays.top_p[:] = batch.top_p
    floats[0], floats[1] = batch.temperature, batch.min_p
