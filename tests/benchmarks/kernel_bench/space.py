"""What the tuner may choose for each kernel: the values of every number, and which combinations make sense at a shape.

After Zheng et al. 2020 ("Ansor") reduced to tables of values and constraint functions. Numbers have the names of the
kernels' compile-time arguments, so a configuration can be laid over an ahead-of-time case and compiled with no GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Config = dict[str, int]
Key = Mapping[str, int]
Constraint = Callable[[Config, Key], bool]

SHARED_BYTES = 227 << 10
# Float32 accumulators a thread; more do not stay in registers beside the operands.
MOST_ACCUMULATORS = 128
PROCESSORS = 132  # of an H100; on other cards the model learns the difference


@dataclass(frozen=True, slots=True)
class Space:
    """The choices of one kernel. `cases` are ahead-of-time cases that a configuration is laid over to be compiled."""

    kernel: str
    values: Mapping[str, tuple[int, ...]]
    constraints: tuple[Constraint, ...] = ()
    cases: tuple[str, ...] = ()
    match: tuple[str, ...] = ()
    features: Callable[[Config, Key], tuple[float, ...]] = lambda config, key: ()

    def configs(self, key: Key) -> list[Config]:
        """Every combination that the constraints admit at this shape, in one order."""
        names = list(self.values)
        every = (dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*self.values.values()))
        return [config for config in every if self.admits(config, key)]

    def admits(self, config: Config, key: Key) -> bool:
        """Whether all constraints hold."""
        return all(constraint(config, key) for constraint in self.constraints)


def shared_bytes(x_bytes: float, w_bytes: float) -> Constraint:
    """The operands' tiles of all stages fit into shared memory."""

    def fits(config: Config, key: Key) -> bool:
        depth = config.get("BLOCK_K", 128)
        tiles = (config["BLOCK_T"] * x_bytes + config["BLOCK_M"] * w_bytes) * depth
        return tiles * config["num_stages"] <= SHARED_BYTES

    return fits


def accumulators(config: Config, key: Key) -> bool:
    """The output tile fits the registers of its threads."""
    return config["BLOCK_T"] * config["BLOCK_M"] <= MOST_ACCUMULATORS * 32 * config["num_warps"]


def tile_suits_tokens(config: Config, key: Key) -> bool:
    """No tile is more than twice as high as the tokens it is for."""
    return config["BLOCK_T"] <= max(16, 2 * key["T"])


def splits_suit(config: Config, key: Key) -> bool:
    """K is only split where tokens are few, and each split has two chunks at least."""
    if config["SPLIT_K"] == 1:
        return True
    return key["T"] <= 128 and key["K"] >= 2 * config["SPLIT_K"] * config.get("BLOCK_K", 128)


def vendor_is_one_choice(config: Config, key: Key) -> bool:
    """With the vendor's product the other numbers are idle: one combination stands for all."""
    if not config.get("vendor", 0):
        return True
    idle = {"BLOCK_T": 16, "BLOCK_M": 64, "BLOCK_K": 64, "GROUP_T": 8, "SPLIT_K": 1, "num_warps": 4, "num_stages": 3}
    return all(config[name] == value for name, value in idle.items() if name in config)


def gemm_features(config: Config, key: Key) -> tuple[float, ...]:
    """What a product's time hangs on beside its numbers: waves over the card, their last one's share, traffic."""
    depth = config.get("BLOCK_K", 128)
    tiles = -(-key["T"] // config["BLOCK_T"]) * -(-key["M"] // config["BLOCK_M"]) * config.get("SPLIT_K", 1)
    shared = (config["BLOCK_T"] + config["BLOCK_M"]) * depth * 2 * config["num_stages"]
    resident = max(1, min(4, SHARED_BYTES // shared))
    waves = tiles / (PROCESSORS * resident)
    work = config["BLOCK_T"] * config["BLOCK_M"] / config.get("SPLIT_K", 1)
    traffic = (config["BLOCK_T"] + config["BLOCK_M"]) / config.get("SPLIT_K", 1)
    return (
        math.log2(math.ceil(waves)),
        math.log2(math.ceil(waves) / waves),
        math.log2(resident),
        math.log2(math.ceil(waves) * resident * work),
        math.log2(math.ceil(waves) * resident * traffic),
        math.log2(shared),
        float(config.get("vendor", 0)),
    )


GEMM_VALUES = {
    "BLOCK_T": (16, 32, 64, 128, 256),
    "BLOCK_M": (64, 128, 256),
    "BLOCK_K": (64, 128),
    "GROUP_T": (1, 8),
    "SPLIT_K": (1, 2, 4, 8, 16),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
}
_GEMM = (accumulators, tile_suits_tokens, splits_suit)


def _gemm(kernel: str, case: str, x_bytes: float, w_bytes: float, **other: tuple[int, ...]) -> Space:
    values = {name: choices for name, choices in {**GEMM_VALUES, **other}.items() if choices}
    constraints = (*_GEMM, shared_bytes(x_bytes, w_bytes), vendor_is_one_choice)
    return Space(kernel, values, constraints, (case,), features=gemm_features)


SPACES = {
    space.kernel: space
    for space in (
        _gemm("linear", "linear/bf16-t16-split1", 2, 2, vendor=(0, 1)),
        _gemm("gemm_fp8_tensor", "quantized_linear/fp8-tensor-t16-split1", 1, 1, vendor=(0, 1)),
        _gemm("gemm_fp8_channel", "quantized_linear/fp8-channel-t16-split1", 1, 1, vendor=(0, 1)),
        _gemm("gemm_fp8_block", "quantized_linear/fp8-block-t16-split1", 1, 1, BLOCK_M=(64, 128), BLOCK_K=(128,)),
        _gemm("gemm_int8_channel", "quantized_linear/int8-channel-t16-split1", 1, 1),
        _gemm("int4_gemm", "int4_gemm/bf16-t16-split1", 2, 0.5, BLOCK_K=()),
        Space(
            "moe",
            {
                "BLOCK_T": (16, 32, 64, 128),
                "BLOCK_M": (32, 64, 128, 256),
                "BLOCK_K": (32, 64, 128),
                "GROUP_T": (1, 8),
                "num_warps": (4, 8),
                "num_stages": (2, 3, 4, 5),
            },
            # Gate and up have an accumulator each.
            (shared_bytes(2, 4), lambda config, key: accumulators({**config, "BLOCK_M": 2 * config["BLOCK_M"]}, key)),
            ("moe_gemm/gate-up-bf16-t16", "moe_gemm/down-bf16-t16"),
            ("E", "top_k"),
        ),
        Space(
            "lora",
            {
                "BLOCK_K": (64, 128, 256),
                "BLOCK_M": (64, 128, 256),
                "SPLIT_K": (1, 2, 4, 8, 16),
                "num_warps": (2, 4, 8),
                "num_stages": (2, 3, 4),
            },
            (lambda config, key: key["K"] >= config["SPLIT_K"] * config["BLOCK_K"],),
        ),
        Space(
            "attention_decode",
            {"BN": (16, 32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5, 6)},
            (),
            ("attention_cases/decode_bf16_128_group4",),
            ("head_dim", "page", "bytes"),
        ),
        Space(
            "attention_tile",
            {"BN": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3, 4)},
            (),
            ("attention_cases/tile_bf16_128_rows128",),
            ("head_dim", "rows", "page", "bytes"),
        ),
        Space("rms_norm", {"ROWS": (1, 2, 4, 8, 16, 32), "num_warps": (1, 2, 4, 8, 16), "num_stages": (1,)}),
        Space("gated", {"BLOCK": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8), "num_stages": (1,)}),
        Space("rotary", {"HEADS": (1, 2, 4, 8, 16, 32), "num_warps": (1, 2, 4), "num_stages": (1,)}),
        Space(
            "sample_tokens",
            {"TILE": (1024, 2048, 4096, 8192), "num_warps": (4, 8, 16, 32), "num_stages": (1,)},
            (lambda config, key: config["TILE"] <= 64 * 32 * config["num_warps"],),
            ("sampling/vocabulary_large",),
        ),
    )
}
