"""The shapes that are timed: three decoders' layers, and the workloads that serving gives them; and toy twins of all.

Numbers are those of the models' public configurations. Knows no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelShape:
    """One decoder layer: `width` is that of the feed-forward block, or of one expert where there are experts."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    dim: int
    width: int
    vocab: int
    experts: int = 0
    chosen: int = 0


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Attention over one stored row per token, of which `value` numbers are the value."""

    name: str
    heads: int
    stored: int
    value: int


@dataclass(frozen=True, slots=True)
class Workload:
    """A ragged batch: `rows` sequences of `stored` and `new` tokens each, `shared` of the stored in common."""

    name: str
    rows: int
    stored: int
    new: int
    shared: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that one call of the benchmark times."""

    models: tuple[ModelShape, ...]
    decodes: tuple[Workload, ...]
    prefills: tuple[Workload, ...]
    shared: tuple[Workload, ...]
    gemm_tokens: tuple[int, ...]
    moe_tokens: tuple[int, ...]
    lora: tuple[tuple[int, int, int], ...]  # tokens, adapters, rank
    tokens: tuple[int, ...]  # of norms, rotations, activations
    sampled_rows: tuple[int, ...]
    slots: int
    latents: tuple[LatentShape, ...]


QWEN3_06B = ModelShape("0.6B", 1024, 16, 8, 128, 3072, 151_936)
QWEN3_8B = ModelShape("8B", 4096, 32, 8, 128, 12_288, 151_936)
QWEN3_30B_A3B = ModelShape("30B-A3B", 2048, 32, 4, 128, 768, 151_936, 128, 8)

REAL = Plan(
    models=(QWEN3_06B, QWEN3_8B, QWEN3_30B_A3B),
    decodes=(
        Workload("64x8K", 64, 8191, 1),
        Workload("128x4K", 128, 4095, 1),
        Workload("32x1K", 32, 1023, 1),
    ),
    prefills=tuple(Workload(f"{size >> 10}K", 1, 0, size) for size in (2048, 4096, 8192, 16_384)),
    shared=(Workload("16Kx256", 256, 16_384 + 127, 1, shared=16_384),),
    gemm_tokens=(1, 16, 64, 256, 1024, 4096),
    moe_tokens=(1, 32, 128, 512, 4096, 16_384),
    lora=((32, 32, 16), (256, 8, 16), (2048, 4, 64)),
    tokens=(1, 64, 4096),
    sampled_rows=(1, 64, 256),
    slots=16,
    latents=(LatentShape("V2-Lite", 16, 576, 512), LatentShape("V3", 128, 576, 512)),
)

TOY = Plan(
    models=(
        ModelShape("toy", 128, 8, 2, 16, 128, 300),
        ModelShape("toy-moe", 128, 8, 1, 16, 32, 300, 8, 2),
    ),
    decodes=(Workload("3x40", 3, 39, 1),),
    prefills=(Workload("33", 1, 0, 33),),
    shared=(Workload("32x4", 4, 32 + 7, 1, shared=32),),
    gemm_tokens=(17,),
    moe_tokens=(9,),
    lora=((5, 3, 4),),
    tokens=(3,),
    sampled_rows=(2,),
    slots=4,
    latents=(LatentShape("toy", 6, 40, 32),),
)


def projections(model: ModelShape) -> dict[str, tuple[int, int]]:
    """The dense products of a layer: name -> (outputs, inputs). Without the feed-forward block where it has experts."""
    found = {
        "qkv": ((model.heads + 2 * model.kv_heads) * model.dim, model.hidden),
        "o": (model.hidden, model.heads * model.dim),
    }
    if not model.experts:
        found |= {"gate_up": (2 * model.width, model.hidden), "down": (model.hidden, model.width)}
    return found
