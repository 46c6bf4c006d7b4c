"""One decoder over one KV storage: attention plans in memory that stays, and the forward pass that reads them.

Made by `runner.py` when it gets its storage; `graphs/` records its steps. It does not know sequences, sampling, or
whether a step is recorded. Legend: B blocks, L layers, C = 2 (key, value), H kv heads, P slots of a block, D head dim,
E hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.ragged import AttentionLimits, AttentionPlan, AttentionWorkspace, RaggedBatch
from penstock.workers.errors import ConfigError
from penstock.workers.kv.layout import KVLayout
from penstock.workers.lora.bank import AdapterBank, StepAdapters
from penstock.workers.model.loading import TORCH_DTYPES
from penstock.workers.model.port import DecoderModel, KVExchange
from penstock.workers.scheduler.plan import StepPlan
from penstock.workers.static_memory import StaticMemory
from penstock.workers.step_inputs import StepLimits, StepTensors


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What planning and recording steps needs to know of a model, beside its KV layout."""

    query_heads: int
    hidden_size: int


class ForwardPass:
    """`decoder` over the blocks of `kv_BLCHPD`."""

    def __init__(
        self,
        decoder: DecoderModel,
        kv_BLCHPD: Tensor,  # noqa: N803 - the legend's name
        limits: AttentionLimits | None = None,
        adapters: AdapterBank | None = None,
    ) -> None:
        """`limits` of the largest step: plans are made in memory that stays. None: in memory of their own."""
        self.kv = kv_BLCHPD
        self._adapters = adapters
        self._decoder = decoder
        self._workspace = None if limits is None else ops.attention_workspace(kv_BLCHPD, limits)

    def forward(
        self,
        inputs: StepTensors,
        plan: AttentionPlan,
        exchange: KVExchange | None = None,
        adapters: StepAdapters | None = None,
    ) -> Tensor:
        """Hidden states [W, E] of the wanted tokens; writes every token's KV."""
        tokens = inputs.token_ids, inputs.positions
        return self._decoder.forward(*tokens, self.kv, plan, inputs.wanted, exchange, adapters)

    def eager(self, plan: StepPlan, inputs: StepTensors, exchange: KVExchange | None = None) -> Tensor:
        """The same for a scheduler's plan."""
        batch = RaggedBatch(plan.starts, plan.offsets, plan.block_tables)
        adapters = None if self._adapters is None else self._adapters.step(plan)
        return self.forward(inputs, ops.plan_attention(self.kv, batch, self._workspace), exchange, adapters)

    def copy_blocks(self, pairs: NDArray[np.int32]) -> None:
        """Copy whole blocks, pairs [n, 2] of (source, target)."""
        ops.copy_blocks(self.kv, torch.from_numpy(pairs.astype(np.int64)).to(self.kv.device))


class RecordedPass(ForwardPass):
    """The same with what recorded steps need: see `graphs.decode_graphs.DecodeStep`."""

    def __init__(
        self,
        decoder: DecoderModel,
        kv_BLCHPD: Tensor,  # noqa: N803 - the legend's name
        hidden: Tensor,
        limits: AttentionLimits,
        adapters: AdapterBank | None = None,
    ) -> None:
        """`hidden` [largest bucket, E] is where recorded steps leave their hidden states; none of them has adapters."""
        super().__init__(decoder, kv_BLCHPD, limits if kv_BLCHPD.is_cuda else None, adapters)
        self.hidden = hidden
        self._limits = limits
        self._workspaces: dict[int, AttentionWorkspace] = {}

    def plan(self, bucket: int, batch: RaggedBatch) -> AttentionPlan:
        """See `DecodeStep.plan`. A bucket's memory is taken when it is first recorded."""
        workspace = self._workspaces.get(bucket)
        if workspace is None:
            limits = replace(self._limits, max_rows=bucket, max_tokens=bucket, padded=True)
            workspace = self._workspaces[bucket] = ops.attention_workspace(self.kv, limits)
        return ops.plan_attention(self.kv, batch, workspace)


def attention_limits(limits: StepLimits, block_size: int, shape: ModelShape) -> AttentionLimits:
    """Of the largest step."""
    length = limits.table_width * block_size
    return AttentionLimits(limits.max_rows, limits.max_tokens, length, shape.query_heads)


def recorded_hidden(memory: StaticMemory, rows: int, shape: ModelShape, dtype: str) -> Tensor:
    """Where recorded steps of at most `rows` rows leave their hidden states, [rows, E]."""
    return memory.on_device("recorded hidden states", (rows, shape.hidden_size), TORCH_DTYPES[dtype])


def kv_view(data: NDArray[np.uint8] | Tensor, layout: KVLayout) -> Tensor:
    """The storage as a tensor [block, layer, part, kv head, slot, dim]; shares its memory."""
    if data.ndim != 2 or data.shape[1] != layout.block_bytes:
        raise ConfigError(f"KV storage of shape {tuple(data.shape)} does not hold blocks of {layout.block_bytes} bytes")
    flat = (data if isinstance(data, Tensor) else torch.from_numpy(data)).view(TORCH_DTYPES[layout.dtype])
    shape = layout.parts, layout.num_kv_heads, layout.block_size, layout.head_dim
    return flat.view(len(data), layout.num_layers, *shape)
