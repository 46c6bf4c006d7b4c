"""What the front reads of a model directory, and the mistakes in one that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes.tiny_model import write_tiny_model

from penstock.cluster.model_directory import ModelDescription, describe
from penstock.cluster.text import load_text
from penstock.workers.errors import ModelError
from penstock.workers.settings import RunnerSettings


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "m")


def described(directory: Path) -> ModelDescription:
    return describe(RunnerSettings(model_dir=str(directory)))


def change(path: Path, **values: Any) -> None:
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, **values}))


def test_description(directory: Path) -> None:
    found = described(directory)
    assert (found.name, found.context_length, found.vocab_size) == ("m", 512, 400)
    assert found.eos_token_ids == (0, 399)
    assert found.defaults.temperature == 0.7
    assert found.revision == described(directory).revision
    change(directory / "config.json", rope_theta=5.0)
    assert found.revision != described(directory).revision


def test_the_oracle_has_no_files() -> None:
    found = describe(RunnerSettings(kind="oracle", oracle_vocab=77))
    assert (found.directory, found.vocab_size, found.eos_token_ids) == (None, 77, ())


def test_greedy_models_are_greedy_by_default(directory: Path) -> None:
    change(directory / "generation_config.json", do_sample=False)
    assert described(directory).defaults.temperature == 0.0


@pytest.mark.parametrize(
    ("file", "values", "says"),
    [
        ("config.json", {"vocab_size": None}, "vocab_size"),
        ("config.json", {"vocab_size": -1}, "vocab_size"),
        ("config.json", {"vocab_size": True}, "vocab_size"),
        ("config.json", {"max_position_embeddings": "long"}, "max_position_embeddings"),
        ("config.json", {"eos_token_id": "</s>"}, "eos_token_id"),
        ("config.json", {"eos_token_id": [1.5]}, "eos_token_id"),
        ("generation_config.json", {"temperature": -1}, "temperature"),
        ("generation_config.json", {"top_p": 2}, "top_p"),
    ],
)
def test_wrong_values(directory: Path, file: str, values: dict[str, Any], says: str) -> None:
    change(directory / file, **values)
    with pytest.raises(ModelError, match=says) as caught:
        described(directory)
    assert file in str(caught.value) or str(directory) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "[" * 100_000])
def test_config_that_is_no_json_object(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        described(directory)


def test_missing_files(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model directory"):
        described(tmp_path / "nowhere")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        described(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json: cannot be read"):
        described(directory)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_an_index_may_not_leave_the_directory(directory: Path, name: str) -> None:
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ModelError, match="not a plain file name"):
        described(directory)


def test_missing_shard(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "model.safetensors", "y": "model-2.safetensors"}}))
    with pytest.raises(ModelError, match=r"model-2\.safetensors: shard"):
        described(directory)
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ModelError, match="weight_map"):
        described(directory)


def test_tokenizer_problems(tmp_path: Path) -> None:
    bare = write_tiny_model(tmp_path / "bare", tokenizer=False)
    with pytest.raises(ModelError, match="skip-tokenizer-init"):
        load_text(described(bare), False, 512)
    assert not load_text(described(bare), True, 512).has_tokenizer
    (bare / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a tokenizer"):
        load_text(described(bare), False, 512)
    whole = write_tiny_model(tmp_path / "whole")
    change(whole / "config.json", vocab_size=100)
    with pytest.raises(ModelError, match="vocab_size 100"):
        load_text(described(whole), False, 512)
    change(whole / "config.json", vocab_size=400)
    change(whole / "tokenizer.json", decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
    with pytest.raises(ModelError, match="WordPiece is not supported"):
        load_text(described(whole), False, 512)
    change(whole / "tokenizer.json", decoder=None)
    with pytest.raises(ModelError, match="decoder none is not supported"):
        load_text(described(whole), False, 512)
