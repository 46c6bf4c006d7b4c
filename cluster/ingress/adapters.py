"""The low-rank adapters that one ingress serves beside the model: from a name to the content that stands behind it.

Adapters come from the configuration (`adapters.modules`) and from `adapters.json` in their directory, which operators'
calls write (`adapter_calls.py`) and every ingress follows, as it follows the files of each adapter: exchanged files are
another revision, and what is gone or became wrong is listed no more. A faulty adapter costs itself only: it is left out
with its reason in the log and in `/status`.

Files are read by one thread of this object's own, one adapter at a time; the event loop only looks up. Names that
callers send are looked up and never kept.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from penstock.cluster.ingress.adapter_file import (
    FILE_NAME,
    MAX_ADAPTERS,
    Entries,
    Identity,
    change_entries,
    identity_of,
    read_entries,
)
from penstock.cluster.ingress.errors import HttpProblem
from penstock.workers.adapter_ref import AdapterRef
from penstock.workers.errors import AdapterError, ConfigError
from penstock.workers.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, check_folder, read_adapter
from penstock.workers.lora.projections import Place, Size
from penstock.workers.settings import AdapterSettings

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
ADAPTERS_PER_LOOK = 1000  # whose files are looked at; of more than these, some are seen later
SHOWN_REVISION_CHARS = 16
_MAX_PROBLEM_CHARS = 500
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Listed:
    """One name of the list. Without `ref` it is not served, and `problem` says why."""

    name: str
    folder: str
    files: tuple[Identity | None, ...]  # of what `ref` or `problem` is about
    ref: AdapterRef | None
    problem: str = ""

    @property
    def revision(self) -> str:
        """As operators see it."""
        return "" if self.ref is None else self.ref.revision.hex()[:SHOWN_REVISION_CHARS]

    def as_json(self) -> dict[str, Any]:
        """A row of `/status`."""
        return {"name": self.name, "folder": self.folder, "revision": self.revision, "problem": self.problem}


class Adapters:
    """See the module's docstring. Without a directory it is empty, and stays so."""

    def __init__(
        self,
        settings: AdapterSettings | None = None,
        places: Mapping[Place, Size] | None = None,
        model_names: Sequence[str] = (),
    ) -> None:
        """`places`: what adapters of the model may change; `model_names`: what no adapter may be called."""
        self._settings = settings or AdapterSettings()
        self._directory = Path(self._settings.directory)
        self._places = places or {}
        self._model_names = model_names
        self._entries: Entries = {}  # of the file, as it was last understood
        self._seen: Identity | None = None
        self._next = 0  # from where the next look goes on with the adapters' files
        # Changed by the one thread, entry by entry; others read single entries, or all of them in one step.
        self._listed: dict[str, Listed] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        self._ending = False
        self.looked = asyncio.Event()  # once everything has been read for the first time

    @property
    def enabled(self) -> bool:
        """There is a directory for them."""
        return bool(self._settings.directory)

    @property
    def directory(self) -> Path:
        """Where they lie."""
        return self._directory

    def find(self, name: str) -> AdapterRef | None:
        """What is served under an adapter's plain name at this moment."""
        listed = self._listed.get(name)
        return None if listed is None else listed.ref

    def listed(self) -> tuple[Listed, ...]:
        """All of them, also those that are not served."""
        return tuple(self._listed.values())

    async def follow(self, every_s: float = LOOK_EVERY_S) -> None:
        """Until cancelled."""
        try:
            while True:
                await self._in_turn(self.look)
                self.looked.set()
                await asyncio.sleep(every_s)
        finally:
            self._ending = True

    async def load(self, name: str, folder: str, in_place: bool = False) -> Listed:
        """List an adapter for good, or read a listed one again. `in_place`: its folder may become another one.

        Raises HttpProblem: 400 for what cannot be served, 404 where nothing lies, 409 where the list cannot be written.
        """
        return await self._in_turn(lambda: self._load(name, folder, in_place))

    async def unload(self, name: str) -> None:
        """List it no more; requests that have it go on. Raises HttpProblem 404, or 409."""
        await self._in_turn(lambda: self._unload(name))

    def look(self) -> None:
        """Look once at everything; read what has changed."""
        self._read_file()
        configured = self._settings.modules  # first, and as they say
        wanted = {**configured, **self._entries, **configured}
        for name in [name for name in self._listed if name not in wanted]:
            self._drop(name)
        due = self._due(list(wanted))
        for name, folder in wanted.items():
            if self._ending:
                return
            known = self._listed.get(name)
            other = known is None or known.folder != folder
            if other or (known is not None and name in due and self._files(folder) != known.files):
                self._put(self._read(name, folder))

    async def _in_turn(self, work: Callable[[], Result]) -> Result:
        """Work that is cancelled before its turn is not begun; begun work is ended, and what waits behind it waits."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _read_file(self) -> None:
        seen = identity_of(self._directory / FILE_NAME)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            entries = read_entries(self._directory)
            self._check_names(entries)
        except ConfigError as error:
            log.warning("the list of adapters stays as it is: %s", error)
        else:
            self._entries = entries

    def _check_names(self, entries: Entries) -> None:
        for name in entries:
            if name in self._model_names:
                raise ConfigError(f"{FILE_NAME}: {name!r} is the name of the model itself")
        if len(entries.keys() | self._settings.modules.keys()) > MAX_ADAPTERS:
            raise ConfigError(f"{FILE_NAME}: makes more than {MAX_ADAPTERS} adapters with those of the configuration")

    def _due(self, names: list[str]) -> set[str]:
        """Whose files this look is about."""
        first = self._next % max(1, len(names))
        self._next = first + ADAPTERS_PER_LOOK
        return set((names[first:] + names[:first])[:ADAPTERS_PER_LOOK])

    def _files(self, folder: str) -> tuple[Identity | None, ...]:
        try:
            check_folder(folder)
        except AdapterError:
            return ()
        return tuple(identity_of(self._directory / folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE))

    def _read(self, name: str, folder: str) -> Listed:
        files = self._files(folder)  # before it is read: what changes meanwhile is found by the next look
        try:
            found = read_adapter(self._directory, folder, self._places, self._settings.max_rank)
        except (AdapterError, OSError, ValueError, MemoryError) as error:
            reason = str(error) if isinstance(error, AdapterError) else f"cannot be read: {type(error).__name__}"
            shown = "".join(char if char.isprintable() else "?" for char in reason[:_MAX_PROBLEM_CHARS])
            return Listed(name, folder, files, None, shown)
        return Listed(name, folder, files, AdapterRef(name, folder, found.revision))

    def _put(self, listed: Listed) -> None:
        known = self._listed.get(listed.name)
        self._listed[listed.name] = listed
        if listed.ref is None and (known is None or known.problem != listed.problem):
            log.warning("the adapter %s is not served: %s", listed.name, listed.problem)
        elif listed.ref is not None and (known is None or known.ref != listed.ref):
            log.info("the adapter %s is served: %s, revision %s", listed.name, listed.folder, listed.revision)

    def _drop(self, name: str) -> None:
        if self._listed.pop(name, None) is not None:
            log.info("the adapter %s is served no more", name)

    def _load(self, name: str, folder: str, in_place: bool) -> Listed:
        fixed = self._settings.modules.get(name)

        def put(entries: Entries) -> None:
            if entries.get(name, folder) != folder and not in_place:
                raise _loaded_elsewhere(name)
            entries[name] = folder
            self._check_names(entries)

        if fixed is not None and fixed != folder:
            raise _in_configuration(name) if in_place else _loaded_elsewhere(name)
        if not in_place and self._entries.get(name, folder) != folder:
            raise _loaded_elsewhere(name)
        listed = self._read(name, folder)
        if listed.ref is None:
            raise self._unreadable(listed)
        if fixed is None:
            self._entries = self._change(put)
        self._put(listed)
        return listed

    def _unload(self, name: str) -> None:
        def take(entries: Entries) -> None:
            if entries.pop(name, None) is None:
                raise HttpProblem(404, "not_found_error", f"no adapter {name}", "lora_name", "adapter_not_found")

        if name in self._settings.modules:
            raise _in_configuration(name)
        self._entries = self._change(take)
        self._drop(name)

    def _change(self, change: Callable[[Entries], None]) -> Entries:
        try:
            return change_entries(self._directory, change)
        except (OSError, ConfigError) as error:
            reason = str(error) if isinstance(error, ConfigError) else f"{FILE_NAME}: {error.strerror}"
            message = f"the list of adapters cannot be changed: {reason}"
            raise HttpProblem(409, "conflict_error", message, code="adapters_not_writable", may_retry=False) from error

    def _unreadable(self, listed: Listed) -> HttpProblem:
        """404 where something is not there, 400 for all else; what lies outside of the directory is all else."""
        root, home = os.path.realpath(self._directory), os.path.realpath(self._directory / listed.folder)
        inside = home.startswith(root + os.sep)
        pickled = inside and next(Path(home).glob("*.bin"), None) is not None
        if inside and None in listed.files and not pickled:
            return HttpProblem(404, "not_found_error", listed.problem, "lora_path", "adapter_not_found")
        return HttpProblem(400, "invalid_request_error", listed.problem, "lora_path", "invalid_adapter")


def _loaded_elsewhere(name: str) -> HttpProblem:
    message = f"the adapter {name} is loaded from another folder; with load_inplace: true it is exchanged"
    return HttpProblem(400, "invalid_request_error", message, "lora_name", "adapter_exists")


def _in_configuration(name: str) -> HttpProblem:
    message = f"the adapter {name} stands in the configuration (adapters.modules) and stays as it says"
    return HttpProblem(409, "conflict_error", message, "lora_name", "adapter_in_configuration", may_retry=False)
