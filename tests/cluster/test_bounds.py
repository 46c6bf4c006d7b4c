"""Whatever outsiders can name 100,000 times leaves no more behind than its bound."""

from __future__ import annotations

import asyncio
from unittest import mock

from penstock.cluster.ingress import grammar_check
from penstock.cluster.ingress.exchange import HttpProblem
from penstock.cluster.ingress.grammar_check import GrammarCheck, GrammarVerdict
from penstock.cluster.ingress.keys import Access
from penstock.cluster.ingress.known_fields import MAX_LOGGED, MAX_NAMED, IgnoredFields
from penstock.cluster.ingress.openapi_bodies import Kind
from penstock.cluster.key_file import KeyEntry, key_digest
from penstock.cluster.text import TextCodec
from penstock.router.prefix_index import PrefixIndex
from penstock.router.settings import IndexSettings
from penstock.router.tenants import TenantCounters
from penstock.workers import grammar_store
from penstock.workers.errors import GrammarError
from penstock.workers.grammar_spec import GrammarKind, GrammarSpec
from penstock.workers.grammar_store import GrammarStore
from penstock.workers.protocol import KVEvents

MANY = 100_000


def test_names_of_fields() -> None:
    ignored = IgnoredFields()
    for number in range(MANY):
        assert len(ignored.note(Kind.CHAT, {f"odd_{number}": 1})) == 1
    assert len(ignored._logged) == MAX_LOGGED
    assert len(ignored.note(Kind.CHAT, {f"odd_{number}": 1 for number in range(MANY)})) == MAX_NAMED


def test_keys_that_nobody_has() -> None:
    access = Access((KeyEntry("a", key_digest("sk-a")),))
    refused = 0
    for number in range(MANY):
        try:
            access.authorise([b"Bearer sk-%d" % number])
        except HttpProblem:
            refused += 1
    assert (refused, len(access._callers)) == (MANY, 1)


def test_tenants() -> None:
    counters = TenantCounters({}, max_tenants=1000)
    for number in range(MANY):
        counters.charge(f"tenant-{number}", 1.0)
        assert len(counters) <= 1000


def test_grammars_that_were_tried_out(codec: TextCodec) -> None:
    check = GrammarCheck(codec)
    verdict = (GrammarVerdict.ACCEPTED, "")

    async def scenario() -> None:
        with mock.patch.object(GrammarCheck, "_try", new=mock.AsyncMock(return_value=verdict)):
            for number in range(MANY // 10):
                await check.check(GrammarSpec(GrammarKind.REGEX, f"a{{{number}}}", (0,)), "regex", "t")

    asyncio.run(scenario())
    check.close()
    assert len(check._known) == grammar_check.MAX_KEPT


def test_grammars_that_a_worker_compiled() -> None:
    store = GrammarStore(GrammarError("no vocabulary"), lambda: None)
    for number in range(MANY):
        try:
            store._guide(GrammarSpec(GrammarKind.REGEX, str(number), (0,)), ())
        except GrammarError:
            continue
    store.stop()
    assert len(store._kept) == grammar_store.MAX_KEPT
    assert store.totals().evicted == MANY - grammar_store.MAX_KEPT


def test_blocks_that_a_worker_says_it_has() -> None:
    index = PrefixIndex(IndexSettings(max_entries=5000))
    index.track("w")
    digests = b"".join(number.to_bytes(8, "little") for number in range(1, MANY + 1))
    for place in range(0, len(digests), 8000):
        index.apply_events("w", KVEvents(place // 8000 + 1, digests[place : place + 8000], b""))
    assert len(index.confirmed("w")) <= 10_000  # its rows are a power of two
    assert index.dropped >= MANY - 10_000
