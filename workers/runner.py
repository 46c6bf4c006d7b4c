"""Turns a `StepPlan` into tensors, runs the decoder over the KV storage, and samples: the `Runner` of a real model.

Built by the worker's assembly: `build_model_runner` reads the model and knows the KV layout, so that the storage can be
sized; `attach` hands the storage over; then the engine thread alone calls `run`. It does not know requests, the
scheduler, or who owns a block. Invariant: between `run` calls nothing of a sequence lives here but in the KV blocks.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.ragged import RaggedBatch
from penstock.workers.errors import ConfigError
from penstock.workers.kv.layout import KVLayout
from penstock.workers.model.checkpoint import Checkpoint
from penstock.workers.model.config import DTYPES, DecoderConfig, read_raw_config
from penstock.workers.model.implementation import choose_implementation
from penstock.workers.model.loading import TORCH_DTYPES, Progress, load_decoder
from penstock.workers.model.port import DecoderModel
from penstock.workers.sampling import sample
from penstock.workers.scheduler.plan import SampledLogprobs, ScoredPrompt, StepPlan, StepResult
from penstock.workers.settings import KVSettings, RunnerSettings, SchedulerSettings
from penstock.workers.token_logprobs import reduce_logits

logger = logging.getLogger(__name__)


class BlockStorage(Protocol):
    """What the runner needs of the KV storage."""

    @property
    def data(self) -> NDArray[np.uint8]:
        """[num_blocks, block_bytes], writable."""
        ...


class ModelRunner:
    """One decoder on one device with `threads` threads for its products."""

    def __init__(self, decoder: DecoderModel, layout: KVLayout, vocab_size: int, threads: int) -> None:
        self._decoder = decoder
        self._layout = layout
        self._vocab_size = vocab_size
        self._threads = threads
        self._thread_id: int | None = None
        self._kv: Tensor | None = None

    @property
    def layout(self) -> KVLayout:
        """What one KV block of this model holds."""
        return self._layout

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._vocab_size

    def attach(self, storage: BlockStorage) -> None:
        """Take the storage whose blocks every later `run` reads and writes. Raises ConfigError if its size is wrong."""
        self._kv = kv_view(storage.data, self._layout)

    def run(self, plan: StepPlan) -> StepResult:
        """See `Runner.run`."""
        if self._kv is None:
            raise ConfigError("the model runner has no KV storage; call attach first")
        self._use_threads()
        with torch.inference_mode():
            if len(plan.copies):
                ops.copy_blocks(self._kv, torch.from_numpy(plan.copies.astype(np.int64)))
            if plan.num_tokens == 0:
                return StepResult(np.zeros(0, np.int32))
            hidden = self._forward(plan, self._kv)
            sampled = len(plan.sample_rows)
            result = sample(self._decoder.logits(hidden[:sampled]), plan.sampling)
            if plan.scored is not None:
                result = dataclasses.replace(result, scored=self._score(hidden[sampled:], plan.scored))
            if len(plan.embed_rows):
                states = hidden[torch.from_numpy(plan.embed_rows.astype(np.int64))]
                result = dataclasses.replace(result, embeddings=states.float().numpy())
            return result

    def _score(self, hidden: Tensor, scored: ScoredPrompt) -> SampledLogprobs:
        """Logprobs of M prompt tokens from hidden states [M, E]; their logits exist a few rows at a time only."""
        return reduce_logits(
            lambda begin, end: self._decoder.logits(hidden[begin:end]),
            self._vocab_size,
            scored.targets,
            scored.alternatives,
        )

    def _forward(self, plan: StepPlan, kv: Tensor) -> Tensor:
        """Hidden states [S + M, E]: of the tokens whose successors are sampled, then of those that score the next."""
        counts = np.diff(plan.offsets)
        positions = np.arange(plan.num_tokens) + np.repeat(plan.starts - plan.offsets[:-1], counts)
        wanted = plan.offsets[plan.sample_rows + 1].astype(np.int64) - 1
        if plan.scored is not None:
            wanted = np.concatenate((wanted, plan.scored.token_rows))
        batch = RaggedBatch(plan.starts, plan.offsets, plan.block_tables)
        return self._decoder.forward(
            torch.from_numpy(plan.token_ids.astype(np.int64)),
            torch.from_numpy(positions.astype(np.int64)),
            kv,
            ops.plan_attention(kv, batch),
            torch.from_numpy(wanted),
        )

    def _use_threads(self) -> None:
        """The number of threads belongs to the calling thread in OpenMP, so it is set where the work happens."""
        if self._thread_id != threading.get_ident():
            torch.set_num_threads(self._threads)
            self._thread_id = threading.get_ident()


def kv_view(data: NDArray[np.uint8], layout: KVLayout) -> Tensor:
    """The storage as a tensor [block, layer, key or value, kv head, slot, dim]; shares its memory."""
    if data.ndim != 2 or data.shape[1] != layout.block_bytes:
        raise ConfigError(f"KV storage of shape {data.shape} does not hold blocks of {layout.block_bytes} bytes")
    flat = torch.from_numpy(data).view(TORCH_DTYPES[layout.dtype])
    return flat.view(len(data), layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)


def build_model_runner(
    settings: RunnerSettings, kv: KVSettings, scheduler: SchedulerSettings, progress: Progress | None = None
) -> ModelRunner:
    """Read and load the model; `attach` the storage before the first `run`. Raises ModelError and ConfigError."""
    if settings.device != "cpu":
        raise ConfigError(f"device {settings.device!r} is not supported; supported is cpu", key="runner.device")
    begin = time.monotonic()
    torch.set_num_threads(settings.threads)
    model_dir = Path(settings.model_dir)
    chosen = choose_implementation(settings.model_impl, read_raw_config(model_dir), str(model_dir / "config.json"))
    config = chosen.config
    dtype = resolve_dtype(settings.dtype, config.dtype)
    if scheduler.max_model_len > config.max_positions:
        raise ConfigError(
            f"max_model_len {scheduler.max_model_len} is above the model's {config.max_positions} positions "
            f"({chosen.length_key})",
            key="scheduler.max_model_len",
        )
    model: DecoderModel
    if isinstance(config, DecoderConfig):
        code, checkpoint = "our own decoder", Checkpoint(model_dir)
        model = load_decoder(config, checkpoint, dtype, scheduler.max_model_len, progress)
        layout = model_layout(config, kv.block_size, dtype, checkpoint.revision)
    else:
        # transformers takes seconds to import, which our own decoders do without.
        from penstock.workers.model.transformers_backend import load_transformers

        code = "the transformers backend"
        model, layout = load_transformers(model_dir, config, dtype, kv.block_size, scheduler.max_model_len)
    took = time.monotonic() - begin
    logger.info("%s: loaded as %s by %s (%s) in %.2f s", model_dir, dtype, code, chosen.reason, took)
    return ModelRunner(model, layout, config.vocab_size, settings.threads)


def resolve_dtype(wanted: str, stored: str) -> str:
    """`auto` means `stored`, the checkpoint's own. Raises ConfigError for unknown names."""
    if wanted == "auto":
        return stored
    if wanted not in DTYPES:
        raise ConfigError(f"dtype {wanted!r} is not one of auto, {', '.join(DTYPES)}", key="runner.dtype")
    return wanted


def model_layout(config: DecoderConfig, block_size: int, dtype: str, revision: str) -> KVLayout:
    """What one KV block of our own decoder holds."""
    return KVLayout(config.num_layers, config.num_kv_heads, config.head_dim, block_size, dtype, revision)
