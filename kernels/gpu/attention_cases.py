"""The configurations of the attention kernels that serving uses, for the ahead-of-time table.

Read through `aot.all_cases`, never while serving. The head sizes and groups are those of the model families that the
engine loads; configurations are the defaults of `attention.py`.
"""

from __future__ import annotations

from dataclasses import replace

import triton

from penstock.kernels.gpu.aot import AotCase
from penstock.kernels.gpu.attention import MERGED_AT_ONCE, UNITS, decode_config, merge_config, tile_config
from penstock.kernels.gpu.attention_kernels import decode_kernel, merge_kernel, tile_kernel
from penstock.kernels.gpu.kv_codes import E4M3, INT8, PLAIN

_STORED = {PLAIN: "*bf16", E4M3: "*u8", INT8: "*i8"}
_NAMES = {PLAIN: "bf16", E4M3: "bf16_e4m3", INT8: "bf16_int8"}
_STRIDES = ("first_key", "first_value", "stride_b", "stride_h", "stride_p", "stride_qt", "stride_qh")
_OUT_STRIDES = ("stride_ot", "stride_oh")


def _signature(kind: int, lists: tuple[str, ...], stored: str = "*bf16") -> dict[str, str]:
    pointers = {"q": stored, "kv": _STORED[kind] if kind else stored, "scales": "*fp32", "out": stored}
    return {
        **pointers,
        **dict.fromkeys(("lse", "partial_o", "partial_lse"), "*fp32"),
        **dict.fromkeys(("counts", *lists), "*i32"),
        **dict.fromkeys((*_STRIDES, *_OUT_STRIDES, "scale_begin", "window"), "i32"),
        **dict.fromkeys(("qk_scale", "soft_cap"), "fp32"),
    }


def _model(dim: int, group: int, kind: int, limited: bool) -> dict[str, object]:
    return {
        "H": 8,
        "G": group,
        "D": dim,
        "DP": triton.next_power_of_2(dim),
        "P": 16,
        "WINDOWED": limited,
        "CAPPED": limited,
        "HAS_LSE": False,
        "KIND": kind,
        "UNIT": UNITS[kind],
    }


def _attention(
    name: str, kernel: object, signature: dict[str, str], model: dict[str, object], rows: int, config: dict[str, int]
) -> AotCase:
    pointers = tuple(each for each, kind in signature.items() if kind.startswith("*"))
    constexprs = {**model, "BM": rows, "BN": config["BN"]}
    divisible = (*pointers, *_STRIDES, *_OUT_STRIDES)
    return AotCase(name, kernel, signature, constexprs, config["num_warps"], config["num_stages"], divisible)


def _decode(dim: int, group: int, kind: int = PLAIN, limited: bool = False) -> AotCase:
    config = decode_config(dim, group, 16, 1 if kind else 2)
    name = f"decode_{_NAMES[kind]}_{dim}_group{group}{'_limited' if limited else ''}"
    signature = _signature(kind, ("items", "tables"))
    rows = max(16, triton.next_power_of_2(group))
    return _attention(name, decode_kernel, signature, _model(dim, group, kind, limited), rows, config)


def _tile(
    dim: int, rows: int, kind: int = PLAIN, limited: bool = False, stored: str = "*bf16", older: bool | None = None
) -> AotCase:
    """`older`: for machines with (False) or without (True) warp groups only; None where both take the same."""
    q_bytes = 4 if stored == "*fp32" else 2
    config = tile_config(dim, rows, 16, q_bytes, 1 if kind else q_bytes, not older)
    name = f"tile_{_NAMES[kind] if kind else stored[1:]}_{dim}_rows{rows}{'_limited' if limited else ''}"
    targets = () if older is None else ("sm_80", "gfx942") if older else ("sm_90",)
    signature = _signature(kind, ("items", "token_list", "positions", "tables"), stored)
    case = _attention(name, tile_kernel, signature, _model(dim, 4, kind, limited), rows, config)
    return replace(case, name=f"{name}_older" if older else name, targets=targets)


def _merge(dim: int, heads: int) -> AotCase:
    config = merge_config(dim)
    signature = {
        "out": "*bf16",
        **dict.fromkeys(("lse", "partial_o", "partial_lse"), "*fp32"),
        **dict.fromkeys(("counts", "merge_tokens", "merge_indptr", "merge_slots"), "*i32"),
        **dict.fromkeys(("num_tokens", *_OUT_STRIDES), "i32"),
    }
    constexprs = {
        "HEADS": heads,
        "D": dim,
        "DP": triton.next_power_of_2(dim),
        "BS": MERGED_AT_ONCE,
        "COUNTED": True,
        "INDEXED": True,
        "HAS_LSE": False,
    }
    pointers = tuple(each for each, kind in signature.items() if kind.startswith("*"))
    divisible = (*pointers, *_OUT_STRIDES)
    return AotCase(f"merge_bf16_{dim}", merge_kernel, signature, constexprs, config["num_warps"], 1, divisible)


AOT_CASES = (
    *(_decode(dim, 4) for dim in (64, 80, 96, 128, 256)),
    *(_decode(128, group) for group in (1, 2, 8, 16)),
    *(_decode(dim, 4, kind) for dim in (64, 128) for kind in (E4M3, INT8)),
    _decode(128, 4, limited=True),
    _decode(256, 2, limited=True),
    *(_tile(dim, 16) for dim in (64, 128)),
    *(_tile(dim, rows, older=older) for dim in (64, 128) for rows in (64, 128) for older in (False, True)),
    *(_tile(dim, 128, older=older) for dim in (80, 96) for older in (False, True)),
    *(_tile(192, 64 if older else 128, older=older) for older in (False, True)),  # keys made of latent rows
    *(_tile(128, 128, kind, older=older) for kind in (E4M3, INT8) for older in (False, True)),
    *(_tile(128, 128, limited=True, older=older) for older in (False, True)),
    *(
        _tile(256, 64 if older else 128, limited=limited, older=older)
        for older in (False, True)
        for limited in (False, True)
    ),
    _tile(64, 64, stored="*fp32"),
    _merge(64, 32),
    _merge(128, 32),
    _merge(256, 16),
    _merge(512, 16),
)
