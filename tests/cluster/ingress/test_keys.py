"""From an Authorization to a caller, the same for every front."""

from __future__ import annotations

import pytest

from penstock.cluster.ingress.errors import HttpProblem
from penstock.cluster.ingress.keys import Access
from penstock.cluster.key_file import KeyEntry, key_digest

ENTRIES = (
    KeyEntry("team-a", key_digest("sk-a"), tenant="research", models=("tiny",)),
    KeyEntry("team-b", key_digest("sk-b"), tenant="team-b", operator=True),
)


def test_each_key_is_its_caller() -> None:
    access = Access(ENTRIES, "master")
    first, second, master = (access.authorise([f"Bearer {key}".encode()]) for key in ("sk-a", "sk-b", "master"))
    assert (first.name, first.tenant, first.operator) == ("team-a", "research", False)
    assert (second.name, second.operator) == ("team-b", True)
    assert (master.name, master.tenant, master.operator) == ("api-key", "default", True)
    assert access.authorise([b"Bearer sk-a"]) is first
    first.check_model("tiny")
    second.check_model("anything")
    with pytest.raises(HttpProblem) as lacking:
        first.check_model("other")
    assert (lacking.value.status, lacking.value.kind, lacking.value.param) == (403, "permission_error", "model")


@pytest.mark.parametrize(
    "stated",
    [
        [],
        [b""],
        [b"Bearer "],
        [b"Bearer sk-c"],
        [b"Bearer sk-a "],
        [b"Bearer  sk-a"],
        [b"bearer sk-a"],
        [b"Basic sk-a"],
        [b"sk-a"],
        [b"Bearer sk-a", b"Bearer sk-a"],
        [b"Bearer " + key_digest("sk-a")],
        [b"Bearer " + key_digest("sk-a").hex().encode()],
        [b"Bearer \xff\xfe"],
    ],
)
def test_everything_else_is_refused(stated: list[bytes]) -> None:
    with pytest.raises(HttpProblem) as refused:
        Access(ENTRIES).authorise(stated)
    assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")


def test_without_keys_everybody_is_anonymous() -> None:
    access = Access(())
    assert not access.asks_for_keys
    assert access.authorise([b"Bearer x", b"y"]) is access.authorise([])
    assert access.authorise([]).operator
    assert Access((), "k").asks_for_keys


def test_neither_key_nor_digest_is_kept_in_the_open() -> None:
    """A dump of the table tells nothing that could be looked up elsewhere."""
    first, second = Access(ENTRIES), Access(ENTRIES)
    assert not first._callers.keys() & {key_digest("sk-a"), b"sk-a"}
    assert not first._callers.keys() & second._callers.keys()
