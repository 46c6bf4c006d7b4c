"""An adapter's folder, read whole and checked against the model: PEFT's `adapter_config.json` and its safetensors.

Used by the ingress, which says whether an adapter can be served and which content it has, and by workers, which load
exactly that content. Needs no torch. Nothing in the folder is trusted: it must lie under the adapters' directory with
all of its links, sizes are checked before anything is read, and the file is read once, so that what was checked is what
is loaded, whoever writes to it meanwhile.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from penstock.workers.errors import AdapterError, ModelError
from penstock.workers.lora.adapter_config import AdapterConfig, parse_adapter_config
from penstock.workers.lora.projections import PROJECTIONS, Place, Size
from penstock.workers.model.safetensors_header import HeaderEntry, header_bytes, read_header

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 8 << 20  # names and shapes of a few thousand tensors
_WIDEST = 4  # bytes of a stored number
_DTYPES = ("F32", "BF16", "F16")
_FOLDER = re.compile(r"[A-Za-z0-9._-]{1,128}(/[A-Za-z0-9._-]{1,128}){0,7}\Z")
_TENSOR = re.compile(
    r"base_model\.model\.(?:model\.)?(layers\.([0-9]{1,4})\.(?:self_attn|mlp)\.([a-z]+_proj))\.lora_([AB])\.weight\Z"
)


@dataclass(frozen=True, slots=True)
class LowRank:
    """One projection's update: scale * B A. Places of A [rank, inputs] and B [outputs, rank] in `AdapterFiles.data`."""

    a: HeaderEntry
    b: HeaderEntry
    rank: int
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class AdapterFiles:
    """What a folder holds."""

    revision: bytes  # SHA-256 over both files
    data: bytearray  # of the weights file
    data_offset: int  # from where entries count
    updates: Mapping[Place, LowRank]


def read_adapter(directory: Path, folder: str, places: Mapping[Place, Size], max_rank: int) -> AdapterFiles:
    """Read and check `directory/folder` for a model with these `places`. Raises AdapterError naming file and tensor.

    Of the largest file that could fit, no more is ever read.
    """
    home = _inside(directory, folder)
    largest = _WIDEST * max_rank * sum(size.inputs + size.outputs for size in places.values()) + MAX_HEADER_BYTES
    stated = _read(home / CONFIG_FILE, MAX_CONFIG_BYTES)
    config = parse_adapter_config(bytes(stated), f"{folder}/{CONFIG_FILE}", max_rank)
    if not (home / WEIGHTS_FILE).is_file() and any(home.glob("*.bin")):
        raise AdapterError(f"{folder}: pickled weights (.bin) are not read: save the adapter as safetensors")
    data = _read(home / WEIGHTS_FILE, largest)
    where = f"{folder}/{WEIGHTS_FILE}"
    try:
        length = header_bytes(bytes(data[:8]), len(data), where)
        if length > MAX_HEADER_BYTES:
            raise AdapterError(f"{where}: a header of {length} bytes is more than an adapter's can be")
        entries = read_header(bytes(data[8 : 8 + length]), len(data) - 8 - length, where)
    except ModelError as error:
        raise AdapterError(str(error)) from error
    updates = _updates(entries, config, places, where)
    revision = hashlib.sha256(hashlib.sha256(stated).digest() + hashlib.sha256(data).digest()).digest()
    return AdapterFiles(revision, data, 8 + length, updates)


def check_folder(folder: str) -> None:
    """Raises AdapterError for what can be no folder below the directory, without looking at any."""
    if not _FOLDER.match(folder) or any(part in (".", "..") for part in folder.split("/")):
        raise AdapterError("an adapter's folder is a path of letters, digits, '.', '_' and '-' below the directory")


def _inside(directory: Path, folder: str) -> Path:
    check_folder(folder)
    root, home = os.path.realpath(directory), os.path.realpath(directory / folder)
    if not home.startswith(root + os.sep):
        raise AdapterError(f"{folder}: leads out of the adapters' directory")
    if not os.path.isdir(home):
        raise AdapterError(f"{folder}: no such folder in the adapters' directory")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not os.path.realpath(os.path.join(home, name)).startswith(root + os.sep):
            raise AdapterError(f"{folder}/{name}: leads out of the adapters' directory")
    return Path(home)


def _read(path: Path, most: int) -> bytearray:
    name = f"{path.parent.name}/{path.name}"
    try:
        # A pipe in its place must not hold this thread; for files the flag means nothing.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            size = os.fstat(descriptor).st_size
            if size > most:
                raise AdapterError(f"{name}: {size} bytes are more than the {most} that can be served")
            data = bytearray(size)
            whole = file.readinto(data) == size and not file.read(1)
    except OSError as error:
        raise AdapterError(f"{name}: cannot be read: {error.strerror}") from error
    if not whole:
        raise AdapterError(f"{name}: it changed while it was read")
    return data


def _updates(
    entries: Mapping[str, HeaderEntry], config: AdapterConfig, places: Mapping[Place, Size], where: str
) -> dict[Place, LowRank]:
    halves: dict[Place, dict[str, HeaderEntry]] = {}
    targets: dict[Place, str] = {}
    for name, entry in entries.items():
        match = _TENSOR.match(name)
        place = (-1, "") if match is None else (int(match[2]), match[3])
        if match is None or place not in places:
            known = ", ".join(PROJECTIONS)
            raise AdapterError(f"{where}: {name:.200}: adapters change only {known} of this model's dense layers")
        if entry.dtype not in _DTYPES:
            raise AdapterError(f"{where}: {name:.200}: dtype {entry.dtype} is none of {', '.join(_DTYPES)}")
        if match[4] in halves.setdefault(place, {}):
            raise AdapterError(f"{where}: {name:.200}: the same tensor stands twice")
        halves[place][match[4]] = entry
        targets[place] = match[1]
    if not halves:
        raise AdapterError(f"{where}: holds no tensor of an adapter")
    return {place: _update(place, pair, targets[place], config, places[place], where) for place, pair in halves.items()}


def _update(
    place: Place, pair: Mapping[str, HeaderEntry], target: str, config: AdapterConfig, size: Size, where: str
) -> LowRank:
    name = f"{where}: layer {place[0]}, {place[1]}"
    if len(pair) != 2:
        raise AdapterError(f"{name}: one of lora_A and lora_B is missing")
    rank, alpha = config.of(target)
    a, b = pair["A"], pair["B"]
    for half, entry, shape in (("A", a, (rank, size.inputs)), ("B", b, (size.outputs, rank))):
        if entry.shape != shape:
            raise AdapterError(
                f"{name}: lora_{half} is {list(entry.shape)}, of this model and rank it is {list(shape)}"
            )
    return LowRank(a, b, rank, alpha / math.sqrt(rank) if config.rank_stabilised else alpha / rank)
