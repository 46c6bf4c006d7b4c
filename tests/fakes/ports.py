"""Ports for processes that are told one before they listen."""

from __future__ import annotations

import random
import socket

# Below those that the system hands out by itself, so that no connection takes one between here and its use, and
# above those that Ray gives to its workers.
_PORTS = range(20_000, 32_000)


def free_port() -> int:
    """A port of the loopback interface where nobody listens."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """So many, each another."""
    found: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe:
            # as servers do: connections that ended lately are in nobody's way
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"of the ports {_PORTS} no {count} are free")
