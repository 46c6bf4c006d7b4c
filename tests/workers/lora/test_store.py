"""What the store gives is what was asked for, kept within bounds, and costs nobody else anything when it fails."""

from __future__ import annotations

import threading
from pathlib import Path
from shutil import rmtree

import pytest
import torch
from fakes.adapters import make_adapter

from penstock.cluster.model_directory import EMBEDDED_MODEL
from penstock.workers.adapter_ref import AdapterRef
from penstock.workers.errors import AdapterError
from penstock.workers.lora.adapter_files import read_adapter
from penstock.workers.lora.bank import AdapterBank
from penstock.workers.lora.projections import adaptable
from penstock.workers.lora.store import AdapterStore
from penstock.workers.lora.weights import HostAdapter, host_adapter
from penstock.workers.model.config import read_config
from penstock.workers.settings import AdapterSettings

CONFIG = read_config(EMBEDDED_MODEL)
PLACES = adaptable(CONFIG)


class Stand:
    def __init__(self, home: Path, host_bytes: int = 1 << 30) -> None:
        self.home = home
        self.woken = threading.Semaphore(0)
        settings = AdapterSettings(str(home), max_loaded=2, max_rank=8, host_bytes=host_bytes)
        self.bank = AdapterBank(CONFIG, 2, 8, torch.float32, torch.device("cpu"))
        self.store = AdapterStore(settings, PLACES, self.bank, self.woken.release)

    def ref(self, name: str, seed: int = 0) -> AdapterRef:
        make_adapter(self.home / name, rank=2, seed=seed)
        return AdapterRef(name, name, read_adapter(self.home, name, PLACES, 8).revision)

    def get(self, ref: AdapterRef) -> HostAdapter:
        found = self.store.begin(ref).result(10)
        assert self.woken.acquire(timeout=10)
        assert isinstance(found, HostAdapter)
        assert found.revision == ref.revision
        return found


def test_files_are_read_once_and_what_they_held_outlives_them(tmp_path: Path) -> None:
    stand = Stand(tmp_path)
    ref = stand.ref("a")
    first = stand.get(ref)
    rmtree(tmp_path / "a")
    assert stand.get(ref) is first
    totals = stand.store.totals()
    assert (totals.loaded, totals.found, totals.failed) == (1, 1, 0)


def test_other_files_in_its_place_are_refused_and_the_old_ones_back_are_served(tmp_path: Path) -> None:
    stand = Stand(tmp_path)
    ref = stand.ref("a")
    other = stand.ref("a", seed=1)
    for _ in range(2):
        with pytest.raises(AdapterError, match="adapter a: a: its files are not those"):
            stand.store.begin(ref).result(10)
    stand.get(other)
    assert stand.ref("a") == ref
    stand.get(ref)
    assert stand.store.totals().failed == 2


def test_what_is_kept_is_bounded_and_what_stands_in_a_place_needs_no_file(tmp_path: Path) -> None:
    one = Stand(tmp_path)
    size = one.get(one.ref("a")).num_bytes
    stand = Stand(tmp_path, host_bytes=2 * size)
    refs = [stand.ref(name, seed) for seed, name in enumerate("abcd")]
    standing = stand.get(refs[0])
    stand.store.put(0, standing)
    for ref in refs[1:]:
        stand.get(ref)
    assert (stand.store.totals().evicted, len(stand.store._kept)) == (2, 2)
    assert stand.store._kept_bytes == 2 * size
    rmtree(tmp_path / "a")
    assert stand.get(refs[0]) is standing
    rmtree(tmp_path / "b")
    with pytest.raises(AdapterError, match="no such folder"):
        stand.store.begin(refs[1]).result(10)


def test_none_are_kept_where_there_is_no_room_and_they_are_given_all_the_same(tmp_path: Path) -> None:
    stand = Stand(tmp_path, host_bytes=0)
    ref = stand.ref("a")
    assert stand.get(ref) is not stand.get(ref)
    assert stand.store._kept_bytes == 0


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", rank=2)
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = b"\0\0\xc0\x7f"  # NaN
    path.write_bytes(data)
    ref = AdapterRef("a", "a", read_adapter(tmp_path, "a", PLACES, 8).revision)
    with pytest.raises(AdapterError, match="not finite"):
        Stand(tmp_path).store.begin(ref).result(10)


def test_after_its_end_nothing_is_loaded(tmp_path: Path) -> None:
    stand = Stand(tmp_path)
    ref = stand.ref("a")
    stand.store.stop()
    with pytest.raises(RuntimeError):
        stand.store.begin(ref)


def test_nothing_of_the_adapter_before_is_left_in_a_place(tmp_path: Path) -> None:
    """The one before was larger and of other projections, and its numbers were as large as they can be."""
    stand = Stand(tmp_path)
    make_adapter(tmp_path / "large", rank=8, seed=1, strength=1e30)
    make_adapter(tmp_path / "small", rank=2, seed=2, modules=("q_proj",), layers=(0,))
    for folder in ("large", "small"):
        stand.bank.put(0, host_adapter(read_adapter(tmp_path, folder, PLACES, 8)))
    fresh = AdapterBank(CONFIG, 2, 8, torch.float32, torch.device("cpu"))
    fresh.put(0, host_adapter(read_adapter(tmp_path, "small", PLACES, 8)))
    for where, room in stand.bank._rooms.items():
        for mine, wanted in zip(
            (room.a, room.b, room.scales),
            (fresh._rooms[where].a, fresh._rooms[where].b, fresh._rooms[where].scales),
            strict=True,
        ):
            assert torch.equal(mine, wanted)
