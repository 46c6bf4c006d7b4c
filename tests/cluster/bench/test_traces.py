"""Traces become plans: columns, digits of time, slices, scaling by stated factors; and the published statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from penstock.cluster.bench.traces import Scaling, Slice, read_rows, read_trace
from penstock.cluster.bench.workload import prompt_tokens
from penstock.workers.errors import ConfigError

TRACES = Path(__file__).parents[4] / "shared" / "data" / "traces"
MOONCAKE = (
    '{"timestamp": 1000, "input_length": 1024, "output_length": 8, "hash_ids": [0, 1]}\n'
    '{"timestamp": 2000, "input_length": 90, "output_length": 0, "hash_ids": [9]}\n'
    '{"timestamp": 3000, "input_length": 600, "output_length": 9, "hash_ids": [0, 2]}\n'
)
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
)
BURST = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,1,2,ChatGPT,472,18,490,Conversation log\n45,2,1,GPT-4,1087,0,1087,API log\n118,1,3,ChatGPT,417,276,693,API log\n"
)


@pytest.fixture
def trace(tmp_path: Path):
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_mooncake_scaled_and_shared(trace) -> None:
    found = read_trace(trace("t.jsonl", MOONCAKE), Slice(), Scaling(length_divisor=8, time_stretch=2))
    assert [(p.at_s, p.input_tokens, p.output_tokens) for p in found.plan] == [(0.0, 128, 1), (4.0, 75, 1)]
    assert found.without_output == 1
    first, second = (prompt_tokens(p, i, 400, 0) for i, p in enumerate(found.plan))
    assert (len(first), len(second)) == (128, 75)
    assert first[:64] == second[:64]
    assert first[64:75] != second[64:75]


def test_azure_keeps_every_digit(trace) -> None:
    found = read_trace(trace("t.csv", AZURE), Slice(), Scaling())
    assert [(p.input_tokens, p.output_tokens) for p in found.plan] == [(374, 44), (396, 109)]
    assert found.plan[1].at_s == pytest.approx(4.314579, abs=2e-7)
    later = AZURE.replace("6805900,", "6805900+00:00,").replace("9951690,", "9951690+00:00,")
    assert read_trace(trace("u.csv", later), Slice(), Scaling()).plan == found.plan


def test_burstgpt(trace) -> None:
    found = read_trace(trace("b.csv", BURST), Slice(), Scaling())
    assert [(p.at_s, p.input_tokens, p.output_tokens) for p in found.plan] == [(0.0, 472, 18), (113.0, 417, 276)]
    assert found.without_output == 1


def test_slices(trace) -> None:
    path = trace("t.jsonl", MOONCAKE)
    assert [p.at_s for p in read_trace(path, Slice(start_s=1.5), Scaling()).plan] == [0.5]
    assert len(read_trace(path, Slice(duration_s=1.5), Scaling()).plan) == 1
    assert len(read_trace(path, Slice(count=1), Scaling()).plan) == 1
    short = read_trace(path, Slice(max_tokens=700), Scaling())
    assert (len(short.plan), short.too_long) == (1, 1)
    with pytest.raises(ConfigError, match="no request"):
        read_trace(path, Slice(start_s=99), Scaling())


def test_thinning_keeps_a_share_and_the_clock(trace) -> None:
    rows = "".join(
        f'{{"timestamp": {i}, "input_length": 9, "output_length": 1, "hash_ids": []}}\n' for i in range(4000)
    )
    path = trace("t.jsonl", rows)
    kept = read_trace(path, Slice(), Scaling(keep=0.25), seed=3).plan
    assert 0.22 < len(kept) / 4000 < 0.28
    assert kept == read_trace(path, Slice(), Scaling(keep=0.25), seed=3).plan
    assert kept[-1].at_s > 3.9


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n"])
def test_what_is_no_trace_is_named(trace, text: str) -> None:
    with pytest.raises(ConfigError, match=r"t\.csv"):
        read_trace(trace("t.csv", text), Slice(), Scaling())


@pytest.mark.skipif(not TRACES.is_dir(), reason="the public traces are not beside this checkout")
def test_published_statistics_of_the_azure_trace() -> None:
    rows = list(read_rows(TRACES / "azure_llm_2023_conv.csv"))
    times = np.array([row.at_s for row in rows])
    inputs, outputs = np.array([r.input_tokens for r in rows]), np.array([r.output_tokens for r in rows])
    gaps = np.diff(times)
    assert len(rows) == 19366
    assert round(times[-1] - times[0]) == 3502
    assert gaps.std() / gaps.mean() == pytest.approx(1.09, abs=0.01)
    assert [inputs.mean(), *np.percentile(inputs, [50, 90])] == pytest.approx([1155, 1020, 2735], abs=1)
    assert [outputs.mean(), *np.percentile(outputs, [50, 90]), outputs.max()] == pytest.approx(
        [211, 129, 424, 1000], abs=1
    )
    stretched = np.diff(
        np.array(
            [p.at_s for p in read_trace(TRACES / "azure_llm_2023_conv.csv", Slice(), Scaling(time_stretch=3.7)).plan]
        )
    )
    assert stretched.std() / stretched.mean() == pytest.approx(gaps.std() / gaps.mean(), rel=1e-6)


@pytest.mark.skipif(not TRACES.is_dir(), reason="the public traces are not beside this checkout")
def test_the_mooncake_trace_is_read_whole() -> None:
    rows = list(read_rows(TRACES / "mooncake_conversation.jsonl"))
    assert len(rows) == 12031
    assert round(np.mean([row.input_tokens for row in rows])) == 12035
    assert round(np.mean([row.output_tokens for row in rows])) == 343
