"""TLS from the three files that `TlsSettings` names: contexts for sockets, PEM for gRPC, and what is wrong.

The ingress serves HTTP and gRPC with `server_context` and `server_pair`; routers, workers and supervisors make
`PeerTls` of the same files and give it to every connection between them. Files are read here and nowhere else, when a
process starts, and nothing of a private key is ever part of an error.

Between the cluster's own processes both sides show a certificate that the cluster's CA has signed. Addresses of
workers come and go, so a certificate is not asked to name one; gRPC cannot do without a name, so it expects the first
one of our own certificate: processes share one certificate, or theirs share their first name. Which worker answers is
proved by `call_seal.py`, within TLS as without.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.workers.errors import ConfigError
from penstock.workers.settings import TlsSettings

_MARKS = {
    "tls.cert_file": b"-BEGIN CERTIFICATE-",
    "tls.key_file": b"PRIVATE KEY-",
    "tls.ca_file": b"-BEGIN CERTIFICATE-",
}
_CONTENTS = {"tls.cert_file": "a certificate", "tls.key_file": "a private key", "tls.ca_file": "a certificate"}
_HANDSHAKE_TURNS = 4  # TLS 1.3 needs two


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A private key and its certificate, in PEM."""

    key: bytes = field(repr=False)
    certificate: bytes


@dataclass(frozen=True, slots=True)
class PeerTls:
    """One process towards the others of its cluster: contexts for sockets, and for gRPC the files."""

    accepting: ssl.SSLContext
    opening: ssl.SSLContext
    pair: KeyPair
    authorities: bytes
    name: str  # that certificates of the cluster carry


def open_peer_tls(settings: TlsSettings) -> PeerTls | None:
    """For connections between workers and routers; None where they are not encrypted. Raises ConfigError."""
    if not settings.internal:
        return None
    settings.check()
    accepting, opening = _peer_context(settings, serves=True), _peer_context(settings, serves=False)
    name = _own_name(settings, accepting, opening)
    return PeerTls(accepting, opening, _pair(settings), _read("ca_file", settings.ca_file), name)


def server_context(settings: TlsSettings) -> ssl.SSLContext | None:
    """For listeners that callers reach; None where they speak plain HTTP. Raises ConfigError."""
    return _context(settings, ssl.PROTOCOL_TLS_SERVER) if settings.cert_file else None


def server_pair(settings: TlsSettings) -> KeyPair | None:
    """The same for gRPC."""
    # The context says what is wrong; gRPC would only fail handshakes.
    return _pair(settings) if server_context(settings) is not None else None


def check_files(settings: TlsSettings) -> None:
    """Raises ConfigError, naming file and reason, where the files cannot do what the settings ask of them."""
    settings.check()
    server_context(settings)
    open_peer_tls(settings)


def _pair(settings: TlsSettings) -> KeyPair:
    return KeyPair(_read("key_file", settings.key_file), _read("cert_file", settings.cert_file))


def _peer_context(settings: TlsSettings, *, serves: bool) -> ssl.SSLContext:
    context = _context(settings, ssl.PROTOCOL_TLS_SERVER if serves else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if serves:
        context.num_tickets = 0  # nobody resumes
    try:
        context.load_verify_locations(cadata=_read("ca_file", settings.ca_file).decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{settings.ca_file}: not a certificate authority's PEM: {error}", "tls.ca_file") from error
    return context


def _context(settings: TlsSettings, protocol: int) -> ssl.SSLContext:
    _read("cert_file", settings.cert_file)
    _read("key_file", settings.key_file)
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # An empty password: else OpenSSL would ask for one on the terminal.
        context.load_cert_chain(settings.cert_file, settings.key_file, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            reason = f"{settings.key_file}: this key is not that of {settings.cert_file}"
        else:
            reason = f"{settings.cert_file} and {settings.key_file}: not a certificate and its key without a password"
        raise ConfigError(f"{reason} ({error.reason or 'cannot be decoded'})", "tls.key_file") from error
    return context


def _read(name: str, path: str) -> bytes:
    key = f"tls.{name}"
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", key) from error
    if _MARKS[key] not in data:
        raise ConfigError(f"{path}: holds no PEM of {_CONTENTS[key]}", key)
    return data


def _own_name(settings: TlsSettings, accepting: ssl.SSLContext, opening: ssl.SSLContext) -> str:
    """The first name in our own certificate, which a rehearsed handshake with ourselves must accept in both roles."""
    ends = ssl.MemoryBIO(), ssl.MemoryBIO()
    server, client = accepting.wrap_bio(*ends, server_side=True), opening.wrap_bio(ends[1], ends[0])
    try:
        for _ in range(_HANDSHAKE_TURNS):
            for end in (client, server):
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
        shown = client.getpeercert() or {}
    except (ssl.SSLError, ValueError) as error:
        reason = f"not accepted by {settings.ca_file} between processes of the cluster: {error}"
        raise ConfigError(f"{settings.cert_file}: {reason}", "tls.cert_file") from error
    found: Any = shown.get("subjectAltName", ())  # pairs, which typeshed leaves open
    names = [str(name) for kind, name in found if kind in ("DNS", "IP Address")]
    if not names:
        reason = "names nothing (subjectAltName), and gRPC between the cluster's processes expects a name"
        raise ConfigError(f"{settings.cert_file}: {reason}", "tls.cert_file")
    return names[0].replace("*", "penstock")
