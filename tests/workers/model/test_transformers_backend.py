"""The transformers backend at load: what it refuses and why, what it learns of a module; its check can fail."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.exactness import CheckpointSpec, make_checkpoint
from fakes.foreign_checkpoints import MORE, NAMED, REFUSED, ForeignSpec, make_foreign

from penstock.kernels import ops
from penstock.workers.errors import ConfigError, ModelError
from penstock.workers.model import transformers_check
from penstock.workers.model.transformers_backend import TransformersModel
from penstock.workers.model.transformers_linear import PackedLinear
from penstock.workers.model_build import build_model_runner
from penstock.workers.runner import ModelRunner
from penstock.workers.settings import KVSettings, RunnerSettings, SchedulerSettings

SPECS = {spec.name: spec for spec in [*NAMED, *MORE]}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ForeignSpec], Path]:
    @functools.cache
    def make(spec: ForeignSpec) -> Path:
        return make_foreign(tmp_path_factory.mktemp("foreign") / spec.name, spec)

    return make


def load(model_dir: Path, impl: str = "auto", *, dtype: str = "float32", max_model_len: int = 256) -> ModelRunner:
    settings = RunnerSettings(model_dir=str(model_dir), dtype=dtype, model_impl=impl)
    return build_model_runner(settings, KVSettings(), SchedulerSettings(max_model_len=max_model_len))


def copied(model_dir: Path, target: Path, **changes: Any) -> Path:
    """The same weights under a changed config.json."""
    target.mkdir()
    raw = json.loads((model_dir / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**raw, **changes}))
    (target / "model.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes())
    return target


@pytest.mark.parametrize(("spec", "reason"), REFUSED, ids=lambda value: getattr(value, "name", ""))
def test_refused_architectures(directory: Callable[[ForeignSpec], Path], spec: ForeignSpec, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        load(directory(spec))
    assert str(directory(spec)) in str(caught.value)
    assert json.loads((directory(spec) / "config.json").read_text())["architectures"][0] in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "m.M"}}, "auto_map: model directories with their own code"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quantised"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder: encoder-decoder"),
        ({"add_cross_attention": True}, "add_cross_attention: cross attention"),
        ({"vision_config": {}}, "vision_config: models of several parts"),
        ({"text_config": {"vocab_size": 3}}, "text_config: models of several parts"),
        ({"architectures": ["NoSuchForCausalLM"]}, "NoSuchForCausalLM.* is not Olmo2ForCausalLM"),
        ({"model_type": "no_such"}, "has no decoder for it"),
        ({"architectures": []}, "architectures: missing"),
        ({"vocab_size": 511}, "cannot load it"),
        ({"num_hidden_layers": 4}, "tensors are missing, such as model.layers.3"),
        ({"max_position_embeddings": None}, "max_position_embeddings: missing"),
        ({"dtype": "int8"}, "dtype: 'int8' is not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_configurations(
    directory: Callable[[ForeignSpec], Path], tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        load(copied(directory(SPECS["olmo2"]), tmp_path / "m", **changes))


def test_pickled_weights_are_not_opened(directory: Callable[[ForeignSpec], Path], tmp_path: Path) -> None:
    model_dir = copied(directory(SPECS["olmo2"]), tmp_path / "m")
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are not opened"):
        load(model_dir)


def test_dynamic_rope_is_served_below_its_switch_only(directory: Callable[[ForeignSpec], Path], tmp_path: Path) -> None:
    """Above it, one long sequence would turn the rotation of every other in its step."""
    short = {"rope_parameters": DYNAMIC, "max_position_embeddings": 128}
    model_dir = copied(directory(SPECS["llama"]), tmp_path / "m", **short)
    load(model_dir, max_model_len=128)
    with pytest.raises(ConfigError, match=r"above the model's 128 positions \(max_position_embeddings\)"):
        load(model_dir, max_model_len=129)


def test_longrope_is_served_below_its_switch_only(directory: Callable[[ForeignSpec], Path], tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors, "original_max_position_embeddings": 200}
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 200}
    model_dir = copied(directory(SPECS["phi3"]), tmp_path / "m", **changes)
    load(model_dir, max_model_len=200)
    with pytest.raises(ConfigError, match=r"above the model's 200 positions \(original_max_position_embeddings\)"):
        load(model_dir, max_model_len=201)


def test_the_probe_notices_a_rotation_that_depends_on_others(
    directory: Callable[[ForeignSpec], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should the configuration's names not tell of a switch, the module's behaviour does."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors, "original_max_position_embeddings": 200}
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 200}
    model_dir = copied(directory(SPECS["phi3"]), tmp_path / "m", **changes)
    monkeypatch.setattr("penstock.workers.model.foreign_config._rope_sections", lambda raw: [])
    load(model_dir, max_model_len=200)
    with pytest.raises(ModelError, match="depends on the longest sequence of a step"):
        load(model_dir, max_model_len=201)


@pytest.mark.parametrize(
    ("name", "shape", "windows"),
    [
        ("gpt-neox", (3, 6, 16), [0, 0, 0]),
        ("phi3", (3, 2, 16), [24, 24, 24]),
        ("gemma2", (3, 2, 16), [24, 0, 24]),
        ("gpt-bigcode", (3, 1, 16), [0, 0, 0]),
        ("deepseek-v3", (3, 6, 24), [0, 0, 0]),
    ],
)
def test_what_the_probe_learns(
    directory: Callable[[ForeignSpec], Path], name: str, shape: tuple[int, int, int], windows: list[int]
) -> None:
    runner = load(directory(SPECS[name]), "transformers")
    layout, model = runner.layout, runner._decoder
    assert isinstance(model, TransformersModel)
    assert (layout.num_layers, layout.num_kv_heads, layout.head_dim) == shape
    assert [layer.window for layer in model._attention._layers.values()] == windows
    assert runner.vocab_size == 512
    assert isinstance(getattr(model._head, "lm_head", None) or model._head.embed_out, PackedLinear)


def test_a_window_as_long_as_the_context_is_none(directory: Callable[[ForeignSpec], Path]) -> None:
    spec = SPECS["starcoder2"]
    for length, window in ((40, 0), (41, 40), (8, 0)):
        model: Any = load(directory(spec), max_model_len=length)._decoder
        assert [layer.window for layer in model._attention._layers.values()] == [window] * 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["olmo2", "gpt2", "mixtral"])
def test_half_precision(directory: Callable[[ForeignSpec], Path], name: str, dtype: str) -> None:
    assert load(directory(SPECS[name]), dtype=dtype).layout.dtype == dtype


@pytest.mark.parametrize("broken", ["scale", "window", "layer"])
def test_wrong_attention_is_refused(
    directory: Callable[[ForeignSpec], Path], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """The check at load is no formality: each of these alone makes it fail."""
    right = ops.paged_attention

    def wrong(q: Any, kv: Any, layer: int, plan: Any, scale: float, *, window: int = 0, soft_cap: float = 0.0) -> Any:
        scale = scale * 1.01 if broken == "scale" else scale
        window = window - 1 if broken == "window" else window
        return right(q, kv, 0 if broken == "layer" else layer, plan, scale, window=window, soft_cap=soft_cap)

    spec = ForeignSpec("phi3-narrow", "Phi3Config", {"sliding_window": 8})
    load(directory(spec))
    monkeypatch.setattr(ops, "paged_attention", wrong)
    with pytest.raises(ModelError, match="cannot be paged exactly: logits differ"):
        load(directory(spec))


def test_a_nan_is_no_agreement() -> None:
    logits = [torch.full((3, 4), float("nan"))]
    assert not transformers_check._disagreement(logits, logits, "float32") <= 1.0


def test_choice_of_implementation(
    directory: Callable[[ForeignSpec], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    native = make_checkpoint(tmp_path / "llama", CheckpointSpec())
    caplog.set_level("INFO", "penstock.workers.model_build")
    assert not isinstance(load(native)._decoder, TransformersModel)
    assert "by our own decoder (LlamaForCausalLM is one of our own)" in caplog.text
    ours, theirs = load(native, "penstock"), load(native, "transformers")
    assert isinstance(theirs._decoder, TransformersModel)
    assert "by the transformers backend (asked for)" in caplog.text
    assert ours.layout.compatibility != theirs.layout.compatibility
    other = copied(native, tmp_path / "relu", hidden_act="relu")
    assert isinstance(load(other)._decoder, TransformersModel)
    assert "by the transformers backend (our own decoder: " in caplog.text
    with pytest.raises(ModelError, match="'Olmo2ForCausalLM' is not supported; supported are"):
        load(directory(SPECS["olmo2"]), "penstock")
    with pytest.raises(ConfigError, match="'other' is not one of"):
        load(native, "other")
