"""Small integers for router ids, so that a step's rows can name their router in one numpy column.

Used by the scheduler. An index is given to another router only after the last sequence of the old one is gone, so the
table is bounded by the number of routers with work here.
"""

from __future__ import annotations


class RouterNames:
    """Router id <-> index, with a count of sequences per index."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._uses: list[int] = []
        self._index: dict[str, int] = {}
        self.names: tuple[str, ...] = ()

    def enter(self, router_id: str) -> int:
        """One more sequence of this router; returns its index."""
        index = self._index.get(router_id)
        if index is None:
            index = self._claim(router_id)
        self._uses[index] += 1
        return index

    def leave(self, index: int) -> None:
        """One sequence less."""
        self._uses[index] -= 1

    def _claim(self, router_id: str) -> int:
        try:
            index = self._uses.index(0)
        except ValueError:
            index = len(self._names)
            self._names.append(router_id)
            self._uses.append(0)
        else:
            del self._index[self._names[index]]
            self._names[index] = router_id
        self._index[router_id] = index
        self.names = tuple(self._names)
        return index
