"""A source: who is admitted, what it answers, and what it refuses."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.exactness import CheckpointSpec, make_checkpoint
from fakes.weight_sources import KEY, Tampered, serving, store_of

from penstock.workers.errors import PeerError
from penstock.workers.settings import WeightSettings
from penstock.workers.weights import peers as peers_module
from penstock.workers.weights.link import WeightLink
from penstock.workers.weights.messages import Greeting, Piece, Terms, Want, WantConfig
from penstock.workers.weights.peers import Peers, Source
from penstock.workers.weights.runs import Run
from penstock.workers.weights.server import WeightServer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "model", CheckpointSpec(hidden=48, vocab=64))


OPEN: list[Source] = []


@pytest.fixture(autouse=True)
def _all_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(peers_module, "_CONNECT_S", 20.0)  # who serves gives way to everybody on the machine
    yield
    while OPEN:
        OPEN.pop().close()


def admitted(server: WeightServer, own_address: str = "", revision: str = "", key: str = KEY) -> Source:
    """Raises PeerError with the refusal."""
    peers = Peers([server.address], key, WeightSettings(stall_s=2.0))
    peers.own_address = own_address
    if revision:
        peers.expected = Terms(revision, 0, ())
    source = peers.current()
    if source is None:
        raise PeerError(peers.reasons)
    OPEN.append(source)
    return source


def test_bytes_are_those_of_the_file(directory: Path) -> None:
    data = (directory / "model.safetensors").read_bytes()
    with serving(directory) as server:
        source = admitted(server)
        runs = [Run(0, 8), Run(len(data) - 5, 5), Run(3, 10, 100, 7), Run(200, 1000)]
        for run in runs:
            source.ask(0, run)
        for run in runs:
            rows = [data[run.begin + n * run.stride :][: run.length] for n in range(run.count)]
            assert bytes(source.answer(run)) == b"".join(rows)
        assert source.config() == (directory / "config.json").read_bytes()
        assert server.served_bytes == sum(run.size for run in runs) + (directory / "config.json").stat().st_size
        source.close()


def test_a_stranger_gets_nothing(directory: Path) -> None:
    with serving(directory) as server:
        with pytest.raises(PeerError, match="connection"):
            admitted(server, key="00" * 32)
        assert server.served_bytes == 0
        with socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2]))) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n" * 4)
            plain.settimeout(5.0)
            assert b"HTTP" not in plain.recv(100)
        admitted(server).close()


def test_only_so_many_takers_and_the_others_are_sent_on(directory: Path) -> None:
    with serving(directory, max_takers=1) as server:
        first = admitted(server, own_address="127.0.0.1:1")
        peers = Peers([server.address], KEY, WeightSettings())
        peers.own_address = "127.0.0.1:2"
        assert peers.current() is None
        assert "it serves 1 others" in peers.reasons
        assert "127.0.0.1:1" in peers._candidates, "who has a copy is named"
        first.close()
        for _ in range(100):
            try:
                admitted(server, own_address="127.0.0.1:2").close()
            except PeerError:
                threading.Event().wait(0.02)
            else:
                break
        else:
            raise AssertionError("the place is not free again")


def test_kv_goes_first(directory: Path) -> None:
    seconds = []
    for busy in (False, True):
        with serving(directory, serve_bytes_per_s=1 << 20) as server:
            server.give_way_to(lambda busy=busy: busy)
            source, began = admitted(server), time.monotonic()
            for _ in range(4):
                source.ask(0, Run(0, 1 << 15))
            for _ in range(4):
                source.answer(Run(0, 1 << 15))
            seconds.append(time.monotonic() - began)
            source.close()
    # 96 KiB wait for those before, at 1 MiB/s or a quarter of it, less what 50 ms let burst.
    assert seconds[1] > 0.3
    assert seconds[1] > 1.5 * seconds[0]


def test_another_checkpoint_is_refused_by_both_ends(directory: Path) -> None:
    with serving(directory) as server:
        with pytest.raises(PeerError, match="it serves another checkpoint"):
            admitted(server, revision="f" * 32)
        with pytest.raises(PeerError, match="other files, or another checkpoint"):
            admitted(server, revision=server._store.terms.revision)  # of equal name, with other files


def test_who_drains_serves_nobody_new_and_ends_what_runs(directory: Path) -> None:
    with serving(directory) as server:
        source = admitted(server)
        server.close("it drains")
        with pytest.raises(PeerError, match="it drains"):
            admitted(server)

        def ask_twice() -> None:  # one may have been under way
            for _ in range(2):
                source.ask(0, Run(0, 8))
                source.answer(Run(0, 8))

        with pytest.raises(PeerError, match="it drains"):
            ask_twice()


@pytest.mark.parametrize("want", [Want(1, 0, 8, 0, 1), Want(0, 1 << 40, 8, 0, 1), Want(0, 0, 1 << 30, 0, 1)])
def test_what_no_file_has_ends_the_connection(directory: Path, want: Want) -> None:
    with serving(directory) as server:
        source = admitted(server)
        source._link.send(want)
        with pytest.raises(PeerError, match="connection"):
            source.answer(Run(0, 8))
        assert server.served_bytes == 0


def test_a_file_that_is_changed_in_place_is_not_served(directory: Path, tmp_path: Path) -> None:
    changed = tmp_path / "model"
    changed.mkdir()
    for path in directory.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    with serving(changed) as server:
        source = admitted(server)
        with (changed / "model.safetensors").open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"oops")
        os.utime(changed / "model.safetensors", ns=(1, 1))
        source.ask(0, Run(0, 8))
        with pytest.raises(PeerError, match="has been changed since it was loaded") as refused:
            source.answer(Run(0, 8))
        assert refused.value.pause_s is None


def test_bytes_that_are_not_those_of_the_digest(directory: Path) -> None:
    store = store_of(directory)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def lie() -> None:
            sock, _ = listener.accept()
            link = WeightLink(sock, bytes.fromhex(KEY), 0, opened=False)
            assert isinstance(link.receive()[0], Greeting)
            link.send(store.terms)
            assert isinstance(link.receive()[0], Want)
            link.send(Piece(1), memoryview(b"12345678"))
            assert isinstance(link.receive()[0], WantConfig)
            link.send(Piece(1), memoryview(b"1234567"))
            link.close()

        thread = threading.Thread(target=lie)
        thread.start()
        peers = Peers([f"127.0.0.1:{listener.getsockname()[1]}"], KEY, WeightSettings())
        source = peers.current()
        assert source is not None
        OPEN.append(source)
        source.ask(0, Run(0, 8))
        with pytest.raises(PeerError, match="do not have the digest") as lied:
            source.answer(Run(0, 8))
        assert lied.value.pause_s is None
        with pytest.raises(PeerError, match="7 bytes instead of"):
            source.config()
        thread.join(5)
    store.close()


def test_stopping_cuts_takers_and_leaves_no_thread(directory: Path) -> None:
    with serving(Tampered(directory, lambda _, data: data)) as server:
        source = admitted(server)
    source.ask(0, Run(0, 8))
    with pytest.raises(PeerError):
        source.answer(Run(0, 8))
    for thread in threading.enumerate():
        if thread.name.startswith("weights"):
            thread.join(30)  # they give way to everybody
    assert [thread for thread in threading.enumerate() if thread.name.startswith("weights")] == []
