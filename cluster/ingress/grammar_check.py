"""Whether a caller's grammar can be followed, tried out in processes that may be killed.

One `GrammarCheck` per ingress. `service.py` asks before a request runs, so a hostile grammar ends in a 400 here and
never reaches a worker. Verdicts are kept by digest, refusals too. Knows the child's lines (`grammar_child.py`), not
what grammars mean.

Invariants: a check takes at most `LIMIT_S` once its turn has come; at most `MOST_WAITING` stand in line, of them at
most `MOST_WAITING_EACH` of one tenant; the event loop never waits for a process; no child outlives this object or its
process.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import queue
import select
import subprocess
import sys
import time
import weakref
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor

from penstock.cluster.metrics import GrammarVerdict
from penstock.cluster.text import TextCodec
from penstock.workers.errors import RefusedError, RequestError
from penstock.workers.grammar_spec import GrammarSpec
from penstock.workers.protocol import FailureCode

log = logging.getLogger(__name__)

LIMIT_S = 2.0  # for one grammar
START_S = 60.0  # for a child to read the vocabulary
CHILDREN = 2
MOST_WAITING = 64
MOST_WAITING_EACH = 16  # of one tenant, so that its crowd holds nobody else up for long
MAX_KEPT = 4096
_RETRY_S = 5.0
_COMMAND = (sys.executable, "-m", "penstock.cluster.ingress.grammar_child")


class GrammarChild:
    """One process, started when it is first asked and again after it was killed."""

    def __init__(self, greeting: str) -> None:
        self._greeting = greeting
        self._process: subprocess.Popen[bytes] | None = None

    def try_out(self, spec: GrammarSpec, limit_s: float) -> tuple[GrammarVerdict, str]:
        """Blocks for `limit_s` at most, and for the process's start. Raises RefusedError where none can be started."""
        if self._process is None:
            problem = self._start()
            if problem:
                self.end()
                return GrammarVerdict.REFUSED, problem
        try:
            asked = {"kind": spec.kind, "text": spec.text, "end_token_ids": spec.end_token_ids, "limit_s": limit_s}
            problem = self._ask(json.dumps(asked), limit_s)
        except TimeoutError:
            self.end()
            return GrammarVerdict.TOO_SLOW, f"takes longer than {limit_s:g} s to compile"
        except (OSError, EOFError):
            self.end()
            return GrammarVerdict.DIED, "takes too much memory to compile"
        return (GrammarVerdict.REFUSED, problem) if problem else (GrammarVerdict.ACCEPTED, "")

    def end(self) -> None:
        """Kill the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> str:
        """Why the model's vocabulary cannot be used, or nothing."""
        try:
            # What the library prints when it breaks may hold the caller's text.
            self._process = subprocess.Popen(
                _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            return self._ask(self._greeting, START_S)
        except (OSError, EOFError, TimeoutError) as error:
            self.end()
            log.warning("no process to try grammars out in: %s", type(error).__name__)
            reason = "grammars cannot be tried out at the moment"
            raise RefusedError(FailureCode.OVERLOADED, reason, _RETRY_S) from error

    def _ask(self, line: str, limit_s: float) -> str:
        """The answer to a line. Raises TimeoutError, and EOFError or OSError where the process has ended."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise EOFError
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
        source, found, give_up = process.stdout.fileno(), b"", time.monotonic() + limit_s
        while not found.endswith(b"\n"):
            if not select.select([source], [], [], max(0.0, give_up - time.monotonic()))[0]:
                raise TimeoutError
            more = os.read(source, 1 << 16)
            if not more:
                raise EOFError
            found += more
        return str(json.loads(found))


class GrammarCheck:
    """The verdicts of one ingress. Belongs to one asyncio loop."""

    def __init__(self, text: TextCodec, limit_s: float = LIMIT_S) -> None:
        greeting = json.dumps({"tokenizer": text.tokenizer_json, "vocab_size": text.vocab_size})
        self._limit_s = limit_s
        self._children = [GrammarChild(greeting) for _ in range(CHILDREN)]
        self._idle: queue.SimpleQueue[GrammarChild] = queue.SimpleQueue()
        for child in self._children:
            self._idle.put(child)
        self._threads = ThreadPoolExecutor(CHILDREN, "grammar-check")
        self._known: OrderedDict[bytes, str] = OrderedDict()
        self._waiting: Counter[str] = Counter()  # by tenant
        self.close = weakref.finalize(self, _end, self._children, self._threads)

    async def check(self, spec: GrammarSpec, field: str, tenant: str) -> GrammarVerdict:
        """Raises RequestError (400) naming the field where the grammar cannot be used, RefusedError in a crowd: 429 in
        the tenant's own, else 503."""
        digest = hashlib.sha256(f"{spec.kind}\0{spec.text}".encode(errors="replace")).digest()
        problem = self._known.get(digest)
        verdict = GrammarVerdict.KNOWN
        if problem is None:
            verdict, problem = await self._try(spec, tenant)
            self._known[digest] = problem
            if len(self._known) > MAX_KEPT:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(digest)
        if problem:
            raise GrammarRefusedError(verdict, f"{field}: {problem}", field)
        return verdict

    async def _try(self, spec: GrammarSpec, tenant: str) -> tuple[GrammarVerdict, str]:
        own = self._waiting[tenant] >= MOST_WAITING_EACH
        if own or self._waiting.total() >= MOST_WAITING:
            code = FailureCode.TENANT_LIMIT if own else FailureCode.OVERLOADED
            raise RefusedError(code, "too many new grammars wait to be compiled", self._limit_s)
        self._waiting[tenant] += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._try_out, spec)
        finally:
            self._waiting[tenant] -= 1
            self._waiting += Counter()  # drops those at zero

    def _try_out(self, spec: GrammarSpec) -> tuple[GrammarVerdict, str]:
        child = self._idle.get()
        try:
            return child.try_out(spec, self._limit_s)
        finally:
            self._idle.put(child)


class GrammarRefusedError(RequestError):
    """A grammar that was tried out and cannot be used; `verdict` says in what way."""

    def __init__(self, verdict: GrammarVerdict, message: str, field: str) -> None:
        super().__init__(message, field=field, code="invalid_grammar")
        self.verdict = verdict

    @property
    def only_unsupported(self) -> bool:
        """Nothing is wrong with it but that it asks for what grammars cannot do, as regular expressions that look
        ahead: it need not be refused where it would not be followed anyway."""
        return "not supported" in str(self)


def _end(children: list[GrammarChild], threads: ThreadPoolExecutor) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    for child in children:
        child.end()
