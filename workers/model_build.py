"""From settings to a model runner: which device, which dtype, which decoder, and how large its KV pool can be.

Called by the worker's assembly, once. Raises ModelError and ConfigError, naming file or key, before anything serves.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from penstock.workers.device import check_dtype, resolve_device
from penstock.workers.errors import ConfigError
from penstock.workers.expert_ranks import KEY, ExpertRanks, spread_experts
from penstock.workers.forward_pass import ModelShape
from penstock.workers.graphs.capture import CudaRecorder, Recorder
from penstock.workers.kv.layout import KVLayout
from penstock.workers.lora.bank import AdapterBank
from penstock.workers.model.checkpoint import Checkpoint
from penstock.workers.model.config import DTYPES, DecoderConfig, read_raw_config
from penstock.workers.model.foreign_config import ForeignConfig
from penstock.workers.model.implementation import choose_implementation
from penstock.workers.model.loading import ALONE, TORCH_DTYPES, load_decoder
from penstock.workers.model.port import DecoderModel
from penstock.workers.model.tensor_widths import require_tensor_width
from penstock.workers.model.weight_reader import Progress
from penstock.workers.parallel.collectives import Collectives
from penstock.workers.parallel.expert_parallel import ExpertParallel
from penstock.workers.parallel.shards import WHOLE, TensorShard
from penstock.workers.parallel.shared_prompts import MOST_SHARED
from penstock.workers.runner import ModelRunner, RunnerParts
from penstock.workers.settings import AdapterSettings, KVSettings, RunnerSettings, SchedulerSettings
from penstock.workers.step_inputs import StepLimits
from penstock.workers.weights.supply import WeightSupply

logger = logging.getLogger(__name__)


def build_model_runner(
    settings: RunnerSettings,
    kv: KVSettings,
    scheduler: SchedulerSettings,
    progress: Progress | None = None,
    group: Collectives = ALONE,
    expert_ranks: ExpertRanks | None = None,
    supply: WeightSupply | None = None,
    adapters: AdapterSettings | None = None,
) -> ModelRunner:
    """Read and load the model; `attach` the storage before the first step. Raises ModelError and ConfigError.

    A rank of a group loads its own part, and then runs the same plans as all others; rank 0's runner samples. `group`
    are the ranks that share one copy of the layers, `expert_ranks` those that share the experts. Without a `supply`
    everything is read from the model directory. `adapters`: make room for some.
    """
    begin = time.monotonic()
    device = resolve_device(settings.device)
    torch.set_num_threads(settings.threads)
    model_dir = Path(settings.model_dir)
    raw = read_raw_config(model_dir) if supply is None else supply.raw_config()
    chosen = choose_implementation(settings.model_impl, raw, str(model_dir / "config.json"))
    config = chosen.config
    dtype = resolve_dtype(settings.dtype, config.dtype)
    check_dtype(device, dtype)
    require_tensor_width(config, group.width)
    if scheduler.max_model_len > config.max_positions:
        raise ConfigError(
            f"max_model_len {scheduler.max_model_len} is above the model's {config.max_positions} positions "
            f"({chosen.length_key})",
            key="scheduler.max_model_len",
        )
    wanted = _Wanted(dtype, kv.block_size, scheduler.max_model_len, device, group, expert_ranks, supply)
    loaded = _load(model_dir, config, wanted, progress)
    bank = None if adapters is None else _adapter_bank(config, adapters, wanted)
    took = time.monotonic() - begin
    logger.info(
        "%s: loaded as %s on %s by %s (%s) in %.2f s", model_dir, dtype, device, loaded.code, chosen.reason, took
    )
    limits = step_limits(scheduler, kv.block_size)
    if expert_ranks is not None:  # a rank has two pieces of each prompt that all share
        limits = replace(limits, max_rows=limits.max_rows + MOST_SHARED)
    parts = RunnerParts(
        decoder=loaded.model,
        layout=loaded.layout,
        vocab_size=config.vocab_size,
        limits=limits,
        threads=settings.threads,
        device=device,
        shape=loaded.shape,
        # A recorded step would need all ranks to record it at the same time; those of a group run as they are.
        recorder=recorder_for(device, settings) if group.width == 1 and expert_ranks is None else None,
        graph_sizes=settings.graph_sizes,
        attention=None if expert_ranks is None else expert_ranks.attention,
        experts=loaded.experts,
        adapters=bank,
    )
    return ModelRunner(parts)


def _adapter_bank(
    config: DecoderConfig | ForeignConfig, settings: AdapterSettings, wanted: _Wanted
) -> AdapterBank | None:
    """Room for adapters, where they are served. Raises ConfigError where they cannot be."""
    if not settings.directory:
        return None
    if not isinstance(config, DecoderConfig) or wanted.expert_ranks is not None:
        raise ConfigError("adapters need one of our own decoders, and no expert or context ranks", "adapters.directory")
    dtype, shard = TORCH_DTYPES[wanted.dtype], TensorShard(wanted.group.rank, wanted.group.width)
    return AdapterBank(config, settings.max_loaded, settings.max_rank, dtype, wanted.device, shard)


def recorder_for(device: torch.device, settings: RunnerSettings) -> Recorder | None:
    """What records steps on this device; None where nothing does, or where that is switched off."""
    return CudaRecorder(device) if device.type == "cuda" and settings.graphs else None


def step_limits(scheduler: SchedulerSettings, block_size: int) -> StepLimits:
    """The largest step that this scheduler plans."""
    width = -(-scheduler.max_model_len // block_size)
    return StepLimits(scheduler.max_num_seqs, scheduler.max_num_batched_tokens, width)


@dataclass(frozen=True, slots=True)
class _Wanted:
    dtype: str
    block_size: int
    num_positions: int
    device: torch.device
    group: Collectives
    expert_ranks: ExpertRanks | None
    supply: WeightSupply | None


@dataclass(frozen=True, slots=True)
class _Loaded:
    model: DecoderModel
    layout: KVLayout
    code: str  # whose, for the log
    shape: ModelShape | None = None
    experts: ExpertParallel | None = None


def _load(
    model_dir: Path, config: DecoderConfig | ForeignConfig, wanted: _Wanted, progress: Progress | None
) -> _Loaded:
    if isinstance(config, DecoderConfig):
        checkpoint = Checkpoint(model_dir) if wanted.supply is None else wanted.supply.checkpoint()
        place, shard = (wanted.device, wanted.group), TensorShard(wanted.group.rank, wanted.group.width)
        experts = None
        if wanted.expert_ranks is not None:
            experts = spread_experts(config, checkpoint, TORCH_DTYPES[wanted.dtype], shard, wanted.expert_ranks)
        model = load_decoder(config, checkpoint, wanted.dtype, wanted.num_positions, progress, *place, experts)
        layout = model_layout(config, wanted.block_size, wanted.dtype, checkpoint.revision, shard)
        heads = len(shard.heads(config.num_heads))
        return _Loaded(model, layout, "our own decoder", ModelShape(heads, config.hidden_size), experts)
    if wanted.expert_ranks is not None:
        raise ConfigError(f"{config.architecture} runs by the transformers backend, which spreads no experts", KEY)
    if wanted.device.type != "cpu":
        raise ConfigError(
            f"{config.architecture} runs by the transformers backend, and that on the CPU only; device "
            f"{str(wanted.device)!r} needs one of our own decoders",
            key="runner.device",
        )
    # transformers takes seconds to import, which our own decoders do without.
    from penstock.workers.model.transformers_backend import load_transformers

    foreign, layout = load_transformers(model_dir, config, wanted.dtype, wanted.block_size, wanted.num_positions)
    return _Loaded(foreign, layout, "the transformers backend")


def resolve_dtype(wanted: str, stored: str) -> str:
    """`auto` means `stored`, the checkpoint's own. Raises ConfigError for unknown names."""
    if wanted == "auto":
        return stored
    if wanted not in DTYPES:
        raise ConfigError(f"dtype {wanted!r} is not one of auto, {', '.join(DTYPES)}", key="runner.dtype")
    return wanted


def model_layout(
    config: DecoderConfig, block_size: int, dtype: str, revision: str, shard: TensorShard = WHOLE
) -> KVLayout:
    """What one KV block of our own decoder holds, on one rank of a group; latent rows are whole on every rank."""
    if config.latent is not None:
        width = config.latent.stored_dim
        ranks = {"tensor_width": shard.width, "tensor_rank": shard.rank, "total_kv_heads": 1}
        return KVLayout(config.num_layers, 1, width, block_size, dtype, revision, parts=1, **ranks)
    return KVLayout(
        config.num_layers,
        len(shard.kv_heads(config.num_kv_heads)),
        config.head_dim,
        block_size,
        dtype,
        revision,
        tensor_width=shard.width,
        tensor_rank=shard.rank,
        total_kv_heads=config.num_kv_heads,
    )
