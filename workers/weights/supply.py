"""Where one worker's (or rank's) weights come from, decided at its start, and what it then gives to others.

`computing.py` makes one for a model; `model_build.py` reads the configuration and the checkpoint through it; the
assembly tells its server when to give way and when to end. Peers are chosen where the settings say so, where one was
measured to beat our own disk, or where there is no other place. One line in the log says what was chosen, and why.

Trust: whoever shows the cluster key may serve; its bytes are treated like those of a file nevertheless (names, headers,
offsets and sizes are checked, nothing is unpickled, no path is made of what it says). A checkpoint is known by its
revision: `config.json`, headers, and a sample of every tensor.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from random import Random
from typing import Any

from penstock.workers.errors import ModelError, PeerError
from penstock.workers.model.checkpoint import INDEX, SINGLE, Checkpoint
from penstock.workers.model.config import parse_raw_config, read_raw_config
from penstock.workers.settings import WorkerSettings
from penstock.workers.tls import open_peer_tls
from penstock.workers.totals import WeightFigures
from penstock.workers.weights.arriving import ArrivingFile
from penstock.workers.weights.choice import ADVANTAGE, disk_rate, peer_rate, samples
from penstock.workers.weights.intake import Intake, LoadTally
from penstock.workers.weights.kept import Kept
from penstock.workers.weights.messages import Terms
from penstock.workers.weights.offer import Offer, own_offer, read_offer
from penstock.workers.weights.peers import Peers, Source
from penstock.workers.weights.runs import contiguous
from penstock.workers.weights.server import WeightServer
from penstock.workers.weights.stored import KeptWeights, StoredWeights, WeightStore

log = logging.getLogger(__name__)

_WAIT_S = 0.05
_TRIED = 3  # peers that are measured before the disk is taken


class WeightSupply:
    """Used by the thread that builds the worker; `server`, where there is one, has threads of its own."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.server: WeightServer | None = None
        self.load_s = 0.0
        self._settings = settings
        self._weights = settings.weights
        self._dir = Path(settings.runner.model_dir)
        self._began = time.monotonic()
        addresses = () if self._weights.source == "disk" else settings.weight_peers
        self._tls = open_peer_tls(settings.tls)
        self._peers = Peers(addresses, settings.cluster_key, self._weights, tls=self._tls)
        self._may_ask = bool(addresses)
        self._why = "weights.source says so" if self._weights.source == "disk" else "no running peer is known"
        self._config: bytes | None = None  # where it came from a peer
        self._own: Checkpoint | None = None  # on our own disk
        self._store: StoredWeights | None = None  # the same, as bytes
        self._intake: Intake | None = None  # where peers bring the weights

    @property
    def tally(self) -> LoadTally:
        """Bytes so far, by where they came from."""
        if self._intake is not None:
            return self._intake.tally
        files = self._own.files.values() if self._own is not None else ()
        return LoadTally(disk_bytes=sum(file.bytes_read for file in files))

    def figures(self) -> WeightFigures:
        """For the metrics; from any thread."""
        tally, served = self.tally, self.server.served_bytes if self.server is not None else 0
        return WeightFigures(tally.peer_bytes, tally.disk_bytes, self.load_s, served)

    def raw_config(self) -> dict[str, Any]:
        """`config.json`, decoded: our own, or a peer's where that is allowed. Raises ModelError."""
        if (self._dir / "config.json").exists() or not (self._may_ask and self._weights.config_from_peer):
            return read_raw_config(self._dir)
        while True:
            source = self._admitted()
            try:
                self._config = source.config()
            except PeerError as error:
                self._peers.leave(error)
            else:
                return parse_raw_config(self._config, f"config.json of peer {source.address}")

    def checkpoint(self) -> Checkpoint:
        """The weights, from wherever they come. Raises ModelError, at once or when they are read."""
        patience_s = self._weights.patience_s
        on_disk = (self._dir / SINGLE).exists() or (self._dir / INDEX).exists()
        if self._may_ask and not on_disk:
            offer = self._first_offer()
            self._peers.expected = offer.terms
            self._intake = Intake(self._peers, None, patience_s)
            return self._arriving(offer, self._intake)
        self._own = Checkpoint(self._dir)  # which says what is missing where nothing is
        offer = own_offer(self._own)
        paths = [self._own.files[file.name].path for file in offer.terms.files]
        self._store = StoredWeights(offer.terms, offer.config, paths)
        self._peers.expected = offer.terms
        least_bytes_per_s = self._least_of_a_peer(self._store) if self._may_ask else None
        if least_bytes_per_s is None:
            self._peers.close()
            return self._own
        self._intake = Intake(self._peers, self._store, patience_s, least_bytes_per_s)
        return self._arriving(offer, self._intake)

    def loaded(self) -> None:
        """The model is built: say what from, and begin to serve what lies in files."""
        self.load_s = time.monotonic() - self._began
        if self._own is None and self._intake is None:
            return  # transformers has read the files, in its own way
        tally = self.tally
        log.info(
            "weights from %s: %s; %.1f MB from %d peers, %.1f MB from disk, in %.2f s",
            "disk" if self._intake is None else "peers",
            self._why,
            tally.peer_bytes / 1e6,
            len(tally.sources),
            tally.disk_bytes / 1e6,
            self.load_s,
        )
        self._peers.close()
        # Files are the same for all ranks of a worker: one of them serves, or their bounds would add up.
        if self._store is not None and self.server is None and self._weights.serve and not self._settings.group.rank:
            self.server = self._serve(self._store)
        elif self._store is not None:
            self._store.close()

    @property
    def address(self) -> str:
        """Where other workers can take these weights; empty: nowhere."""
        return self.server.address if self.server is not None else ""

    def stop(self) -> None:
        """Serve nobody any more, and ask nobody."""
        self._peers.close()
        if self.server is not None:
            self.server.stop()

    # --- with files of our own --------------------------------------------------------------------------------------

    def _least_of_a_peer(self, store: StoredWeights) -> float | None:
        """Bytes per second that a peer must give to stay chosen; None: none is chosen."""
        if self._weights.source == "auto":
            return self._measured(store)
        source = self._peers.current()
        if source is None:
            self._why = f"no peer admits us ({self._peers.reasons})"
            return None
        self._why = f"weights.source says so, and {source.address} admits us"
        return 0.0

    def _measured(self, store: StoredWeights) -> float | None:
        """The disk's rate, where a peer beats it."""
        settings = self._settings
        start = f"{settings.cluster_id}/{settings.worker_id}/{settings.incarnation}/{settings.group.rank}"
        wanted = samples(store.terms.files, Random(start))
        try:
            least = disk_rate(store, wanted)
        except PeerError as error:
            raise ModelError(str(error)) from error
        for _ in range(_TRIED):
            source = self._peers.current()
            if source is None:
                break
            try:
                rate = peer_rate(source, wanted)
            except PeerError as error:
                self._peers.leave(error)
                continue
            if rate >= ADVANTAGE * least:
                self._why = f"{source.address} gives {rate / 1e6:.0f} MB/s, our disk {least / 1e6:.0f}"
                return least
            self._peers.leave(PeerError(f"it gives {rate / 1e6:.0f} MB/s", pause_s=float("inf")))
        self._why = f"no peer beats its {least / 1e6:.0f} MB/s ({self._peers.reasons})"
        return None

    # --- without ----------------------------------------------------------------------------------------------------

    def _first_offer(self) -> Offer:
        """What the first source offers that has what our config.json describes. Raises ModelError."""
        config = self._config if self._config is not None else (self._dir / "config.json").read_bytes()
        while True:
            source = self._admitted()
            try:
                offer = read_offer(source, config)
            except PeerError as error:
                self._peers.leave(error)
            else:
                self._why = f"they are not on this host, and {source.address} admits us"
                return offer

    def _admitted(self) -> Source:
        """The source to ask; waits for one. Raises ModelError."""
        while not self._peers.hopeless and time.monotonic() < self._began + self._weights.patience_s:
            source = self._peers.current()
            if source is not None:
                return source
            time.sleep(_WAIT_S)
        raise ModelError(f"{self._dir}: no weights are here, and no peer gives them: {self._peers.reasons}")

    # --- both -------------------------------------------------------------------------------------------------------

    def _arriving(self, offer: Offer, intake: Intake) -> Checkpoint:
        """The files as they come; where a copy is kept, it is served from now on."""
        files, kept = offer.terms.files, self._copies(offer.terms)
        for file, copy in zip(files, kept, strict=bool(kept)):
            for run in contiguous(0, len(offer.heads[file.name])):
                copy.write(run, memoryview(offer.heads[file.name])[run.begin : run.end])
        if kept and self._weights.serve:
            self.server = self._serve(KeptWeights(offer.terms, offer.config, kept))
            self._peers.own_address = self.server.address
            self._peers.close()  # whoever admits us from now on hears where we serve
        arriving = {
            file.name: ArrivingFile(place, file, offer.entries[file.name], intake, kept[place] if kept else None)
            for place, file in enumerate(files)
        }
        return Checkpoint(self._dir, offer.config, arriving)

    def _copies(self, terms: Terms) -> list[Kept]:
        """A place for each file, where a copy is wanted and there is room for all."""
        directory = self._weights.copy_dir
        if not directory:
            return []
        try:
            found = os.statvfs(directory)
            if found.f_bavail * found.f_frsize < sum(file.size for file in terms.files):
                log.warning("weights: no copy is kept: %s has too little room (weights.copy_dir)", directory)
                return []
            return [Kept(directory, file.size) for file in terms.files]
        except OSError as error:
            log.warning("weights: no copy is kept in %s (weights.copy_dir): %s", directory, error.strerror)
            return []

    def _serve(self, store: WeightStore) -> WeightServer:
        host, key = self._settings.transfer.host, self._settings.cluster_key
        return WeightServer(store, host, key, self._weights, self._tls)
