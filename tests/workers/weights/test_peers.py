"""Which peer is asked: candidates one by one, those that rest later, liars and dead ones never again."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
from fakes.certificates import Authority
from fakes.exactness import CheckpointSpec, make_checkpoint
from fakes.weight_sources import KEY, serving, store_of

from penstock.workers.errors import PeerError
from penstock.workers.settings import WeightSettings
from penstock.workers.tls import open_peer_tls
from penstock.workers.weights.peers import MAX_CANDIDATES, Peers
from penstock.workers.weights.runs import Run
from penstock.workers.weights.server import WeightServer


class Clock:
    """Moves when told, and by a second whenever somebody looks."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.now, self.step_s = 0.0, step_s

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("peers") / "model", CheckpointSpec(hidden=48, vocab=64))


def test_one_that_fails_rests_and_the_next_is_asked(directory: Path) -> None:
    clock = Clock()
    with serving(directory) as first, serving(directory) as second:
        peers = Peers([first.address, second.address], KEY, WeightSettings(), clock)
        asked = []
        for error in (PeerError("broke", 2.0), PeerError("lied")):
            source = peers.current()
            assert source is not None
            assert peers.current() is source, "as long as it delivers"
            asked.append(source.address)
            peers.leave(error)
        assert asked == [first.address, second.address]
        assert peers.current() is None
        assert not peers.hopeless
        assert peers.reasons == f"{first.address}: broke; {second.address}: lied"
        clock.now += 2.1
        again = peers.current()
        assert again is not None
        assert again.address == first.address
        peers.leave(PeerError("lied, too"))
        clock.now += 1e9
        assert (peers.current(), peers.hopeless) == (None, True)


def test_who_fails_again_and_again_is_given_up(directory: Path) -> None:
    clock = Clock()
    with serving(directory) as server:
        peers = Peers([server.address], KEY, WeightSettings(), clock)
        count = 0
        give_up = time.monotonic() + 10
        while not peers.hopeless and time.monotonic() < give_up:
            if peers.current() is None:  # it has not seen yet that we left, and says that it is busy
                time.sleep(0.01)
            else:
                peers.leave(PeerError("broke", 2.0))
                count += 1
            clock.now += 3.0
        assert (peers.hopeless, 3 <= count <= 10) == (True, True)


def test_referrals_are_bounded_and_never_ourselves(directory: Path) -> None:
    with serving(directory) as server:
        peers = Peers([server.address], KEY, WeightSettings())
        peers.own_address = "127.0.0.1:7"
        assert peers.current() is not None
        peers.leave(PeerError("busy", 1.0, ("127.0.0.1:7", *(f"127.0.0.1:{n}" for n in range(1000, 2000)))))
        assert len(peers._candidates) == MAX_CANDIDATES
        assert "127.0.0.1:7" not in peers._candidates


def test_silent_peers_do_not_hold_a_start_up() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:  # takes connections, and says nothing
        addresses = [f"127.0.0.1:{silent.getsockname()[1]}", *(f"127.0.0.1:{n}" for n in range(1, 30))]
        peers = Peers(addresses, KEY, WeightSettings(), Clock(step_s=1.0))
        assert peers.current() is None
        assert 1 <= peers.reasons.count(";") + 1 < 10, "the others are asked later, if at all"


def test_over_tls_and_who_is_refused_there(directory: Path, tmp_path: Path) -> None:
    ours = open_peer_tls(Authority(tmp_path).settings())
    foreign = open_peer_tls(Authority(tmp_path, "foreign").settings())
    server = WeightServer(store_of(directory), "127.0.0.1", KEY, WeightSettings(), ours)
    try:
        friend = Peers([server.address], KEY, WeightSettings(), tls=ours)
        source = friend.current()
        assert source is not None
        source.ask(0, Run(0, 64))
        assert bytes(source.answer(Run(0, 64))) == (directory / "model.safetensors").read_bytes()[:64]
        for stranger in (
            Peers([server.address], KEY, WeightSettings(), tls=foreign),
            Peers([server.address], KEY, WeightSettings()),
        ):
            assert stranger.current() is None
        friend.close()
    finally:
        server.stop()
