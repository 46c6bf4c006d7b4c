"""Pairs of connected `GroupLink`s in one process, closed at the end whatever a test did to them."""

from __future__ import annotations

import socket
import threading

from penstock.workers.parallel.group_link import GroupLink

KEY = "ab" * 32


class LinkPairs:
    """`pair` makes two ends: who opened the connection, and who listened."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []

    def pair(
        self, keys: tuple[str, str] = (KEY, KEY), epochs: tuple[int, int] = (1, 1), limit: int = 1 << 24
    ) -> tuple[GroupLink, GroupLink]:
        left, right = self.socketpair()
        made: list[GroupLink] = []
        maker = threading.Thread(target=lambda: made.append(GroupLink(right, keys[1], epochs[1], limit, opened=False)))
        maker.start()
        one = GroupLink(left, keys[0], epochs[0], limit, opened=True)
        maker.join(5)
        return one, made[0]

    def socketpair(self) -> tuple[socket.socket, socket.socket]:
        ends = socket.socketpair()
        self.sockets += ends
        return ends

    def close(self) -> None:
        for each in self.sockets:
            each.close()
