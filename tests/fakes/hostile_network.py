"""The network between prefill and decode workers of a local cluster, as TCP proxies that a test can cut and slow.

Workers advertise their own addresses in grants, which pass through the router of this process: here each grant names a
proxy of the granter instead. Only for transport tcp.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

from fakes.tcp_proxy import TcpProxy

from penstock.cluster.channel import RequestChannel
from penstock.workers.protocol import Grant


class HostileNetwork:
    """One proxy for each pair of sender and granting worker, made when its first grant passes."""

    def __init__(self, **link: Any) -> None:
        """`link`: as of `TcpProxy`."""
        self.proxies: dict[tuple[str, str], TcpProxy] = {}  # by the sender's id and the granter's address
        self._granters: dict[str, str] = {}  # id by address
        self._link = link

    def through(self, grant: Grant, sender: str) -> Grant:
        """The grant with a proxy's address."""
        way = sender, grant.address
        self._granters[grant.address] = grant.worker_id
        if way not in self.proxies:
            self.proxies[way] = TcpProxy(grant.address, **self._link)
        return dataclasses.replace(grant, address=self.proxies[way].address)

    def close(self) -> None:
        """Forget all proxies, those of workers that are gone too; later grants get new ones."""
        for proxy in self.proxies.values():
            proxy.close()
        self.proxies.clear()

    def cut(self, **ways: bool) -> None:
        for proxy in self.proxies.values():
            proxy.cut(**ways)

    def cut_between(self, prefill: str, decode: str) -> None:
        """Only these two."""
        found = [self.proxies[way] for way in self.proxies if (way[0], self._granters[way[1]]) == (prefill, decode)]
        if not found:
            raise LookupError(f"no grant of {decode} has passed to {prefill} yet")
        for proxy in found:
            proxy.cut()

    def heal(self) -> None:
        for proxy in self.proxies.values():
            proxy.heal()


@contextlib.contextmanager
def hostile_network(**link: Any) -> Iterator[HostileNetwork]:
    """All KV transfers that begin in this block pass through proxies."""
    network = HostileNetwork(**link)
    prefill = RequestChannel.prefill

    def redirected(channel: RequestChannel, worker_id: str, attempt: int, request: Any, grant: Grant | None) -> None:
        prefill(channel, worker_id, attempt, request, None if grant is None else network.through(grant, worker_id))

    with mock.patch.object(RequestChannel, "prefill", redirected):
        try:
            yield network
        finally:
            for proxy in network.proxies.values():
                proxy.close()
