"""What others offer for the same operation in this process, each with the name that the report uses.

Every function returns what can run here as calls on the row's inputs, and why the others cannot. Peers get their data
in the layout they like best, arranged outside the timed region. Their results are compared with the truth by the
caller, so a peer that computes something else is seen.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.packing import QuantFormat, QuantizedWeight
from penstock.kernels.ragged import RaggedBatch

from .problem import Inputs
from .shapes import ModelShape, Workload

Calls = dict[str, Callable[[Inputs], object]]
Found = tuple[Calls, dict[str, str]]
NOT_HERE = "no GPU in this process"


def attention(
    device: torch.device, kv: Tensor, batch: RaggedBatch, model: ModelShape, load: Workload, scale: float
) -> Found:
    """SDPA by flash and by cuDNN, FlexAttention, FlashInfer; rows of equal lengths, all of a workload's."""
    names = ("sdpa_flash", "sdpa_cudnn", "flex_attention", "flashinfer")
    if device.type != "cuda":
        return {}, dict.fromkeys(names, NOT_HERE)
    calls: Calls = {}
    absent: dict[str, str] = {}
    if load.shared:
        absent |= dict.fromkeys(names[:3], "would need a copy of the prefix for every row")
    elif load.new > 1 and load.stored:
        absent |= dict.fromkeys(names[:3], "a chunk after stored tokens is no causal square")
    else:
        keys, values = _dense(kv, batch)
        for name, backend in (("sdpa_flash", "FLASH_ATTENTION"), ("sdpa_cudnn", "CUDNN_ATTENTION")):
            calls[name] = functools.partial(_sdpa, keys=keys, values=values, load=load, scale=scale, backend=backend)
        calls["flex_attention"] = _flex(keys, values, load, scale, model)
    if importlib.util.find_spec("flashinfer") is None:
        absent["flashinfer"] = "not installed"
    else:
        calls["flashinfer"] = _flashinfer(kv, batch, model, load, scale)
    return calls, absent


def _dense(kv: Tensor, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
    """Keys and values [N, H, S, D] of rows of one length."""
    slots, length = kv.shape[4], int(batch.starts[0] + batch.counts[0])
    tables = torch.from_numpy(batch.block_tables[:, : -(-length // slots)].astype("int64")).to(kv.device)
    both = kv[:, 0][tables]  # [N, W, C, H, P, D]
    both = both.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)[:, :, :, :length].contiguous()
    return both[0], both[1]


def _as_rows(q: Tensor, load: Workload) -> Tensor:
    """[T, Hq, D] to [N, Hq, new, D]."""
    return q.view(load.rows, load.new, *q.shape[1:]).transpose(1, 2)


def _back(out: Tensor) -> Tensor:
    """[N, Hq, new, D] to [T, Hq, D]."""
    return out.transpose(1, 2).flatten(0, 1)


def _sdpa(each: Inputs, keys: Tensor, values: Tensor, load: Workload, scale: float, backend: str) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        out = F.scaled_dot_product_attention(
            _as_rows(each["q"], load), keys, values, is_causal=load.new > 1, scale=scale, enable_gqa=True
        )
    return _back(out)


def _flex(keys: Tensor, values: Tensor, load: Workload, scale: float, model: ModelShape) -> Callable[[Inputs], object]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if load.new > 1:
        mask = create_block_mask(
            lambda b, h, query, key: query >= key, None, None, load.new, keys.shape[2], device=keys.device
        )

    def call(each: Inputs) -> Tensor:
        q = _as_rows(each["q"], load)
        return _back(compiled(q, keys, values, block_mask=mask, scale=scale, enable_gqa=model.heads != model.kv_heads))

    return call


def _flashinfer(
    kv: Tensor, batch: RaggedBatch, model: ModelShape, load: Workload, scale: float
) -> Callable[[Inputs], object]:
    import flashinfer  # type: ignore[import-not-found]  # only where it is installed

    slots = kv.shape[4]
    lengths = torch.from_numpy(batch.starts + batch.counts)
    pages = -(-lengths // slots)
    indptr = torch.cat((torch.zeros(1, dtype=torch.int32), pages.cumsum(0).int())).to(kv.device)
    tables = [row[: int(count)] for row, count in zip(torch.from_numpy(batch.block_tables), pages, strict=True)]
    indices = torch.cat(tables).to(kv.device)
    last = ((lengths - 1) % slots + 1).int().to(kv.device)
    space = torch.empty(256 << 20, dtype=torch.uint8, device=kv.device)
    if load.new == 1:
        wrapper: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "HND", use_tensor_cores=True)
        sizes = (model.heads, model.kv_heads, model.dim, slots)
        wrapper.plan(indptr, indices, last, *sizes, data_type=kv.dtype, q_data_type=kv.dtype, sm_scale=scale)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "HND")
        offsets = torch.from_numpy(batch.offsets).to(kv.device)
        sizes = (model.heads, model.kv_heads, model.dim, slots)
        wrapper.plan(offsets, indptr, indices, last, *sizes, causal=True, sm_scale=scale, q_data_type=kv.dtype)
    pages_of_layer = kv[:, 0]
    return lambda each: wrapper.run(each["q"], pages_of_layer)


def linear(device: torch.device, weight: Tensor) -> Found:
    """cuBLAS through torch."""
    if device.type != "cuda":
        return {}, {"cublas": NOT_HERE}
    return {"cublas": lambda each: F.linear(each["x"], weight)}, {}


def quantized(device: torch.device, weight: QuantizedWeight, form: QuantFormat) -> Found:
    """cuBLAS in bf16 for every format; `torch._scaled_mm` for those of e4m3, activations quantised beforehand."""
    if device.type != "cuda":
        return {}, {"cublas_bf16": NOT_HERE, "scaled_mm": NOT_HERE}
    from penstock.kernels import quantize

    plain = quantize.decode_weight(weight, torch.float32).bfloat16()
    calls: Calls = {"cublas_bf16": lambda each: F.linear(each["x"], plain)}
    if form not in (QuantFormat.FP8_TENSOR, QuantFormat.FP8_CHANNEL):
        return calls, {"scaled_mm": f"has no {form.value}"}
    outputs = weight.num_outputs
    row_scales = weight.scales.expand(outputs).contiguous()[None, :]

    def scaled(each: Inputs) -> Tensor:
        codes, scales = quantize.quantize_tokens(each["x"], weight)
        return torch._scaled_mm(codes, weight.codes.t(), scales[:, None], row_scales, out_dtype=torch.bfloat16)

    prepared: dict[int, tuple[Tensor, Tensor]] = {}

    def product_only(each: Inputs) -> Tensor:
        # The peer is timed on the product alone: codes of one fixed input are made once.
        if not prepared:
            codes, scales = quantize.quantize_tokens(each["x"], weight)
            prepared[0] = codes, scales[:, None].contiguous()
        codes, scales = prepared[0]
        return torch._scaled_mm(codes, weight.codes.t(), scales, row_scales, out_dtype=torch.bfloat16)

    calls |= {"torch_quantize+scaled_mm": scaled, "scaled_mm": product_only}
    return calls, {}


def experts(device: torch.device, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Found:
    """Two grouped products of torch around a gated activation, with the sort and the sum that they need."""
    grouped = getattr(F, "grouped_mm", getattr(torch, "_grouped_mm", None))
    if device.type != "cuda":
        return {}, {"grouped_mm": NOT_HERE}
    if grouped is None:
        return {}, {"grouped_mm": "this torch has none"}
    tokens, chosen = ids.shape

    def call(each: Inputs) -> Tensor:
        order = torch.argsort(ids.flatten().long(), stable=True)
        ends = torch.bincount(ids.flatten().long(), minlength=len(gate_up)).cumsum(0).int()
        rows = each["x"][order // chosen]
        gate, up = grouped(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        terms = grouped(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        terms = terms * weights.flatten()[order, None].to(terms.dtype)
        back = torch.empty_like(terms)
        back[order] = terms
        return back.view(tokens, chosen, -1).sum(dim=1)

    return {"grouped_mm": call}, {}


def lora(a: Tensor, b: Tensor, slots: Tensor) -> Calls:
    """Gathered adapters and two batched products: what torch offers without a kernel for it."""
    if not a.is_cuda or math.prod(a.shape[1:]) * len(slots) > 1 << 30:
        return {}

    def call(each: Inputs) -> Tensor:
        low = torch.bmm(each["x"][:, None], a[slots].transpose(1, 2))
        return each["y"].add_(torch.bmm(low, b[slots].transpose(1, 2))[:, 0])

    return {"torch_bmm": call}


def versions() -> Mapping[str, str]:
    """Of the libraries that peers come from."""
    found = {}
    for name in ("torch", "triton", "flashinfer-python"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.cuda.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["cuda"] = str(torch.version.cuda)
    return found
