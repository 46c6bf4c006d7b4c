"""Weights from peers are those of the files, bit for bit, whatever the peers do; and a start never depends on them."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fakes.exactness import CheckpointSpec, make_checkpoint
from fakes.sharded_specs import sharded_specs
from fakes.weight_sources import KEY, Tampered, equal, fails_after, loaded, serving, store_of, taker, without_weights

from penstock.workers.errors import ModelError
from penstock.workers.settings import WeightSettings
from penstock.workers.weights.choice import disk_rate, samples
from penstock.workers.weights.intake import Intake
from penstock.workers.weights.link import WeightLink
from penstock.workers.weights.messages import Piece
from penstock.workers.weights.peers import Peers
from penstock.workers.weights.runs import Run
from penstock.workers.weights.supply import WeightSupply

SPEC = CheckpointSpec(hidden=240, vocab=1024)
FAMILIES = {spec.family: spec for spec in sharded_specs()}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[CheckpointSpec], Path]:
    made: dict[CheckpointSpec, Path] = {}

    def directory(spec: CheckpointSpec) -> Path:
        if spec not in made:
            made[spec] = make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "model", spec)
        return made[spec]

    return directory


@pytest.fixture(scope="module")
def directory(make: Callable[[CheckpointSpec], Path]) -> Path:
    return make(SPEC)


@pytest.mark.parametrize("family", ["llama", "deepseek-v3", "qwen3-moe", "gemma3"])
@pytest.mark.parametrize("width", [1, 2])
def test_equal_bits_from_files_and_peers(
    family: str, width: int, make: Callable[[CheckpointSpec], Path], tmp_path: Path
) -> None:
    directory = make(FAMILIES[family])
    nothing = without_weights(directory, tmp_path / "bare")
    with serving(directory) as server:
        for rank in range(width):
            own = loaded(taker(directory, rank=rank), rank, width, "bfloat16")
            beside = taker(directory, server.address, rank=rank, source="peer")
            assert equal(loaded(beside, rank, width, "bfloat16"), own)
            alone = taker(nothing, server.address, rank=rank)
            assert equal(loaded(alone, rank, width, "bfloat16"), own)
            assert alone.tally.disk_bytes == beside.tally.disk_bytes == 0
            assert alone.tally.peer_bytes == beside.tally.peer_bytes > 0


def test_a_rank_takes_its_own_bytes_only(directory: Path) -> None:
    with serving(directory) as server:
        whole, half = (taker(directory, server.address, source="peer") for _ in range(2))
        loaded(whole)
        loaded(half, 1, 2)
        assert 0.45 < half.tally.peer_bytes / whole.tally.peer_bytes < 0.6


def test_a_disk_that_is_as_fast_is_taken_and_a_slow_one_is_not(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    with serving(directory) as server, serving(directory, serve_bytes_per_s=1 << 21) as slow:
        near = taker(directory, slow.address)
        loaded(near)
        assert (near.tally.peer_bytes, near.tally.disk_bytes > 0) == (0, True)
        assert "weights from disk: no peer beats its" in caplog.text
        monkeypatch.setattr("penstock.workers.weights.supply.disk_rate", lambda *_: 2e5)
        far = taker(directory, slow.address, server.address)
        loaded(far)
        assert far.tally.peer_bytes > 0
        assert f"weights from peers: {slow.address} gives" in caplog.text


def test_the_settings_may_forbid_peers_and_without_one_the_disk_serves(directory: Path) -> None:
    with serving(directory) as server:
        forbidden = taker(directory, server.address, source="disk")
        loaded(forbidden)
        assert (forbidden.tally.peer_bytes, server.served_bytes) == (0, 0)
        lonely = taker(directory, "127.0.0.1:9", source="peer")
        loaded(lonely)
        assert lonely.tally.disk_bytes > 0


@pytest.mark.parametrize("has_disk", [True, False])
def test_a_source_that_fails_in_the_middle(has_disk: bool, directory: Path, tmp_path: Path) -> None:
    place = directory if has_disk else without_weights(directory, tmp_path / "bare")
    with serving(Tampered(directory, fails_after(6))) as first, serving(directory) as second:
        supply = taker(place, first.address, second.address, source="peer")
        assert equal(loaded(supply), loaded(taker(directory)))
        assert first.served_bytes > 0
        assert second.served_bytes > first.served_bytes
        assert supply.tally.disk_bytes == 0


def test_the_last_source_fails_and_the_disk_goes_on(directory: Path) -> None:
    with serving(Tampered(directory, fails_after(3))) as server:
        supply = taker(directory, server.address, source="peer")
        assert equal(loaded(supply), loaded(taker(directory)))
        assert min(supply.tally.peer_bytes, supply.tally.disk_bytes) > 0


@contextmanager
def lying(directory: Path, honest: int) -> Iterator[str]:
    """The address of a source that flips a bit of every piece after so many, behind its digest."""
    with serving(directory) as server:
        send, sent = WeightLink.send, [0]

        def flip(link: WeightLink, message: object, payload: memoryview | None = None) -> None:
            if isinstance(message, Piece) and payload is not None:
                sent[0] += 1
                if sent[0] > honest:
                    payload = memoryview(bytes([payload[0] ^ 1]) + bytes(payload[1:]))
            send(link, message, payload)  # type: ignore[arg-type]

        patch = pytest.MonkeyPatch()
        patch.setattr(WeightLink, "send", flip)
        try:
            yield server.address
        finally:
            patch.undo()


def test_wrong_bytes_are_caught_and_their_source_is_named(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with lying(directory, honest=4) as address:
        supply = taker(directory, address, source="peer")
        assert equal(loaded(supply), loaded(taker(directory)))
        assert 0 < supply.tally.peer_bytes < supply.tally.disk_bytes
        assert f"no more weights from {address}: it gave bytes that do not have the digest" in caplog.text


def test_another_checkpoint_is_not_taken(
    directory: Path, make: Callable[[CheckpointSpec], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = make(CheckpointSpec(hidden=240, vocab=1024, seed=5))  # of equal shapes
    bigger = make(CheckpointSpec(hidden=192, vocab=1024))
    with serving(other) as server, serving(bigger) as strange:
        supply = taker(directory, server.address, strange.address, source="peer")
        assert equal(loaded(supply), loaded(taker(directory)))
        assert supply.tally.peer_bytes == 0
        assert caplog.text.count("no more weights from") == 2
        bare = taker(without_weights(directory, tmp_path / "bare"), strange.address)
        with pytest.raises(ModelError, match=r"another checkpoint than our config\.json"):
            loaded(bare)


def test_nobody_gives_what_is_not_here(directory: Path, tmp_path: Path) -> None:
    bare = without_weights(directory, tmp_path / "bare")
    with pytest.raises(ModelError, match=r"neither model.safetensors nor"):
        loaded(taker(bare))
    began = time.monotonic()
    with pytest.raises(ModelError, match=r"no peer gives them: 127.0.0.1:9: it cannot be reached"):
        loaded(taker(bare, "127.0.0.1:9", patience_s=0.3))
    with pytest.raises(ModelError, match=r"nonsense' is no numeric host:port"):
        loaded(taker(bare, "nonsense"))
    with serving(Tampered(directory, fails_after(4))) as server, pytest.raises(ModelError, match="its disk is broken"):
        loaded(taker(bare, server.address))
    assert time.monotonic() - began < 5.0


def test_a_host_with_nothing_takes_the_configuration_too(directory: Path, tmp_path: Path) -> None:
    with serving(directory) as server:
        assert equal(loaded(taker(tmp_path / "none", server.address, config_from_peer=True)), loaded(taker(directory)))
        with pytest.raises(ModelError, match="no such model directory"):
            loaded(taker(tmp_path / "none", server.address))


def test_takers_hand_on_what_they_have(directory: Path, tmp_path: Path) -> None:
    """Three start at once on hosts without files, beside one source that takes one of them: a chain, not a queue."""
    bare = without_weights(directory, tmp_path / "bare")
    expected, found = loaded(taker(directory)), {}
    with serving(directory, max_takers=1, serve_bytes_per_s=3 << 20) as root:  # nobody is through before all ask
        supplies = [
            taker(bare, root.address, serve=True, copy_dir=str(tmp_path), max_takers=1, patience_s=30.0)
            for _ in range(3)
        ]

        def start(number: int) -> None:
            found[number] = loaded(supplies[number])

        threads = [threading.Thread(target=start, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [equal(found[number], expected) for number in range(3)] == [True] * 3
        size = (directory / "model.safetensors").stat().st_size
        assert root.served_bytes < 2.5 * size, "the takers gave to each other"
        assert sum(supply.figures().served for supply in supplies) > 0.5 * size
    late = taker(bare, *(supply.address for supply in supplies))
    assert equal(loaded(late), expected), "without the root"
    for supply in supplies:
        supply.stop()
    assert [path.name for path in tmp_path.iterdir()] == ["bare"], "copies have no names"


def test_no_copy_where_there_is_no_room(directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(directory) as server:
        supply = taker(directory, server.address, source="peer", serve=True, copy_dir=str(tmp_path / "absent"))
        assert equal(loaded(supply), loaded(taker(directory)))
        assert "no copy is kept" in caplog.text
        assert supply.address, "it serves its files"
        supply.stop()


def test_who_serves_its_files_and_who_has_none(directory: Path, tmp_path: Path) -> None:
    first = taker(directory, serve=True)
    expected = loaded(first)
    rank = taker(directory, rank=1, serve=True)
    loaded(rank, 1, 2)
    assert (bool(first.address), rank.address) == (True, ""), "one rank of a worker is enough"
    bare = taker(without_weights(directory, tmp_path / "bare"), first.address, serve=True)
    assert equal(loaded(bare), expected)
    assert (bare.address, first.figures().served >= bare.figures().from_peers) == ("", True)
    first.stop()
    assert bare.figures().from_disk == 0


def test_a_slow_source_is_left_for_the_disk(directory: Path) -> None:
    with serving(directory, serve_bytes_per_s=1 << 20) as server:
        store = store_of(directory)
        peers = Peers([server.address], KEY, WeightSettings())
        peers.expected = store.terms
        intake = Intake(peers, store, 5.0, least_bytes_per_s=1 << 22)
        size = store.terms.files[0].size
        runs = [(0, Run(begin, min(1 << 18, size - begin))) for begin in range(0, size, 1 << 18)]
        data = b"".join(bytes(piece) for piece in intake.stream(runs))
        assert data == (directory / "model.safetensors").read_bytes()
        assert intake.tally.disk_bytes > intake.tally.peer_bytes > 0
        intake.close()
        store.close()


def test_a_reader_that_breaks_off_leaves_no_answers_behind(directory: Path) -> None:
    data = (directory / "model.safetensors").read_bytes()
    with serving(directory) as server:
        intake = Intake(Peers([server.address], KEY, WeightSettings()), None, 5.0)
        stream = intake.stream((0, Run(begin, 64)) for begin in range(0, 6400, 64))
        assert bytes(next(stream)) == data[:64]
        stream.close()
        assert [bytes(piece) for piece in intake.stream([(0, Run(1000, 10))])] == [data[1000:1010]]
        intake.close()


def test_samples_are_of_the_files(directory: Path) -> None:
    from random import Random

    store = store_of(directory)
    drawn = samples(store.terms.files, Random(1))
    assert all(run.allowed and run.end <= store.terms.files[file].size for file, run in drawn)
    assert drawn != samples(store.terms.files, Random(2))
    assert disk_rate(store, drawn) > 0
    store.close()


SOURCE = """
import sys, threading
from pathlib import Path
sys.path.insert(0, {tests!r})
from fakes.weight_sources import serving
with serving(Path({directory!r}), serve_bytes_per_s=4 << 20) as server:
    print(server.address, flush=True)
    threading.Event().wait(60)
"""


@pytest.mark.parametrize(
    ("number", "has_disk"), [(signal.SIGKILL, True), (signal.SIGKILL, False), (signal.SIGSTOP, True)]
)
def test_a_source_process_that_dies_or_hangs_in_the_middle(
    number: int, has_disk: bool, directory: Path, tmp_path: Path
) -> None:
    code = SOURCE.format(tests=str(Path(__file__).parents[2]), directory=str(directory))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        place = directory if has_disk else without_weights(directory, tmp_path / "bare")
        with serving(directory) as second:
            others = [] if has_disk else [second.address]
            supply = taker(place, address, *others, source="peer", stall_s=0.5)
            killer = threading.Thread(target=_when_under_way, args=(supply, process.pid, number))
            killer.start()
            found = loaded(supply)
            killer.join()
        assert equal(found, loaded(taker(directory)))
        assert supply.tally.sources[address] > 0
        assert supply.tally.disk_bytes + sum(supply.tally.sources.get(each, 0) for each in others) > 0
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def _when_under_way(supply: WeightSupply, pid: int, number: int) -> None:
    give_up = time.monotonic() + 20.0
    while supply.tally.peer_bytes == 0 and time.monotonic() < give_up:
        time.sleep(0.002)
    os.kill(pid, number)
