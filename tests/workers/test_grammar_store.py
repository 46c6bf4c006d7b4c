"""Grammars are compiled once, off the caller's thread; refusals are remembered too; both have a bound."""

from __future__ import annotations

import threading
from concurrent.futures import wait
from pathlib import Path
from unittest import mock

import pytest
from fakes.grammars import ENDS, SPECS, VOCAB

from penstock.cluster.model_directory import EMBEDDED_MODEL
from penstock.workers import grammar_store
from penstock.workers.errors import GrammarError
from penstock.workers.grammar import CompiledGrammar, GrammarVocabulary
from penstock.workers.grammar_spec import GrammarKind, GrammarSpec
from penstock.workers.grammar_store import open_grammars
from penstock.workers.totals import GrammarTotals

VOCABULARY = GrammarVocabulary((EMBEDDED_MODEL / "tokenizer.json").read_text(), VOCAB)


def test_the_second_request_finds_the_grammar_compiled() -> None:
    woken = threading.Semaphore(0)
    store = open_grammars(str(EMBEDDED_MODEL), VOCAB, woken.release)
    first, second = (store.begin(SPECS[0], ()).result(10) for _ in range(2))
    assert (first.mask == second.mask).all()
    assert first is not second
    assert store.totals() == GrammarTotals(compiled=1, found=1)
    bad = GrammarSpec(GrammarKind.REGEX, "[", ENDS)
    for _ in range(2):
        with pytest.raises(GrammarError, match="unclosed"):
            store.begin(bad, ()).result(10)
    assert store.totals() == GrammarTotals(compiled=2, found=2)
    assert all(woken.acquire(timeout=5) for _ in range(4))
    store.stop()


def test_what_is_kept_has_a_bound() -> None:
    store = open_grammars(str(EMBEDDED_MODEL), VOCAB, lambda: None)
    with mock.patch.object(grammar_store, "MAX_KEPT", 3):
        futures = [store.begin(GrammarSpec(GrammarKind.REGEX, f"a{{{n}}}", ENDS), ()) for n in (1, 2, 3, 1, 4, 5, 1)]
        wait(futures)
    assert store.totals() == GrammarTotals(compiled=5, found=2, evicted=2)
    store.stop()


def test_begin_does_not_wait_and_the_given_up_are_not_compiled() -> None:
    store = open_grammars(str(EMBEDDED_MODEL), VOCAB, lambda: None)
    gate = threading.Event()

    def slowly(spec: GrammarSpec, vocabulary: GrammarVocabulary) -> CompiledGrammar:
        gate.wait(10)
        return CompiledGrammar(spec, vocabulary)

    with mock.patch.object(grammar_store, "CompiledGrammar", slowly):
        first, *others = [store.begin(GrammarSpec(GrammarKind.REGEX, f"b{{{n}}}", ENDS), ()) for n in (1, 2, 3)]
        assert not first.done()
        assert all(other.cancel() for other in others)
        gate.set()
        assert first.result(10).mask.any()
    assert store.totals().compiled == 1
    store.stop()


@pytest.mark.parametrize("content", [None, b"\xff", b"{}"])
def test_without_a_usable_tokenizer_every_grammar_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    store = open_grammars(str(tmp_path), VOCAB, lambda: None)
    with pytest.raises(GrammarError, match=r"tokenizer"):
        store.begin(SPECS[0], ()).result(10)
    store.stop()
