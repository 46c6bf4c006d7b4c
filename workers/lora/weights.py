"""An adapter in host memory: the matrices of its files, of their stored dtype.

Made by `store.py` on its own thread, copied into its place on the device by `bank.py`. Legend: R rank, K inputs,
M outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.workers.errors import AdapterError
from penstock.workers.lora.adapter_files import AdapterFiles
from penstock.workers.lora.projections import Place
from penstock.workers.model.safetensors_header import HeaderEntry

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class Update:
    """One projection's: y += scale * B (A x)."""

    a: Tensor  # [R, K]
    b: Tensor  # [M, R]
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class HostAdapter:
    """One adapter; see `scheduler.adapters.LoadedAdapter`."""

    revision: bytes
    updates: Mapping[Place, Update]
    num_bytes: int


def host_adapter(files: AdapterFiles) -> HostAdapter:
    """The matrices, as views of the file's bytes. Raises AdapterError where a number is not finite."""
    updates = {
        place: Update(_matrix(files, update.a), _matrix(files, update.b), update.scale)
        for place, update in files.updates.items()
    }
    return HostAdapter(files.revision, updates, len(files.data))


def _matrix(files: AdapterFiles, entry: HeaderEntry) -> Tensor:
    begin = files.data_offset + entry.begin
    flat = torch.frombuffer(files.data, dtype=_DTYPES[entry.dtype], count=math.prod(entry.shape), offset=begin)
    if not bool(flat.isfinite().all()):
        raise AdapterError("a number in its matrices is not finite")
    return flat.view(entry.shape)
