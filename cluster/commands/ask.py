"""Asks a running server for one JSON document, for the commands."""

from __future__ import annotations

from typing import Any

import httpx

from penstock.cluster.client_answers import problem_of, unreachable
from penstock.cluster.trust import trust

TIMEOUT_S = 10.0


def ask(url: str, path: str, key: str) -> dict[str, Any]:
    """The answer. Raises RefusedError when nobody answers, and what the server's own answer says otherwise."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{url}{path}", headers=headers, timeout=TIMEOUT_S, verify=trust())
    except httpx.TransportError as error:
        raise unreachable(url, error) from error
    if answer.status_code != httpx.codes.OK:
        raise problem_of(answer.status_code, answer.content, answer.headers)
    found: dict[str, Any] = answer.json()
    return found
