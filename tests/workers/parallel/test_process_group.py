"""Coming together: addresses, time-outs, ports, and that only the named host listens."""

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from fakes.ports import free_port

from penstock.workers.errors import ConfigError, GroupError
from penstock.workers.parallel.collectives import Alone
from penstock.workers.parallel.process_group import GroupPlace, join_store, open_group, serve_store


def test_a_group_of_one_needs_no_store():
    assert isinstance(open_group(GroupPlace("one", 0, 1), None), Alone)


@pytest.mark.parametrize(
    ("place", "words"), [(GroupPlace("g", 2, 2), "rank 2"), (GroupPlace("g", 0, 2), "needs a store")]
)
def test_wrong_places_are_refused(place, words):
    with pytest.raises(ConfigError, match=words):
        open_group(place, None)


def test_a_port_in_use_is_refused_with_its_number():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            serve_store("127.0.0.1", 1.0, port)


@pytest.mark.parametrize("address", ["", "nowhere", "host:port", ":80"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ConfigError, match="host:port"):
        join_store(address, 1.0)


def test_a_store_that_nobody_serves_is_an_error_in_time():
    port = free_port()
    began = time.monotonic()
    with pytest.raises(GroupError, match="no store at"):
        join_store(f"127.0.0.1:{port}", 0.5)
    assert time.monotonic() - began < 5.0


def test_a_rank_that_never_comes_is_an_error_in_time():
    store, _ = serve_store("127.0.0.1", 5.0)
    began = time.monotonic()
    with pytest.raises(GroupError, match="ranks did not meet"):
        open_group(GroupPlace("missing", 0, 2, timeout_s=0.5), store)
    assert time.monotonic() - began < 4.0


def test_ranks_that_are_to_come_at_once_are_not_waited_for_as_long_as_collectives():
    own, address = serve_store("127.0.0.1", 10.0)
    stores = [own, join_store(address, 10.0)]
    began = time.monotonic()
    with pytest.raises(GroupError, match="ranks did not meet"):
        open_group(GroupPlace("missing", 0, 2, timeout_s=60.0, meet_s=0.5), own)
    assert time.monotonic() - began < 4.0

    def late(rank):
        group = open_group(GroupPlace("pair", rank, 2, meet_s=2.0, timeout_s=20.0, share_memory=False), stores[rank])
        time.sleep(3.0 * rank)
        total = float(group.all_reduce(torch.ones(1)))
        group.close()
        return total

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(late, range(2))) == [2.0, 2.0]


def test_a_rank_may_come_before_the_store():
    port = free_port()
    code = (
        "import sys, torch\n"
        "from penstock.workers.parallel.process_group import *\n"
        "group = open_group(GroupPlace('g', 1, 2, timeout_s=60.0), join_store(sys.argv[1], 60.0))\n"
        "print(float(group.all_reduce(torch.ones(1))))"
    )
    command = [sys.executable, "-c", code, f"127.0.0.1:{port}"]
    partner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        store, _ = serve_store("127.0.0.1", 60.0, port)
        group = open_group(GroupPlace("g", 0, 2, timeout_s=60.0), store)
        listening = [one.laddr.ip for one in psutil.Process().net_connections("inet") if one.status == "LISTEN"]
        assert set(listening) == {"127.0.0.1"}
        assert float(group.all_reduce(torch.ones(1))) == 2.0
        assert partner.communicate(timeout=60)[0] == "2.0\n"
        group.close()
    finally:
        partner.kill()
        partner.wait()
