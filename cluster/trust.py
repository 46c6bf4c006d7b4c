"""Whose certificates a client of a cluster accepts: the system's authorities, one that was named, or one certificate.

The Python handle, `penstock status` and `bench` call `trust`; `launch.py` asks the cluster it has just started with
`pinned`. Knows httpx's and asyncio's contexts, not what is said under them.
"""

from __future__ import annotations

import functools
import ssl

from penstock.cluster.config import stated_ca_file
from penstock.workers.errors import ConfigError


def trust(ca_file: str | None = None) -> ssl.SSLContext:
    """For servers whose certificate was signed by `ca_file`, else by $PENSTOCK_CA_FILE, else by whom the system trusts.

    Raises ConfigError for a file that cannot be used.
    """
    return _context(stated_ca_file(ca_file))


def pinned(cert_file: str) -> ssl.SSLContext | bool:
    """For a server that shows this very certificate, under whatever address. Without a file: no TLS is expected."""
    if not cert_file:
        return False
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate itself is enough, whoever signed it
    context.load_verify_locations(cert_file)
    return context


@functools.lru_cache(maxsize=8)  # reading the system's authorities takes a while
def _context(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except OSError as error:  # ssl's own are such
        raise ConfigError(f"{ca_file}: no usable CA file: {error.strerror or error}", "ca_file") from error
