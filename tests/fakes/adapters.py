"""Folders of low-rank adapters as PEFT writes them, with random halves, so that they change what a model says.

For tests of the ingress' list of adapters and of the workers that compute with them. Same arguments, same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.cluster.ingress.adapter_file import FILE_NAME
from penstock.cluster.ingress.adapters import Adapters
from penstock.cluster.model_directory import EMBEDDED_MODEL
from penstock.workers.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from penstock.workers.lora.projections import PROJECTIONS, adaptable
from penstock.workers.model.config import DecoderConfig, read_config
from penstock.workers.settings import AdapterSettings

STRENGTH = 1.0  # about a third of a weight of the embedded model
MODEL_NAMES = ("tiny", "other-name")  # of the model that the listed adapters are for
Arrays = Mapping[str, NDArray[np.float32]]


def make_adapter(
    folder: Path,
    config: DecoderConfig | None = None,
    *,
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    modules: Sequence[str] = PROJECTIONS,
    layers: Sequence[int] | None = None,
    dtype: str = "F32",
    strength: float = STRENGTH,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors` into `folder`; returns it.

    `config`: the model's, None = the embedded one's. `strength`: how large a weight's change is on average, times
    1 / sqrt(inputs). `more`: further keys of the configuration.
    """
    rng = np.random.default_rng(seed)
    arrays: dict[str, NDArray[np.float32]] = {}
    scale = alpha / rank
    for (layer, name), size in adaptable(config or read_config(EMBEDDED_MODEL)).items():
        if name not in modules or (layers is not None and layer not in layers):
            continue
        block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        prefix = f"base_model.model.model.layers.{layer}.{block}.{name}"
        a = rng.standard_normal((rank, size.inputs)) / np.sqrt(size.inputs)
        b = rng.standard_normal((size.outputs, rank)) * (strength / (scale * np.sqrt(rank)))
        arrays[f"{prefix}.lora_A.weight"] = a.astype(np.float32)
        arrays[f"{prefix}.lora_B.weight"] = b.astype(np.float32)
    stated = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted(modules), "bias": "none"}
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / CONFIG_FILE, json.dumps({**stated, **(more or {})}).encode())
    replace_file(folder / WEIGHTS_FILE, safetensors_bytes(arrays, dtype))
    return folder


def safetensors_bytes(arrays: Arrays, dtype: str = "F32") -> bytes:
    """A whole safetensors file; `dtype`: F32, F16 or BF16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    chunks: list[bytes] = []
    offset = 0
    for name, values in arrays.items():
        chunks.append(packed(values, dtype))
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [offset, offset + len(chunks[-1])],
        }
        offset += len(chunks[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(chunks)


def packed(values: NDArray[np.float32], dtype: str) -> bytes:
    """The numbers as a file holds them; BF16 rounded to nearest even."""
    if dtype == "F32":
        return values.astype("<f4").tobytes()
    if dtype == "F16":
        return values.astype("<f2").tobytes()
    assert dtype == "BF16"
    bits = values.astype("<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype("<u2").tobytes()


def listing(home: Path, config: DecoderConfig, look: bool = True, **modules: str) -> Adapters:
    """The list of an ingress over a directory; ranks up to 8."""
    settings = AdapterSettings(directory=str(home), modules=modules, max_rank=8)
    adapters = Adapters(settings, adaptable(config), MODEL_NAMES)
    if look:
        adapters.look()
    return adapters


def write_list(home: Path, content: object) -> None:
    """`adapters.json` as an editor leaves it; bytes as they are."""
    replace_file(home / FILE_NAME, content if isinstance(content, bytes) else json.dumps(content).encode())


def served(adapters: Adapters) -> list[str]:
    """Names that can be asked for."""
    return [listed.name for listed in adapters.listed() if listed.ref is not None]


def problem(adapters: Adapters, name: str) -> str:
    """Why a listed one is not."""
    return next(listed.problem for listed in adapters.listed() if listed.name == name)


def replace_file(path: Path, content: bytes) -> None:
    """Exchange a file as careful writers do: whoever reads sees the old one or the new one."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(content)
    os.replace(fresh, path)
