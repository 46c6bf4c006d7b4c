"""The GPU script at toy size on the CPU: every row is there, replays equal eager steps, the hand-over moves bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "engine_gpu.py"


def run(tmp_path, *more, timeout_s=100):
    out = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "--toy", "--json", str(out), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def check(model):
    assert "ended" not in model, model
    assert [row["batch"] for row in model["decode"]] == [1, 3]
    for row in model["decode"]:
        assert row["replay_equals_eager"] is True
        assert row["eager_ms"] > 0 < row["replay_ms"]
    assert set(model["offline"]) == {"6/3", "mixed"}
    for row in model["offline"].values():
        assert row["output_tok_s"] > 0, row
        assert row["limit_output_tok_s"] > 0 < row["host"]["host_us"]
    assert model["start"]["start_to_first_token_s"] > 0


@pytest.mark.slow
def test_with_the_kernels_of_the_cpu(tmp_path):
    result = run(tmp_path, "--kernels", "cpu", "--model", "qwen3-0.6b")
    check(result["models"]["qwen3-0.6b"])
    assert result["handover"]["tcp"]["content"] == "equal"
    assert "skipped" in result["handover"]["shared_memory"]
    assert "skipped" in result["handover"]["nccl"]
    assert {"device", "versions", "commit", "took_s"} <= set(result)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_with_the_kernels_of_the_gpu_under_the_interpreter(tmp_path):
    result = run(tmp_path, "--kernels", "gpu", "--no-handover", timeout_s=800)
    for name in ("llama-3.1-8b", "qwen3-0.6b"):
        check(result["models"][name])
    moe = result["models"]["qwen3-30b-a3b"]
    if "skipped" not in moe:
        check(moe)


def test_without_a_gpu_the_reason_is_told(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "--json", str(out), "--model", "qwen3-0.6b"]

    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, env=environment, capture_output=True, timeout=60, check=True)
    result = json.loads(out.read_text())
    assert result["models"]["qwen3-0.6b"] == {"skipped": "no GPU is visible to this process"}
    assert result["handover"]["skipped"] == "no GPU is visible to this process"
