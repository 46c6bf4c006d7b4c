"""The process in which grammars of callers are tried out: `python -m penstock.cluster.ingress.grammar_child`.

Started and killed by `grammar_check.py`. The first line on its input is the vocabulary, every further one a grammar;
each is answered by one line: why it cannot be used, or nothing. It ends with its input. What a grammar costs can
only be known by compiling it, so this process bounds its own memory and sets itself an alarm.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path

from penstock.workers.errors import GrammarError
from penstock.workers.grammar import CompiledGrammar, GrammarVocabulary
from penstock.workers.grammar_spec import GrammarKind, GrammarSpec

SPARE_BYTES = 1 << 30  # of address space, for one grammar after the other
_GRACE_S = 1.0  # beyond the time limit that the parent keeps


def main() -> None:
    """Answer until the input ends."""
    raw = json.loads(sys.stdin.readline())
    try:
        vocabulary = GrammarVocabulary(raw["tokenizer"], raw["vocab_size"])
    except GrammarError as error:
        _answer(str(error))
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    _answer("")
    for line in sys.stdin:
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, asked["limit_s"] + _GRACE_S)
        spec = GrammarSpec(GrammarKind(asked["kind"]), asked["text"], tuple(asked["end_token_ids"]))
        problem = _problem_with(spec, vocabulary)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _answer(problem)


def _problem_with(spec: GrammarSpec, vocabulary: GrammarVocabulary) -> str:
    try:
        CompiledGrammar(spec, vocabulary).guide()
    except GrammarError as error:
        return str(error)
    return ""


def _answer(problem: str) -> None:
    sys.stdout.write(json.dumps(problem) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
