"""The weights of a model directory, one file or many: which file holds which tensor, and reading them by name.

Used by `loading.py`. The files are those of the directory, or come from peers (`workers/weights/`). Only safetensors:
pickled weights are refused, because opening one runs code. A shard may not lie outside the directory, except as the
Hugging Face hub's own cache stores it (`snapshots/REV/file -> ../../blobs/ID`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from penstock.workers.errors import ModelError
from penstock.workers.model.safetensors_file import SafetensorsFile, TensorEntry

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 100 << 20
MAX_SHARDS = 4096


class WeightFile(Protocol):
    """One safetensors file, wherever its bytes are; see `SafetensorsFile`."""

    path: Path
    size: int
    data_offset: int
    entries: Mapping[str, TensorEntry]
    header_digest: bytes
    digest: bytes
    bytes_read: int

    def read(self, name: str) -> Tensor: ...

    def arriving(self, name: str, pieces: Sequence[Tensor]) -> Iterator[Tensor]: ...


class Checkpoint:
    """All shards, open. `revision` changes when config, shapes or (sampled) weights do, not with file times."""

    def __init__(
        self, model_dir: Path, config: bytes | None = None, files: Mapping[str, WeightFile] | None = None
    ) -> None:
        """Open every shard, or take `files` by name. Raises ModelError naming the file and the tensor.

        `config` are the bytes of `config.json`, where the directory need not have it.
        """
        self._dir = model_dir
        self._config = config
        self._files: dict[str, WeightFile]
        single, index = model_dir / SINGLE, model_dir / INDEX
        if files is not None:
            self.source, self._files = model_dir, dict(files)
            self._places = {name: file for file, shard in files.items() for name in shard.entries}
            self._check_owners()
        elif single.exists():
            self.source = single
            shard = SafetensorsFile(_inside(model_dir, SINGLE, single))
            self._files = {SINGLE: shard}
            self._places = dict.fromkeys(shard.entries, SINGLE)
        elif index.exists():
            self.source = index
            self._places = _read_index(index)
            names = sorted(set(self._places.values()))
            self._files = {name: SafetensorsFile(_inside(model_dir, name, index)) for name in names}
            self._check_index()
        else:
            raise _no_weights(model_dir)

    def _check_index(self) -> None:
        for name, shard in self._places.items():
            if name not in self._files[shard].entries:
                raise ModelError(f"{self._dir / shard}: {name}: missing, though {INDEX} places it here", shard)
        self._check_owners()

    def _check_owners(self) -> None:
        owners: dict[str, str] = {}
        for shard, file in self._files.items():
            for name in file.entries:
                if name in owners:
                    raise ModelError(f"{self._dir / shard}: {name}: also in {owners[name]}", shard)
                owners[name] = shard

    @property
    def revision(self) -> str:
        """32 hex digits over `config.json` and every shard's digest."""
        return revision_of(self.config, {name: file.digest for name, file in self._files.items()})

    @property
    def config(self) -> bytes:
        """`config.json` as it stands there."""
        return (self._dir / "config.json").read_bytes() if self._config is None else self._config

    @property
    def files(self) -> Mapping[str, WeightFile]:
        """By name."""
        return self._files

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def entry(self, name: str) -> TensorEntry:
        """Dtype, shape and place. Raises ModelError naming the tensor when it is missing."""
        if name not in self._places:
            raise ModelError(f"{self.source}: {name}: missing", str(self.source))
        return self._files[self._places[name]].entries[name]

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A view of the mapped file, floating point, of this shape. Raises ModelError naming file and tensor.

        Its numbers may still have to come: read them out of what `arriving` gives.
        """
        entry = self.entry(name)
        path = str(self._files[self._places[name]].path)
        if entry.shape != shape:
            raise ModelError(f"{path}: {name}: shape {list(entry.shape)}, config.json makes it {list(shape)}", path)
        if not entry.dtype.is_floating_point:
            raise ModelError(f"{path}: {name}: dtype {entry.dtype} is not floating point", path)
        return self._files[self._places[name]].read(name)

    def arriving(self, name: str, pieces: Sequence[Tensor]) -> Iterator[Tensor]:
        """`pieces`, which are views out of `read`, each once its numbers are here, until the next is asked for.

        Raises ModelError where they cannot be had.
        """
        return self._files[self._places[name]].arriving(name, pieces)

    def take(self, name: str, part: Tensor) -> Tensor:
        """A copy of `part`, a view out of `read`. Raises ModelError."""
        (taken,) = (piece.clone(memory_format=torch.contiguous_format) for piece in self.arriving(name, [part]))
        return taken


def revision_of(config: bytes, digests: Mapping[str, bytes]) -> str:
    """32 hex digits over `config.json` and the digest of every shard, by name."""
    digest = hashlib.sha256(config)
    for name in sorted(digests):
        digest.update(digests[name])
    return digest.hexdigest()[:32]


def _read_index(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ModelError(f"{path}: larger than {MAX_INDEX_BYTES} bytes", str(path))
        raw: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}", str(path)) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {error}", str(path)) from error
    places = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{path}: weight_map: missing", str(path))
    for name, shard in places.items():
        if not isinstance(shard, str) or not _plain_name(shard):
            raise ModelError(f"{path}: weight_map.{name}: {shard!r} is not a plain .safetensors file name", str(path))
    if len(set(places.values())) > MAX_SHARDS:
        raise ModelError(f"{path}: weight_map: more than {MAX_SHARDS} shards", str(path))
    return places


def _plain_name(name: str) -> bool:
    return name.endswith(".safetensors") and not any(character in name for character in "/\\\0") and name[0] != "."


def _inside(model_dir: Path, name: str, source: Path) -> Path:
    """The shard's path, if it exists and does not lead out of the directory."""
    path = model_dir / name
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path}: missing, though {source.name} names it", str(path)) from error
    root = model_dir.resolve()
    hub_blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if real.parent not in (root, hub_blobs):
        raise ModelError(f"{path}: leads out of the model directory, to {real}", str(path))
    return path


def _no_weights(model_dir: Path) -> ModelError:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in model_dir.glob(pattern))
    if pickled:
        return ModelError(
            f"{model_dir / pickled[0]}: pickled weights are not opened; convert to safetensors", pickled[0]
        )
    return ModelError(f"{model_dir}: neither {SINGLE} nor {INDEX} is here", str(model_dir))
