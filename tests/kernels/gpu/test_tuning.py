"""The lookup of launch configurations: total, nearest in log space, safe with any GPU and any file, said once."""

import json
import logging

import pytest

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels.gpu import tuning
from penstock.kernels.gpu.tuning import Entry, KernelTable, bucket, config_for, nearest, parse_table, trying

DEFAULT = {"BLOCK": 1, "num_warps": 4}


def table(*shapes, match=(), fraction=0.5):
    entries = tuple(Entry({"T": t, "M": m}, {"BLOCK": t}, fraction) for t, m in shapes)
    return KernelTable(entries, frozenset(match))


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A function that makes this machine a card with the given table file."""

    def install(name, document):
        (tmp_path / "h100.json").write_text(document if isinstance(document, str) else json.dumps(document))
        monkeypatch.setattr(tuning, "TABLES", tmp_path)
        monkeypatch.setattr(tuning, "current_gpu", lambda: name)
        for cached in (tuning._config, tuning._say_once, tuning.load_table):
            cached.cache_clear()

    yield install
    for cached in (tuning._config, tuning._say_once, tuning.load_table):
        cached.cache_clear()


def document(*entries, match=()):
    return {"kernels": {"gemm": {"match": list(match), "entries": list(entries)}}}


TUNED = {"key": {"T": 64, "M": 4096}, "config": {"BLOCK": 64, "num_warps": 8}, "fraction": 0.9}


def test_the_same_bucket_comes_before_a_nearer_sum_of_distances():
    assert nearest(table((64, 4096), (128, 4096)), {"T": 70, "M": 4096}).config == {"BLOCK": 64}
    assert nearest(table((64, 4096), (128, 4096)), {"T": 100, "M": 4096}).config == {"BLOCK": 128}
    assert nearest(table((4096, 64), (64, 4096)), {"T": 130, "M": 4096}).config == {"BLOCK": 64}


def test_far_other_and_unmatched_shapes_have_none():
    known = table((64, 4096), match=("M",))
    assert nearest(known, {"T": 64 << 4, "M": 4096}) is None
    assert nearest(known, {"T": 64, "M": 4097}) is None
    assert nearest(known, {"T": 64}) is None
    assert nearest(known, {"T": 64, "K": 4096}) is None
    assert nearest(known, {"T": 64 << 3, "M": 4096}) is not None


def test_equals_go_to_the_first():
    both = KernelTable((Entry({"T": 8}, {"a": 1}, 0.1), Entry({"T": 8}, {"a": 2}, 0.9)))
    assert nearest(both, {"T": 8}).config == {"a": 1}


def test_an_unmeasured_entry_counts_in_its_own_bucket_only():
    known = table((64, 4096), fraction=None)
    assert nearest(known, {"T": 64, "M": 4096}) is not None
    assert nearest(known, {"T": 128, "M": 4096}) is None


@given(values=st.lists(st.integers(0, 10**9), min_size=2, max_size=20))
@settings(deadline=None, max_examples=60)
def test_buckets_are_monotone(values):
    values.sort()
    numbers = [bucket(value) for value in values]
    assert numbers == sorted(numbers)
    assert bucket(0) < bucket(1)


@given(key=st.dictionaries(st.sampled_from(["T", "M", "x"]), st.integers(-5, 10**9), max_size=3))
@settings(deadline=None, max_examples=60)
def test_the_lookup_is_total(key):
    assert config_for("no such kernel", key) == tuning.PLAIN_DEFAULT
    assert config_for("gemm", key, DEFAULT) == DEFAULT
    found = nearest(table((64, 4096), (1, 0)), key)
    assert found is None or found.key.keys() == key.keys()


def test_the_table_of_the_card_lies_over_the_default(card, caplog):
    card("nvidia h100 80gb hbm3", document(TUNED))
    with caplog.at_level(logging.INFO, logger=tuning.logger.name):
        for tokens in (64, 65, 64):
            assert config_for("gemm", {"T": tokens, "M": 4096}, {**DEFAULT, "extra": 3}) == {
                "BLOCK": 64,
                "num_warps": 8,
                "extra": 3,
            }
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "'T': 64" in caplog.text
    assert "0.90 of the bound" in caplog.text


def test_a_shape_without_an_entry_warns_once(card, caplog):
    card("nvidia h100 80gb hbm3", document(TUNED))
    with caplog.at_level(logging.INFO, logger=tuning.logger.name):
        for tokens in (9000, 9001, 9000):
            assert config_for("gemm", {"T": tokens, "M": 4096}, DEFAULT) == DEFAULT
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "gemm on nvidia h100 80gb hbm3: no tuned configuration near {'M': 4096, 'T': 8192}" in caplog.text


@pytest.mark.parametrize("name", ["nvidia a100-sxm4-80gb", "some card", "", "nvidia h1000"])
def test_an_unknown_card_has_defaults_and_one_warning(name, card, caplog):
    card(name, document(TUNED))
    with caplog.at_level(logging.WARNING, logger=tuning.logger.name):
        for _ in range(3):
            assert config_for("gemm", {"T": 64, "M": 4096}, DEFAULT) == DEFAULT
    assert caplog.text.count("no table of tuned kernels") == 1


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"kernels": 3}', '{"kernels": {"gemm": {"entries": [{"key": {"T": "x"}, "config": {}}]}}}'],
)
def test_a_broken_file_is_as_good_as_none(text, card, caplog):
    card("nvidia h100", text)
    with caplog.at_level(logging.WARNING, logger=tuning.logger.name):
        assert config_for("gemm", {"T": 64, "M": 4096}, DEFAULT) == DEFAULT
    assert "is not a table of tuned kernels" in caplog.text


def test_without_a_card_nothing_is_said(caplog):
    with caplog.at_level(logging.INFO, logger=tuning.logger.name):
        tuning._config.cache_clear()
        assert tuning._config(None, "gemm", (("T", 1),), (("num_warps", 2),)) == (("num_warps", 2),)
    assert caplog.text == ""


def test_trying_lays_a_candidate_over_the_default_and_hears_what_was_asked():
    with trying("gemm", {"BLOCK": 7}) as trial:
        assert config_for("gemm", {"T": 3}, DEFAULT) == {"BLOCK": 7, "num_warps": 4}
        assert config_for("other", {"T": 3}, DEFAULT) == DEFAULT
    assert trial.asked == [({"T": 3}, DEFAULT)]
    assert config_for("gemm", {"T": 3}, DEFAULT) == DEFAULT


def test_committed_tables_are_tables_and_say_whether_they_were_measured():
    paths = sorted(tuning.TABLES.glob("*.json"))
    assert paths
    for path in paths:
        found = json.loads(path.read_text())
        kernels = parse_table(found)
        assert kernels
        if not found["measured"]:
            assert "untuned" in found["note"]
            for known in kernels.values():
                assert all(entry.fraction is None and entry.config == {} for entry in known.entries)
        else:
            assert all(0 < entry.fraction <= 1.1 for known in kernels.values() for entry in known.entries)
