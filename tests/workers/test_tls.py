"""Certificates between a cluster's processes: what files must hold, who is let in, and that all still works inside."""

from __future__ import annotations

import dataclasses
import ssl
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives import serialization as pem
from fakes.certificates import Authority
from fakes.echo_worker import echo

from penstock.workers import rpc
from penstock.workers.errors import ConfigError, RefusedError
from penstock.workers.protocol import WIRE_VERSION, Cancel, Hello, Queued
from penstock.workers.rpc import RpcServer, WorkerClient
from penstock.workers.settings import TlsSettings, WorkerSettings
from penstock.workers.tls import PeerTls, check_files, open_peer_tls, server_context

HELLO = Hello(WIRE_VERSION, "router", 1, 5.0)


def opened(settings: TlsSettings) -> PeerTls:
    found = open_peer_tls(settings)
    assert found is not None
    return found


def test_no_files_no_tls(tmp_path: Path) -> None:
    assert open_peer_tls(TlsSettings()) is None
    assert server_context(TlsSettings()) is None
    assert open_peer_tls(Authority(tmp_path).settings(internal=False)) is None


def test_the_settings_travel_to_workers(tmp_path: Path) -> None:
    settings = WorkerSettings("w", tls=Authority(tmp_path).settings())
    assert WorkerSettings.from_json(settings.to_json()) == settings


@pytest.mark.parametrize("missing", ["cert_file", "key_file", "ca_file"])
def test_files_go_together(tmp_path: Path, missing: str) -> None:
    settings = dataclasses.replace(Authority(tmp_path).settings(), **{missing: ""})
    with pytest.raises(ConfigError) as error:
        check_files(settings)
    assert error.value.key == f"tls.{missing}"


@pytest.mark.parametrize("name", ["cert_file", "key_file", "ca_file"])
@pytest.mark.parametrize("content", [None, b"", b"nonsense"])
def test_a_bad_file_is_named_with_the_reason(tmp_path: Path, name: str, content: bytes | None) -> None:
    settings = Authority(tmp_path).settings()
    path = Path(getattr(settings, name))
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="No such file" if content is None else "holds no PEM") as error:
        check_files(settings)
    assert str(path) in str(error.value)
    assert error.value.key == f"tls.{name}"


def test_files_that_do_not_fit_each_other(tmp_path: Path) -> None:
    ours, other = Authority(tmp_path, "ours").settings(), Authority(tmp_path, "other").settings()
    with pytest.raises(ConfigError, match="this key is not that of") as error:
        check_files(dataclasses.replace(ours, key_file=other.key_file))
    secret = Path(other.key_file).read_text().splitlines()[1]
    assert secret not in str(error.value)
    with pytest.raises(ConfigError, match="not accepted by") as error:
        check_files(dataclasses.replace(ours, ca_file=other.ca_file))
    assert error.value.key == "tls.cert_file"
    with pytest.raises(ConfigError, match="certificate has expired"):
        check_files(Authority(tmp_path, "old").settings(days=-1))


def test_a_key_with_a_password_asks_nobody_for_it(tmp_path: Path) -> None:
    settings = Authority(tmp_path).settings()
    key = pem.load_pem_private_key(Path(settings.key_file).read_bytes(), None)
    locked = pem.BestAvailableEncryption(b"secret")
    Path(settings.key_file).write_bytes(key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, locked))
    with pytest.raises(ConfigError, match="without a password"):
        check_files(settings)


async def test_calls_over_tls_and_who_is_refused(tmp_path: Path) -> None:
    ours, foreign = opened(Authority(tmp_path, "ours").settings()), opened(Authority(tmp_path, "foreign").settings())
    server = RpcServer(echo, lambda: {"state": "ready"}, "secret", tls=ours)
    address = await server.start("127.0.0.1", 0)
    friend = WorkerClient(address, "secret", tls=ours)
    stream = await friend.attach(HELLO)
    for slot in range(200):
        stream.send(Cancel(slot, 1))
    assert [await stream.read() for _ in range(200)] == [Queued(slot, 1, 0) for slot in range(200)]
    await stream.close()
    wrong_key = WorkerClient(address, "guess", tls=ours)
    with pytest.raises(RefusedError, match="wrong cluster key"):
        await wrong_key.status()
    strangers = [WorkerClient(address, "secret"), WorkerClient(address, "secret", tls=foreign)]
    for stranger in strangers:
        with pytest.raises(RefusedError, match=r"unavailable|deadline"):
            await stranger.status(1.0)
    for client in (friend, wrong_key, *strangers):
        await client.close()
    await server.stop()


async def test_a_client_without_a_certificate_is_refused(tmp_path: Path) -> None:
    """One that trusts the CA and knows the cluster key, and has no certificate of its own."""
    authority = Authority(tmp_path)
    ours = opened(authority.settings())
    server = RpcServer(echo, dict, "secret", tls=ours)
    address = await server.start("127.0.0.1", 0)
    client = WorkerClient(address, "secret", tls=ours)
    bare = grpc.ssl_channel_credentials(authority.file.read_bytes())
    await client._channel.close(None)
    client._channel = grpc.aio.secure_channel(address, bare, [("grpc.ssl_target_name_override", ours.name)])
    client._challenge = client._channel.unary_unary(rpc._CHALLENGE, bytes, bytes)
    with pytest.raises(RefusedError, match=r"unavailable|deadline"):
        await client.status(1.0)
    await client.close()
    await server.stop()


async def test_another_name_is_another_cluster(tmp_path: Path) -> None:
    """One CA may serve several clusters; certificates of another first name are not taken for ours."""
    authority = Authority(tmp_path)
    ours = opened(authority.settings())
    theirs = opened(authority.settings(names=("others.test",)))
    server = RpcServer(echo, dict, "secret", tls=theirs)
    client = WorkerClient(await server.start("127.0.0.1", 0), "secret", tls=ours)
    with pytest.raises(RefusedError, match=r"unavailable|deadline"):
        await client.status(1.0)
    await client.close()
    await server.stop()


def test_contexts_ask_for_both_certificates_and_for_a_recent_version(tmp_path: Path) -> None:
    tls = opened(Authority(tmp_path).settings())
    for context in (tls.accepting, tls.opening):
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
