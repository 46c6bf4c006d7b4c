"""What the start-up report shows, and what it keeps to itself."""

import io

from rich.console import Console

from penstock.cluster.config import load_config
from penstock.cluster.startup_report import StartupReport


def new_report() -> tuple[StartupReport, io.StringIO]:
    out = io.StringIO()
    return StartupReport(Console(file=out, width=200, force_terminal=False)), out


def test_values_come_with_their_origin_and_secrets_stay_hidden() -> None:
    report, out = new_report()
    values = {"runner.kind": "oracle", "front.port": 8123, "front.api_key": "very-secret-key"}
    report.configuration(load_config(values=values, environment={}))
    lines = {line.split()[0]: line.split() for line in out.getvalue().splitlines() if line.strip()}
    assert lines["front.port"][1:] == ["8123", "Python"]
    assert lines["front.api_key"][1:] == ["(set)", "Python"]
    assert "very-secret-key" not in out.getvalue()


def test_progress_sizes_and_the_way_to_ask() -> None:
    report, out = new_report()
    report.begin_loading(steps=1)
    with report.phase("Ray"):
        pass
    report.step("Ray runs")
    report.end_loading()
    facts = {"worker_id": "d0", "num_blocks": 512, "block_size": 16, "kv_bytes": 1 << 29, "load_s": 1.25}
    report.sizes([facts], max_model_len=2048)
    report.ready("http://h:1", "m", chat=True)
    text = out.getvalue()
    for words in ("Ray runs (", "d0: KV pool 0.50 GiB, 512 blocks of 16, 8,192 tokens, enough for 4.0 sequences"):
        assert words in text
    assert "Ray 0.0 s" in text
    assert "curl -N http://h:1/v1/chat/completions" in text
    report.ready("http://h:1", "m", chat=False)
    assert "curl -N http://h:1/v1/completions" in out.getvalue()
