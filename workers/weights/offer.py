"""What one source offers, read and checked before anything is loaded from it: which files, and which tensors in them.

Used by `supply.py` on a host without weights of its own; one with weights knows all of this from its own files. Names,
sizes, headers and offsets are judged like those of a file that somebody gave us.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from penstock.workers.errors import ModelError, PeerError
from penstock.workers.model.checkpoint import Checkpoint, revision_of
from penstock.workers.model.safetensors_file import TensorEntry, parse_header
from penstock.workers.model.safetensors_header import header_bytes
from penstock.workers.weights.messages import ServedFile, Terms
from penstock.workers.weights.peers import Source
from penstock.workers.weights.runs import contiguous

_PREFIX_BYTES = 8  # of a file, before its header


@dataclass(frozen=True, slots=True)
class Offer:
    """A checkpoint: the terms on which it is served, and `config.json`; of each file the head and its tensors."""

    terms: Terms
    config: bytes
    heads: Mapping[str, bytes]  # all before the first tensor's bytes
    entries: Mapping[str, Mapping[str, TensorEntry]]


def own_offer(own: Checkpoint) -> Offer:
    """The same of files on our own disk, as others who have them must state it."""
    files = tuple(
        ServedFile(name, file.size, file.header_digest, file.digest) for name, file in sorted(own.files.items())
    )
    terms = Terms(own.revision, len(own.config), files)
    heads = {}
    for name, file in own.files.items():
        with file.path.open("rb") as opened:
            heads[name] = opened.read(file.data_offset)
    return Offer(terms, own.config, heads, {name: file.entries for name, file in own.files.items()})


def read_offer(source: Source, config: bytes) -> Offer:
    """Raises PeerError where the source's files do not belong to `config`, or are not what it states."""
    terms = source.terms
    if revision_of(config, {file.name: file.digest for file in terms.files}) != terms.revision:
        raise PeerError("it serves another checkpoint than our config.json belongs to")
    heads = {file.name: _head(source, place, file) for place, file in enumerate(terms.files)}
    try:
        entries = {file.name: _tensors(heads[file.name], file) for file in terms.files}
    except ModelError as error:
        raise PeerError(f"it offers a file that is none: {error}") from error
    return Offer(terms, config, heads, entries)


def _head(source: Source, place: int, file: ServedFile) -> bytes:
    prefix = _bytes(source, place, 0, _PREFIX_BYTES)
    try:
        length = header_bytes(prefix, file.size, file.name)
    except ModelError as error:
        raise PeerError(f"it offers a file that is none: {error}") from error
    header = _bytes(source, place, _PREFIX_BYTES, length)
    if hashlib.sha256(header).digest() != file.header_digest:
        raise PeerError(f"its header of {file.name} is not the one it states")
    return prefix + header


def _tensors(head: bytes, file: ServedFile) -> Mapping[str, TensorEntry]:
    return parse_header(head[_PREFIX_BYTES:], file.size - len(head), file.name)


def _bytes(source: Source, place: int, begin: int, size: int) -> bytes:
    found = bytearray()
    for run in contiguous(begin, size):
        source.ask(place, run)
        found += source.answer(run)
    return bytes(found)
