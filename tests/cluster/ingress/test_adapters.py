"""The list of adapters: where its names come from, what it follows, and that no file in the directory can harm it."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from pathlib import Path

import pytest
from fakes.adapters import listing, make_adapter, problem, replace_file, served, write_list

from penstock.cluster.ingress import adapter_file
from penstock.cluster.ingress.adapter_file import FILE_NAME, LOCK_NAME, MAX_ADAPTERS, read_entries
from penstock.cluster.ingress.adapters import ADAPTERS_PER_LOOK, Adapters, Listed
from penstock.cluster.ingress.errors import HttpProblem
from penstock.workers.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from penstock.workers.model.config import DecoderConfig

pytestmark = pytest.mark.timeout(60)


def test_nothing_is_listed_without_a_directory() -> None:
    adapters = Adapters()
    assert not adapters.enabled
    assert adapters.find("one") is None
    assert adapters.listed() == ()


def test_both_sources_and_the_configuration_wins(home: Path, tiny_config: DecoderConfig) -> None:
    write_list(home, {"b": "two", "a": "two"})
    adapters = listing(home, tiny_config, a="one")
    assert served(adapters) == ["a", "b"]
    a, b = adapters.find("a"), adapters.find("b")
    assert a is not None
    assert b is not None
    assert (a.folder, b.folder) == ("one", "two")
    assert len(a.revision) == 32
    assert a.revision != b.revision


def test_an_edit_by_hand_is_followed(home: Path, tiny_config: DecoderConfig) -> None:
    adapters = listing(home, tiny_config)
    assert served(adapters) == []
    write_list(home, {"a": "one"})
    adapters.look()
    before = adapters.find("a")
    write_list(home, {"a": "two", "b": "one"})
    adapters.look()
    assert served(adapters) == ["a", "b"]
    assert before is not None
    assert adapters.find("a") != before
    assert adapters.find("b").revision == before.revision  # type: ignore[union-attr]
    (home / FILE_NAME).unlink()
    adapters.look()
    assert served(adapters) == []


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"{",
        b"[]",
        b'{"a": 1}',
        b'{"a": null}',
        b'{"../x": "one"}',
        b'{"a:b": "one"}',
        b'{"": "one"}',
        b'{"tiny": "one"}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": "one"}' + b" " * (1 << 20),
        json.dumps({f"n{i}": "one" for i in range(MAX_ADAPTERS + 1)}).encode(),
    ],
    ids=range(13),
)
def test_junk_leaves_the_list_as_it_was_and_is_said_once(
    home: Path, tiny_config: DecoderConfig, junk: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    write_list(home, {"a": "one"})
    adapters = listing(home, tiny_config)
    write_list(home, junk)
    for _ in range(3):
        adapters.look()
    assert served(adapters) == ["a"]
    assert len([r for r in caplog.records if "stays as it is" in r.message]) == 1
    write_list(home, {"b": "one"})
    adapters.look()
    assert served(adapters) == ["b"]


def test_a_pipe_or_a_folder_in_place_of_the_file_holds_nothing_up(home: Path, tiny_config: DecoderConfig) -> None:
    os.mkfifo(home / FILE_NAME)
    assert served(listing(home, tiny_config, a="one")) == ["a"]
    (home / FILE_NAME).unlink()
    (home / FILE_NAME).mkdir()
    assert served(listing(home, tiny_config, a="one")) == ["a"]


def test_exchanged_files_are_another_revision(home: Path, tiny_config: DecoderConfig) -> None:
    adapters = listing(home, tiny_config, a="one", b="two")
    before, other = adapters.find("a"), adapters.find("b")
    make_adapter(home / "one", tiny_config, seed=9)
    adapters.look()
    after = adapters.find("a")
    assert before is not None
    assert after is not None
    assert (after.name, after.folder) == (before.name, before.folder)
    assert after.revision != before.revision
    assert adapters.find("b") is other, "what has not changed was not read again"


def test_only_what_changed_is_read(home: Path, tiny_config: DecoderConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = listing(home, tiny_config, a="one", b="two", c="gone")
    read: list[str] = []
    original = Adapters._read

    def noting(self: Adapters, name: str, folder: str) -> Listed:
        read.append(name)
        return original(self, name, folder)

    monkeypatch.setattr(Adapters, "_read", noting)
    adapters.look()
    assert read == []
    make_adapter(home / "two", tiny_config, seed=9)
    adapters.look()
    adapters.look()
    assert read == ["b"]


@pytest.mark.parametrize("gone", [CONFIG_FILE, WEIGHTS_FILE])
def test_vanished_files_end_the_listing_with_one_line(
    home: Path, tiny_config: DecoderConfig, gone: str, caplog: pytest.LogCaptureFixture
) -> None:
    adapters = listing(home, tiny_config, a="one", b="two")
    (home / "one" / gone).rename(home / "aside")
    for _ in range(3):
        adapters.look()
    assert served(adapters) == ["b"]
    assert gone in problem(adapters, "a")
    assert len([r for r in caplog.records if "is not served" in r.message]) == 1
    (home / "aside").rename(home / "one" / gone)
    adapters.look()
    assert served(adapters) == ["a", "b"]


def test_a_link_inside_of_the_directory_is_followed(home: Path, tiny_config: DecoderConfig) -> None:
    (home / "now").symlink_to("one")
    adapters = listing(home, tiny_config, a="now")
    before = adapters.find("a")
    (home / "next").symlink_to("two")
    os.replace(home / "next", home / "now")
    adapters.look()
    assert before is not None
    assert adapters.find("a") not in (None, before)


def test_of_very_many_all_are_looked_at_in_turn(home: Path, tiny_config: DecoderConfig) -> None:
    write_list(home, {f"n{number}": "gone" for number in range(2 * ADAPTERS_PER_LOOK)} | {"last": "one"})
    adapters = listing(home, tiny_config)
    before = adapters.find("last")
    make_adapter(home / "one", tiny_config, seed=9)
    for _ in range(3):
        adapters.look()
    assert adapters.find("last") not in (None, before)


def test_loading_and_unloading(home: Path, tiny_config: DecoderConfig) -> None:
    async def run() -> None:
        adapters = listing(home, tiny_config, fixed="two")
        listed = await adapters.load("a", "one")
        assert adapters.find("a") == listed.ref
        assert json.loads((home / FILE_NAME).read_text()) == {"a": "one"}
        assert await adapters.load("a", "one") == listed
        assert (await adapters.load("fixed", "two")).ref is not None
        with pytest.raises(HttpProblem, match="exchanged") as found:
            await adapters.load("a", "two")
        assert (found.value.status, found.value.code) == (400, "adapter_exists")
        assert (await adapters.load("a", "two", in_place=True)).folder == "two"
        for in_place, status in ((False, 400), (True, 409)):
            with pytest.raises(HttpProblem) as found:
                await adapters.load("fixed", "one", in_place)
            assert found.value.status == status
        with pytest.raises(HttpProblem) as found:
            await adapters.unload("fixed")
        assert found.value.status == 409
        await adapters.unload("a")
        assert adapters.find("a") is None
        assert json.loads((home / FILE_NAME).read_text()) == {}
        with pytest.raises(HttpProblem) as found:
            await adapters.unload("a")
        assert (found.value.status, found.value.code) == (404, "adapter_not_found")

    asyncio.run(run())


def test_a_load_that_fails_changes_nothing(home: Path, tiny_config: DecoderConfig) -> None:
    adapters = listing(home, tiny_config)
    asyncio.run(adapters.load("a", "one"))
    before = adapters.find("a")
    replace_file(home / "one" / WEIGHTS_FILE, b"junk")
    with pytest.raises(HttpProblem) as found:
        asyncio.run(adapters.load("a", "one"))
    assert (found.value.status, found.value.code) == (400, "invalid_adapter")
    assert adapters.find("a") is before
    with pytest.raises(HttpProblem) as found:
        asyncio.run(adapters.load("b", "gone"))
    assert (found.value.status, found.value.code) == (404, "adapter_not_found")
    assert [listed.name for listed in adapters.listed()] == ["a"]


def test_a_directory_that_cannot_be_written(
    home: Path, tiny_config: DecoderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = listing(home, tiny_config)
    (home / LOCK_NAME).mkdir()
    with pytest.raises(HttpProblem) as found:
        asyncio.run(adapters.load("a", "one"))
    assert (found.value.status, found.value.code) == (409, "adapters_not_writable")
    assert str(home) not in found.value.message
    (home / LOCK_NAME).rmdir()
    monkeypatch.setattr(adapter_file, "LOCK_PATIENCE_S", 0.1)
    with adapter_file._locked(home), pytest.raises(HttpProblem) as found:
        asyncio.run(adapters.load("a", "one"))
    assert found.value.code == "adapters_not_writable"
    write_list(home, b"junk")
    with pytest.raises(HttpProblem, match="not JSON") as found:
        asyncio.run(adapters.load("a", "one"))
    assert found.value.code == "adapters_not_writable"
    assert adapters.find("a") is None
    assert (home / FILE_NAME).read_bytes() == b"junk"


def test_two_ingresses_lose_no_entry(home: Path, tiny_config: DecoderConfig) -> None:
    """Each loads and unloads names of its own, at once; both follow, and agree in the end."""
    both = [listing(home, tiny_config), listing(home, tiny_config)]

    def work(number: int, adapters: Adapters) -> None:
        for turn in range(20):
            asyncio.run(adapters.load(f"n{number}-{turn}", "one"))
            if turn % 2:
                asyncio.run(adapters.unload(f"n{number}-{turn}"))

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(both)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {f"n{number}-{turn}" for number in range(2) for turn in range(0, 20, 2)}
    assert set(read_entries(home)) == expected
    for adapters in both:
        adapters.look()
        assert set(served(adapters)) == expected
    assert {path.name for path in home.iterdir()} == {"one", "two", FILE_NAME, LOCK_NAME}


def test_following(home: Path, tiny_config: DecoderConfig) -> None:
    following = listing(home, tiny_config, look=False, a="one")

    async def run() -> None:
        task = asyncio.ensure_future(following.follow(0.01))
        await asyncio.wait_for(following.looked.wait(), 10)
        assert following.find("a") is not None
        write_list(home, {"b": "two"})
        for _ in range(2):  # the first may have begun before
            following.looked.clear()
            await asyncio.wait_for(following.looked.wait(), 10)
        assert following.find("b") is not None
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_looking_names_up_keeps_nothing(home: Path, tiny_config: DecoderConfig) -> None:
    adapters = listing(home, tiny_config, a="one")
    for name in ("../../etc", "/etc/passwd", "s3://x", *map(str, range(1000))):
        assert adapters.find(name) is None
    assert len(adapters.listed()) == 1
