"""Compiles the grammars of one worker on a thread of its own, and keeps the last ones.

Made by `assembly.py`; the scheduler asks it for a guide when a request comes and lets the request wait in the queue
until the guide is there, so that no step ever waits for a grammar. Knows no requests and no scheduler.

Invariants: `begin` never blocks; at most `MAX_KEPT` compiled grammars and as many refusals are kept.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from penstock.workers import fault_points
from penstock.workers.errors import GrammarError
from penstock.workers.fault_points import Point
from penstock.workers.grammar import CompiledGrammar, GrammarVocabulary
from penstock.workers.grammar_spec import GrammarSpec
from penstock.workers.protocol import Tokens
from penstock.workers.scheduler.grammars import Guide
from penstock.workers.totals import GrammarTotals

log = logging.getLogger(__name__)

MAX_KEPT = 64
MAX_TOKENIZER_BYTES = 256 << 20


class GrammarStore:
    """Guides for sequences. `begin` is called on the engine's thread, `totals` on any."""

    def __init__(self, vocabulary: GrammarVocabulary | GrammarError, wake: Callable[[], None]) -> None:
        """`vocabulary`: of the model, or why it has none. `wake` is called from another thread after every answer."""
        self._vocabulary = vocabulary
        self._wake = wake
        self._kept: OrderedDict[GrammarSpec, CompiledGrammar | GrammarError] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._compiled = self._found = self._evicted = 0

    def begin(self, spec: GrammarSpec, emitted: Tokens) -> Future[Guide]:
        """A guide after the `emitted` tokens, to come; the future raises GrammarError where there can be none."""
        future: Future[Guide] = self._thread.submit(self._guide, spec, emitted)
        future.add_done_callback(lambda _: self._wake())
        return future

    def totals(self) -> GrammarTotals:
        """What was done since the start."""
        return GrammarTotals(self._compiled, self._found, self._evicted)

    def stop(self) -> None:
        """Compile nothing more. What is being compiled is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _guide(self, spec: GrammarSpec, emitted: Tokens) -> Guide:
        found = self._kept.get(spec)
        if found is None:
            self._compiled += 1
            found = self._kept[spec] = self._compile(spec)
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
                self._evicted += 1
        else:
            self._found += 1
            self._kept.move_to_end(spec)
        if isinstance(found, GrammarError):
            raise GrammarError(str(found))
        return found.guide(emitted)

    def _compile(self, spec: GrammarSpec) -> CompiledGrammar | GrammarError:
        if isinstance(self._vocabulary, GrammarError):
            return self._vocabulary
        try:
            if fault_points.plan is not None:
                fault_points.plan.reach(Point.GRAMMAR_COMPILE, "")
            return CompiledGrammar(spec, self._vocabulary)
        except GrammarError as error:
            return error


def open_grammars(model_dir: str, vocab_size: int, wake: Callable[[], None]) -> GrammarStore:
    """The store of a worker that serves this model; without a usable tokenizer it refuses every grammar."""
    return GrammarStore(_vocabulary(model_dir, vocab_size), wake)


def _vocabulary(model_dir: str, vocab_size: int) -> GrammarVocabulary | GrammarError:
    path = Path(model_dir) / "tokenizer.json"
    try:
        if not model_dir or not path.is_file() or path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise GrammarError("this model has no tokenizer.json, which grammars need")
        return GrammarVocabulary(path.read_text(encoding="utf-8"), vocab_size)
    except (OSError, UnicodeDecodeError) as error:
        log.warning("requests with a grammar will be refused: %s: %s", path, error)
        return GrammarError("this model's tokenizer.json cannot be read")
    except GrammarError as error:
        log.info("requests with a grammar will be refused: %s", error)
        return error
