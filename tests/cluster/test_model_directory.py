"""What the front reads of a model directory, and the mistakes in one that it names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes.tiny_model import write_tiny_model
from rich.console import Console

from penstock.cluster.config import load_config
from penstock.cluster.ingress.settings import ingress_settings
from penstock.cluster.model_directory import GenerationDefaults, ModelDescription, describe
from penstock.cluster.settings import ClusterConfig, FrontSettings
from penstock.cluster.startup_report import StartupReport
from penstock.cluster.text import load_text
from penstock.workers.errors import ConfigError, ModelError
from penstock.workers.settings import RunnerSettings, WeightSettings


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


def test_weights_may_be_elsewhere_only_where_workers_take_them_from_peers(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        describe(RunnerSettings(model_dir=str(directory)), WeightSettings())
    assert describe(RunnerSettings(model_dir=str(directory)), WeightSettings(source="peer")).vocab_size == 400
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(ModelError, match="is missing"):
        describe(RunnerSettings(model_dir=str(directory)), WeightSettings(source="peer"))


def test_the_oracle_has_no_files() -> None:
    found = describe(RunnerSettings(kind="oracle", oracle_vocab=77))
    assert (found.directory, found.vocab_size, found.eos_token_ids) == (None, 77, ())


def test_greedy_models_are_greedy_by_default(directory: Path) -> None:
    change(directory / "generation_config.json", do_sample=False)
    assert described(directory).defaults.temperature == 0.0


def test_all_defaults_of_the_generation_config(directory: Path) -> None:
    stated = {"top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1, "max_new_tokens": 64}
    change(directory / "generation_config.json", **stated)
    found = described(directory).defaults
    assert found == GenerationDefaults(0.7, 0.9, 20, 0.05, 1.1, 64)
    assert found.stated()["repetition_penalty"] == 1.1
    change(directory / "generation_config.json", do_sample=False)
    assert described(directory).defaults == GenerationDefaults(temperature=0.0, repetition_penalty=1.1, max_tokens=64)
    assert GenerationDefaults().stated() == {}


def test_generation_defaults_can_be_switched_off(directory: Path) -> None:
    model = described(directory)
    for setting, temperature in (("auto", 0.7), ("vllm", 1.0), ("none", 1.0)):
        config = ClusterConfig(front=FrontSettings(generation_config=setting))
        assert ingress_settings(config, model).defaults.temperature == temperature


def test_the_report_tells_the_defaults(directory: Path) -> None:
    console = Console(record=True, width=200)
    StartupReport(console).generation(described(directory), "auto")
    StartupReport(console).generation(described(directory), "vllm")
    lines = console.export_text().splitlines()
    assert lines[0] == "Sampling defaults of generation_config.json: temperature 0.7"
    assert lines[1] == "End tokens of the model directory: 0, 399"
    assert lines[2].endswith("(not applied: --generation-config vllm)")


def test_end_tokens_are_the_union_of_three_places(directory: Path) -> None:
    codec = load_text(described(directory), False, 512)
    assert codec.eos_token_ids == (0, 2, 399)  # config, tokenizer (<|im_end|>), generation config


@pytest.mark.parametrize(
    ("architecture", "keys", "context", "key"),
    [
        ("OPTForCausalLM", {"max_position_embeddings": 70}, 70, "max_position_embeddings"),
        ("GPT2LMHeadModel", {"n_positions": 71, "n_ctx": 99}, 71, "n_positions"),
        ("OddForCausalLM", {"n_ctx": 72}, 72, "n_ctx"),
        ("OddForCausalLM", {"max_sequence_length": 73}, 73, "max_sequence_length"),
        ("OddForCausalLM", {"seq_length": 74}, 74, "seq_length"),
        (
            "Phi3ForCausalLM",
            {
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
            },
            4096,
            "original_max_position_embeddings",
        ),
    ],
)
def test_architectures_that_are_not_our_own(
    directory: Path, architecture: str, keys: dict[str, Any], context: int, key: str
) -> None:
    values: dict[str, Any] = {"max_position_embeddings": None, "architectures": [architecture], **keys}
    change(directory / "config.json", **values)
    found = described(directory)
    assert (found.context_length, found.length_key, found.model_impl) == (context, key, "transformers")
    assert found.model_impl_reason == f"{architecture} is none of our own decoders"
    assert (found.vocab_size, found.eos_token_ids) == (400, (0, 399))


def test_the_code_that_runs_is_derived_and_can_be_stated(directory: Path) -> None:
    def value_and_source(**stated: object) -> tuple[str, str]:
        values = {"runner.model_dir": str(directory), **{k.replace("_", ".", 1): v for k, v in stated.items()}}
        config = load_config(values=values, environment={})
        return config.runner.model_impl, config.sources["runner.model_impl"]

    assert value_and_source() == ("penstock", "LlamaForCausalLM is one of our own")
    assert value_and_source(runner_model_impl="transformers") == ("transformers", "Python")
    with pytest.raises(ConfigError, match="model_impl"):
        value_and_source(runner_model_impl="other")
    change(directory / "config.json", architectures=["OPTForCausalLM"])
    assert value_and_source()[0] == "transformers"
    with pytest.raises(ModelError, match="OPTForCausalLM"):
        value_and_source(runner_model_impl="penstock")


def test_no_torch_is_needed_to_describe(directory: Path) -> None:
    change(directory / "config.json", architectures=["OPTForCausalLM"])
    code = (
        "import sys; from penstock.cluster.model_directory import describe; "
        "from penstock.workers.settings import RunnerSettings; "
        f"describe(RunnerSettings(model_dir={str(directory)!r})); "
        "raise SystemExit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


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
        ("generation_config.json", {"top_k": 2.5}, "top_k"),
        ("generation_config.json", {"repetition_penalty": 0}, "repetition_penalty"),
        ("generation_config.json", {"max_new_tokens": 0}, "max_new_tokens"),
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
