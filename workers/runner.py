"""Turns a `StepPlan` into tensors, runs the decoder over the KV storage, and samples: the `Runner` of a real model.

Made by `model_build.py`, which reads the model and knows the KV layout, so that the storage can be sized; `attach`
hands the storage over; then the engine thread alone calls the rest. A step is `launch` and `collect`: on a GPU the
first returns while the device still computes, so the caller can plan meanwhile. The same code serves a CPU, where
`launch` does all the work. It does not know requests, the scheduler, or who owns a block.

A rank of a group runs the same plans as all others; rank 0 alone samples, and the others' results are empty. Where
ranks attend for sequences of their own, each runs its part of the plan, and the states of all come to rank 0.
Invariants: between steps nothing of a sequence lives here but in the KV blocks; steps are collected in the order in
which they were launched, and at most two are on their way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.workers.errors import ConfigError, DeviceError, IntegrityError
from penstock.workers.forward_pass import (
    ForwardPass,
    ModelShape,
    RecordedPass,
    attention_limits,
    kv_view,
    recorded_hidden,
)
from penstock.workers.graphs.buckets import BucketTable
from penstock.workers.graphs.capture import Recorder
from penstock.workers.graphs.decode_graphs import DecodeGraphs
from penstock.workers.graphs.store import LiveGraphStore
from penstock.workers.graphs.traffic import BucketFigures, BucketTraffic
from penstock.workers.kv.layout import KVLayout
from penstock.workers.lora.bank import AdapterBank
from penstock.workers.model.loading import CPU
from penstock.workers.model.port import DecoderModel
from penstock.workers.parallel.collectives import Collectives
from penstock.workers.parallel.rank_states import RankStates
from penstock.workers.parallel.shared_prompts import Banks
from penstock.workers.sampling import draw, logprobs_of
from penstock.workers.scheduler.plan import SampledLogprobs, ScoredPrompt, StepPlan, StepResult
from penstock.workers.static_memory import StaticMemory
from penstock.workers.step_inputs import StepInputs, StepLimits
from penstock.workers.step_outputs import PendingTokens, StepOutputs
from penstock.workers.token_logprobs import pieces, reduce_logits

_NO_TOKENS = np.zeros(0, np.int32)


class HostStorage(Protocol):
    """KV blocks in host memory."""

    @property
    def data(self) -> NDArray[np.uint8]:
        """[num_blocks, block_bytes], writable."""
        ...


@runtime_checkable
class DeviceStorage(Protocol):
    """KV blocks in a device's memory."""

    @property
    def tensor(self) -> Tensor:
        """uint8 [num_blocks + 1, block_bytes]; the last block belongs to nobody."""
        ...


class StepExperts(Protocol):
    """Experts that several ranks share (`parallel/expert_parallel.py`): they hear where steps begin and end."""

    def begin_step(self, sequence: int) -> None:
        """The step of this number begins on every rank."""
        ...

    def end_step(self) -> None:
        """All its layers are done."""
        ...


class StartKeeper(Protocol):
    """Where the traffic of recorded steps comes from at start, and goes while the worker idles."""

    @property
    def figures(self) -> dict[int, BucketFigures]:
        """Of a former life; empty where there was none."""
        ...

    def keep(self, figures: dict[int, BucketFigures]) -> None:
        """Keep these for the next start; may be called often."""
        ...


BlockStorage = HostStorage | DeviceStorage


@dataclass(frozen=True, slots=True)
class RunnerParts:
    """A loaded model and where it runs."""

    decoder: DecoderModel
    layout: KVLayout
    vocab_size: int
    limits: StepLimits
    threads: int = 1
    device: torch.device = CPU
    shape: ModelShape | None = None  # None: steps are never recorded
    recorder: Recorder | None = None  # likewise
    graph_sizes: tuple[int, ...] = ()
    attention: Collectives | None = (
        None  # the ranks that attend for sequences of their own; None: this one does for all
    )
    experts: StepExperts | None = None
    adapters: AdapterBank | None = None  # None: no request has one


@dataclass(frozen=True, slots=True, eq=False)
class Launched:
    """A step on its way; `result` lacks the tokens while they are `pending`."""

    result: StepResult
    pending: PendingTokens | None
    began: float
    bucket: int | None  # of a step that could be replayed
    replayed: bool


class ModelRunner:
    """One decoder on one device, with `threads` threads for what the CPU computes."""

    def __init__(self, parts: RunnerParts) -> None:
        self._parts = parts
        self._decoder = parts.decoder
        self._thread_id: int | None = None
        self._collected_at = 0.0
        self._pass: ForwardPass | None = None
        self._graphs: DecodeGraphs | None = None
        self._keeper: StartKeeper | None = None
        self._states: RankStates | None = None
        self._buckets = BucketTable.of(parts.graph_sizes, min(parts.limits.max_rows, parts.limits.max_tokens))
        # The order of what follows is the static layout: a new buffer goes to the end.
        self.memory = StaticMemory(parts.device)
        self._inputs = StepInputs(parts.limits, self.memory)
        self._outputs = StepOutputs(parts.limits.max_rows, self.memory) if parts.device.type == "cuda" else None
        self._hidden: Tensor | None = None
        if parts.recorder is not None and parts.shape is not None:
            self._hidden = recorded_hidden(self.memory, self._buckets.largest, parts.shape, parts.layout.dtype)
        self.memory.finish()

    @property
    def layout(self) -> KVLayout:
        """What one KV block of this model holds."""
        return self._parts.layout

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._parts.vocab_size

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where the KV storage has to be."""
        return self._parts.device

    @property
    def limits(self) -> StepLimits:
        """The largest step that `launch` takes."""
        return self._parts.limits

    @property
    def states(self) -> RankStates | None:
        """What this rank shares with others that attend for sequences of their own; None where it does for all."""
        return self._states

    @property
    def experts(self) -> StepExperts | None:
        """Shared with other ranks; None where this one has all it needs."""
        return self._parts.experts

    @property
    def adapters(self) -> AdapterBank | None:
        """Room for adapters; None where no request has one."""
        return self._parts.adapters

    @property
    def graphs(self) -> DecodeGraphs | None:
        """Recorded decode steps; None where they are not in use."""
        return self._graphs

    def attach(self, storage: BlockStorage, keeper: StartKeeper | None = None) -> None:
        """Take the storage whose blocks every later step reads and writes. Raises ConfigError if its size is wrong.

        `keeper` has the traffic of a former life of this worker, and takes this one's.
        """
        self._keeper = keeper
        data = storage.tensor if isinstance(storage, DeviceStorage) else storage.data
        kv = kv_view(data, self.layout)
        if kv.device != self.device:
            raise ConfigError(f"the KV storage is on {kv.device} and the weights are on {self.device}")
        parts, limits = self._parts, None
        if parts.shape is not None:
            limits = attention_limits(self.limits, self.layout.block_size, parts.shape)
        if limits is None or parts.recorder is None or self._hidden is None or isinstance(data, np.ndarray):
            self._pass = ForwardPass(self._decoder, kv, limits if kv.is_cuda else None, parts.adapters)
            return
        self._pass = recorded = RecordedPass(self._decoder, kv, self._hidden, limits, parts.adapters)
        self._graphs = DecodeGraphs(
            recorded,
            self._inputs,
            self._buckets,
            LiveGraphStore(parts.recorder),
            BucketTraffic(keeper.figures if keeper is not None else None),
            scratch_block=len(data) - 1,
            clock=time.perf_counter,
            sync=self._sync,
        )

    def use_banks(self, banks: Banks) -> None:
        """What the storages hold of a group whose ranks attend for sequences of their own; before the first step."""
        if self._parts.attention is not None:
            self._states = RankStates(self._parts.attention, banks, self.layout.block_size)

    def recorded_share(self, activations: int) -> int:
        """Of `activations` bytes of the largest step, what recorded steps need beside it."""
        if self._hidden is None:
            return 0
        return activations * self._buckets.largest // max(1, self.limits.max_tokens)

    def detach(self) -> None:
        """Let go of the storage; `attach` must come before the next step."""
        self._pass, self._graphs = None, None

    def run(self, plan: StepPlan) -> StepResult:
        """See `Runner.run`."""
        return self.collect(self.launch(plan))

    def start(self, plan: StepPlan) -> Callable[[], StepResult]:
        """See `StartStep`; worth it where the device is not the CPU."""
        return functools.partial(self.collect, self.launch(plan))

    def launch(self, plan: StepPlan) -> Launched:
        """Start a step; what it reads of the plan is taken before this returns.

        Returns before the device is done where it can. Raises DeviceError where the device is gone.
        """
        if self._pass is None:
            raise ConfigError("the model runner has no KV storage; call attach first")
        self._use_threads()
        began = time.perf_counter()
        with _device_errors(), torch.inference_mode():
            if self._parts.attention is not None:
                return self._launch_part(self._pass, plan, began)
            if len(plan.copies):
                self._pass.copy_blocks(plan.copies)
            if plan.num_tokens == 0:
                return Launched(StepResult(_NO_TOKENS), None, began, None, replayed=False)
            bucket, hidden = None, None
            if self._graphs is not None:
                bucket = self._graphs.bucket_of(plan)
                hidden = self._graphs.replay(plan, bucket)
            replayed = hidden is not None
            if hidden is None:
                hidden = self._pass.eager(plan, self._inputs.fill(plan))
            return self._sample(plan, hidden, Launched(StepResult(_NO_TOKENS), None, began, bucket, replayed))

    def _launch_part(self, forward: ForwardPass, plan: StepPlan, began: float) -> Launched:
        """The same for a rank that attends for sequences of its own, perhaps for none of this plan."""
        states, experts = self._states, self._parts.experts
        if states is None:
            raise ConfigError("the model runner does not know its banks; call use_banks first")
        launched = Launched(StepResult(_NO_TOKENS), None, began, None, replayed=False)
        cut = states.cut(plan)
        own = states.part(cut)
        if len(own.copies):
            forward.copy_blocks(own.copies)
        if plan.num_tokens == 0:
            return launched
        if experts is not None:
            experts.begin_step(plan.step)
        exchange = states.exchange(cut, self.device)
        if exchange is not None:
            exchange.bring_beginnings(forward.kv)
        hidden = states.gather(cut, forward.eager(own, self._inputs.fill(own), exchange))
        if experts is not None:
            experts.end_step()
        return self._sample(plan, hidden, launched) if states.samples else launched

    def collect(self, launched: Launched) -> StepResult:
        """Wait for a step. Raises DeviceError where the device is gone."""
        with _device_errors(), torch.inference_mode():
            result = launched.result
            if launched.pending is not None:
                result = dataclasses.replace(result, token_ids=launched.pending.take())
            if launched.bucket is not None and self._graphs is not None:
                # Until the step before was done the device had that one.
                seconds = time.perf_counter() - max(launched.began, self._collected_at)
                self._graphs.saw(launched.bucket, seconds, replayed=launched.replayed)
            self._collected_at = time.perf_counter()
            return result

    def use_idle_time(self) -> bool:
        """Do one piece of work that makes later steps faster; False where there is none. No step may be on its way."""
        if self._graphs is None:
            return False
        self._use_threads()
        with _device_errors(), torch.inference_mode():
            if self._graphs.use_idle_time():
                return True
        if self._keeper is not None:
            self._keeper.keep(self._graphs.traffic.figures)
        return False

    def _sample(self, plan: StepPlan, hidden: Tensor, step: Launched) -> Launched:
        """Hidden states [S + M, E] become tokens, and whatever else the plan asks for; on rank 0 only."""
        sampled = len(plan.sample_rows)
        logits = self._decoder.logits(hidden[:sampled])
        if logits is None:
            self._help_score(hidden[sampled:])
            return step
        # What lies on the device already is for the rows of this rank's part.
        columns = self._inputs.columns if self._parts.attention is None else None
        tokens = draw(logits, plan.sampling, columns)
        self._inputs.sampled(plan.step, tokens)
        pending, token_ids = None, _NO_TOKENS
        if self._outputs is not None:
            pending = self._outputs.send(tokens)
        else:
            token_ids = tokens.numpy().astype(np.int32)
        result = StepResult(token_ids, logprobs_of(logits, tokens, plan.sampling))
        if plan.scored is not None:
            result = dataclasses.replace(result, scored=self._score(hidden[sampled:], plan.scored))
        if len(plan.embed_rows):
            rows = torch.from_numpy(plan.embed_rows.astype(np.int64)).to(hidden.device)
            result = dataclasses.replace(result, embeddings=hidden[rows].float().cpu().numpy())
        return dataclasses.replace(step, result=result, pending=pending)

    def _score(self, hidden: Tensor, scored: ScoredPrompt) -> SampledLogprobs:
        """Logprobs of M prompt tokens from hidden states [M, E]; their logits exist a few rows at a time only."""

        def logits_of(begin: int, end: int) -> Tensor:
            logits = self._decoder.logits(hidden[begin:end])
            if logits is None:
                raise IntegrityError("a rank that does not sample was to score")
            return logits

        return reduce_logits(logits_of, self.vocab_size, scored.targets, scored.alternatives)

    def _help_score(self, hidden: Tensor) -> None:
        """The other ranks' side of `_score`: their columns of the same logits in the same pieces."""
        for begin, end in pieces(len(hidden), self.vocab_size):
            self._decoder.logits(hidden[begin:end])

    def _sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _use_threads(self) -> None:
        """The number of threads and the device belong to the calling thread, so they are set where the work happens."""
        if self._thread_id != threading.get_ident():
            torch.set_num_threads(self._parts.threads)
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            self._thread_id = threading.get_ident()


@contextlib.contextmanager
def _device_errors() -> Iterator[None]:
    """What a GPU reports once and then for every later call: no step can be computed in this process any more."""
    try:
        yield
    except torch.AcceleratorError as error:
        raise DeviceError(f"the device failed: {error}") from error
