"""Sources of weights for tests: a server over a model directory, and servers that do wrong; and what a taker loads."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from penstock.workers.errors import PeerError
from penstock.workers.model.checkpoint import Checkpoint
from penstock.workers.model.config import parse_config
from penstock.workers.model.loading import load_decoder
from penstock.workers.parallel.collectives import Alone
from penstock.workers.settings import RunnerSettings, WeightSettings, WorkerSettings
from penstock.workers.weights.offer import own_offer
from penstock.workers.weights.runs import Run
from penstock.workers.weights.server import WeightServer
from penstock.workers.weights.stored import Scratch, StoredWeights
from penstock.workers.weights.supply import WeightSupply

KEY = "5e" * 32


class Rank(Alone):
    """A rank that loads and never computes."""

    def __init__(self, rank: int = 0, width: int = 1) -> None:
        self.rank, self.width = rank, width


def store_of(directory: Path) -> StoredWeights:
    own = Checkpoint(directory)
    offer = own_offer(own)
    return StoredWeights(offer.terms, offer.config, [own.files[file.name].path for file in offer.terms.files])


class Tampered:
    """A store whose reads pass through `change`, which may pause, lie or fail; counts them."""

    def __init__(self, directory: Path, change: Callable[[int, memoryview], memoryview | None]) -> None:
        self._store = store_of(directory)
        self._change = change
        self._lock = threading.Lock()
        self.terms, self.config = self._store.terms, self._store.config
        self.reads = 0

    def read(self, file: int, run: Run, scratch: Scratch) -> memoryview | None:
        with self._lock:
            self.reads += 1
            number = self.reads
        data = self._store.read(file, run, scratch)
        return None if data is None else self._change(number, data)


def fails_after(reads: int) -> Callable[[int, memoryview], memoryview]:
    def change(number: int, data: memoryview) -> memoryview:
        if number > reads:
            raise PeerError("its disk is broken")
        return data

    return change


@contextmanager
def serving(store: Any, key: str = KEY, **settings: Any) -> Iterator[WeightServer]:
    """A server over a store, or over the files of a directory."""
    store = store_of(store) if isinstance(store, Path) else store
    server = WeightServer(store, "127.0.0.1", key, WeightSettings(**settings))
    try:
        yield server
    finally:
        server.stop()


def taker(directory: Path, *peers: str, rank: int = 0, key: str = KEY, **weights: Any) -> WeightSupply:
    """The supply of a worker that is offered these peers; it serves nobody unless told to."""
    settings = WorkerSettings("taker", cluster_key=key, runner=RunnerSettings(model_dir=str(directory)))
    weights = {"serve": False, "stall_s": 2.0, "patience_s": 5.0, **weights}
    group = dataclasses.replace(settings.group, rank=rank)
    settings = dataclasses.replace(settings, weights=WeightSettings(**weights), weight_peers=peers, group=group)
    return WeightSupply(settings)


def loaded(supply: WeightSupply, rank: int = 0, width: int = 1, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """Every tensor that a rank keeps, by its place in the decoder."""
    config = parse_config(supply.raw_config(), "config.json")
    decoder = load_decoder(config, supply.checkpoint(), dtype, 64, group=Rank(rank, width))
    supply.loaded()
    return dict(tensors(decoder._weights))


def tensors(value: object, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, tuple):
        for number, each in enumerate(value):
            yield from tensors(each, f"{path}/{number}")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name), f"{path}/{field.name}")


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Bitwise; both must have something to compare."""
    same = ours.keys() == theirs.keys() and all(torch.equal(_bits(ours[path]), _bits(theirs[path])) for path in ours)
    return bool(ours) and same


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Also of one in oneDNN's own order."""
    return (tensor.to_dense() if tensor.is_mkldnn else tensor).contiguous().view(torch.uint8)


def without_weights(directory: Path, target: Path, config: bool = True) -> Path:
    """A model directory as a host without the files has it."""
    target.mkdir(parents=True)
    for path in directory.iterdir():
        if path.suffix == ".json" and (config or path.name != "config.json") and "index" not in path.name:
            (target / path.name).write_bytes(path.read_bytes())
    return target
