"""Log lines are one line each, in both formats, and tracebacks do not quote what a caller sent."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from penstock.workers.errors import ConfigError
from penstock.workers.logs import configure, formatter
from penstock.workers.settings import LogSettings

CANARY = "do-not-tell"


@pytest.fixture(params=["text", "json"])
def log(request: pytest.FixtureRequest) -> Iterator[tuple[logging.Logger, io.StringIO, str]]:
    """A logger of the package, what it wrote, and the format."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter(request.param, "decode-0"))
    logger = logging.getLogger("penstock.test_logs")
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    yield logger, stream, request.param
    logger.removeHandler(handler)


Log = tuple[logging.Logger, io.StringIO, str]


def test_a_record_is_one_line_whatever_it_holds(log: Log) -> None:
    logger, stream, _ = log
    logger.info("id %s", "a\nERROR forged\r\x1b[2J\u2028\x85end", extra={"fields": {"id": 'x\ny="z"', "ms": 1.5}})
    written = stream.getvalue()
    assert written.count("\n") == 1
    assert len(written.splitlines()) == 1
    assert "\x1b" not in written
    assert "decode-0" in written


def test_json_lines_parse(log: Log) -> None:
    logger, stream, kind = log
    logger.warning("over %d", 3, extra={"fields": {"status": 200}})
    if kind == "json":
        line = json.loads(stream.getvalue())
        assert line["message"] == "over 3"
        assert (line["level"], line["part"], line["status"]) == ("warning", "decode-0", 200)
    else:
        assert stream.getvalue().endswith("WARNING decode-0 penstock.test_logs: over 3 status=200\n")


def test_exceptions_tell_their_place_and_not_their_words(log: Log) -> None:
    logger, stream, _ = log

    def inner(text: str) -> None:
        raise KeyError(text)

    try:
        try:
            inner(CANARY)
        except KeyError as error:
            raise ValueError(f"bad: {CANARY}") from error
    except ValueError:
        logger.exception("failed")
    written = stream.getvalue()
    assert written.count("\n") == 1
    assert CANARY not in written
    assert "KeyError" in written
    assert "ValueError" in written
    assert "inner" in written
    assert "test_logs.py" in written


def test_our_own_and_the_machines_errors_keep_theirs(log: Log) -> None:
    logger, stream, _ = log
    for error in (ConfigError("kv.num_blocks is wrong", "kv.num_blocks"), OSError(28, "No space left on device")):
        try:
            raise error
        except (ConfigError, OSError):
            logger.exception("failed")
    assert "kv.num_blocks is wrong" in stream.getvalue()
    assert "No space left" in stream.getvalue()


def test_an_exception_that_names_itself_as_its_cause_ends(log: Log) -> None:
    logger, stream, _ = log
    first, second = ValueError(), TypeError()
    first.__cause__, second.__cause__ = second, first
    logger.error("failed", exc_info=first)
    assert stream.getvalue().count("ValueError") == 1


def test_configure_replaces_what_was_there() -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    stream = io.StringIO()
    try:
        configure(LogSettings(format="json", level="warning"), "w", stream)
        logging.getLogger("penstock.x").info("unheard")
        logging.getLogger("penstock.x").warning("heard")
        assert json.loads(stream.getvalue())["message"] == "heard"
    finally:
        for handler in root.handlers[:]:
            root.removeHandler(handler)
        for handler in before:
            root.addHandler(handler)
        root.setLevel(level)
