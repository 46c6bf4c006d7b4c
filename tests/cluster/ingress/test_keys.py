"""From an Authorization to a caller, the same for every front."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.cluster.ingress.errors import HttpProblem
from penstock.cluster.ingress.key_watch import KeyWatch
from penstock.cluster.ingress.keys import Access
from penstock.cluster.key_file import KeyEntry, key_digest, read_key_file

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


def test_a_key_ends_with_its_last_day() -> None:
    now = [1000.0]
    dated = replace(ENTRIES[0], not_after=1000.5)
    access = Access((dated, ENTRIES[1]), calendar=lambda: now[0])
    assert access.authorise([b"Bearer sk-a"]).name == "team-a"
    now[0] = 1000.5
    with pytest.raises(HttpProblem) as refused:
        access.authorise([b"Bearer sk-a"])
    assert refused.value.status == 401
    assert access.authorise([b"Bearer sk-b"]).name == "team-b"


def test_keys_are_exchanged_whole_and_those_that_stay_keep_their_accounts() -> None:
    access = Access(ENTRIES, "master")
    first, second, master = (access.authorise([f"Bearer {key}".encode()]) for key in ("sk-a", "sk-b", "master"))
    lease = first.lease()
    access.replace((replace(ENTRIES[1], operator=False), ENTRIES[0], KeyEntry("new", key_digest("sk-n"))))
    assert access.authorise([b"Bearer sk-a"]) is first
    assert first.account.open_requests == 1
    assert not access.authorise([b"Bearer sk-b"]).operator
    assert second.operator  # of a request that was let in before
    assert access.authorise([b"Bearer master"]) is master
    assert access.authorise([b"Bearer sk-n"]).name == "new"
    access.replace((ENTRIES[1],))
    for key in (b"sk-a", b"sk-n"):
        with pytest.raises(HttpProblem):
            access.authorise([b"Bearer " + key])
    lease.charge_generated(5)  # what was open goes on
    lease.end()
    with pytest.raises(ValueError, match="no keys"):
        Access(()).replace(ENTRIES)


def keys_text(*names: str) -> str:
    return "".join(f"- {{name: {name}, key: sk-{name}}}\n" for name in names)


def test_the_file_is_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Replaced, damaged, gone, back: the keys are always those of the last whole file."""
    path, other = tmp_path / "keys.yaml", tmp_path / "other.yaml"
    path.write_text(keys_text("a", "b"))
    access = Access(read_key_file(path))
    watch = KeyWatch(path, access)

    def known() -> str:
        found = ""
        for name in "abc":
            with contextlib.suppress(HttpProblem):
                found += access.authorise([f"Bearer sk-{name}".encode()]).name
        return found

    assert not watch.check()
    other.write_text(keys_text("b", "c"))
    other.rename(path)
    assert watch.check()
    assert known() == "bc"
    for broken in (keys_text("a", "a"), "- {name: a, key: sk-a", "[]"):
        path.write_text(broken + "#" * len(caplog.records))
        assert [watch.check(), watch.check(), watch.check()] == [False] * 3
        assert known() == "bc"
    path.unlink()
    assert not watch.check()
    assert not watch.check()
    kept = [record.getMessage() for record in caplog.records if "stay as they are" in record.getMessage()]
    assert len(kept) == 4  # once each
    assert not any("sk-" in line for line in kept)
    path.write_text(keys_text("a"))
    assert watch.check()
    assert known() == "a"


def test_it_is_followed_beside_other_work(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(keys_text("a"))
    access = Access(read_key_file(path))

    async def scenario() -> None:
        following = asyncio.ensure_future(KeyWatch(path, access).follow(0.01))
        path.write_text(keys_text("a", "bb"))
        async with asyncio.timeout(5):
            while len(access._callers) < 2:  # noqa: ASYNC110 - there is nothing else to wait on
                await asyncio.sleep(0.01)
        following.cancel()

    asyncio.run(scenario())
    assert access.authorise([b"Bearer sk-bb"]).name == "bb"


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


def test_of_several_keys_none_can_take_all_places_of_the_process() -> None:
    hog, other = (Access(ENTRIES, most_open=4).authorise([f"Bearer {key}".encode()]) for key in ("sk-a", "sk-b"))
    for _ in range(2):
        hog.lease()
    with pytest.raises(HttpProblem) as refused:
        hog.lease()
    assert (refused.value.status, refused.value.code) == (429, "concurrency_limit")
    other.lease()
    only = Access(ENTRIES[:1], most_open=4).authorise([b"Bearer sk-a"])
    for _ in range(4):
        only.lease()
