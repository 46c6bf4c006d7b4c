"""Joining a Ray cluster that is not there; starting and ending a private one is test_launch's job."""

import socket
import time

import pytest
from fakes.ports import free_port

from penstock.cluster.ray_runtime import check_answers, private_access
from penstock.workers.errors import ConfigError


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_nobody_there_is_told_at_once(scheme: str) -> None:
    address = f"{scheme}127.0.0.1:{free_port()}"
    began = time.monotonic()
    with pytest.raises(ConfigError, match=f"no Ray cluster at {address}") as refused:
        check_answers(address)
    assert refused.value.key == "ray.address"
    assert time.monotonic() - began < 5


def test_somebody_there_and_other_forms_are_left_to_ray() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_answers(f"127.0.0.1:{server.getsockname()[1]}")
    check_answers("auto")


def test_the_token_of_a_private_head_is_random_and_stays_the_same() -> None:
    token = private_access()["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    assert private_access()["RAY_AUTH_TOKEN"] == token
