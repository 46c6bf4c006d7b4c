"""What the front reads from a Hugging Face model directory: sizes, stop tokens, defaults; never a weight.

Used by `derived.py` (context length, which code runs the model), `text.py` (tokenizer, eos) and the ingress. Errors are
`ModelError`s that name the file and the key, raised before any worker starts. Needs no torch: what only the loaded
module can tell of an architecture that is not our own, the workers find out.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from penstock.workers.errors import ModelError
from penstock.workers.model.config import DecoderConfig, read_raw_config
from penstock.workers.model.foreign_config import ForeignConfig
from penstock.workers.model.implementation import choose_implementation
from penstock.workers.settings import RunnerSettings, WeightSettings

EMBEDDED_MODEL = Path(__file__).parent / "embedded_model"
MAX_JSON_BYTES = 64 << 20
# Field of GenerationDefaults -> key of generation_config.json, least, most, type.
_DEFAULT_FIELDS: dict[str, tuple[str, float, float, type[int] | type[float]]] = {
    "temperature": ("temperature", 0.0, 100.0, float),
    "top_p": ("top_p", 1e-9, 1.0, float),
    "top_k": ("top_k", 0, 1 << 31, int),
    "min_p": ("min_p", 0.0, 1.0, float),
    "repetition_penalty": ("repetition_penalty", 0.01, 100.0, float),
    "max_tokens": ("max_new_tokens", 1, 1 << 31, int),
}


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling values used where a request gives none (generation_config.json, as vLLM does)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None  # None: to the end of the context

    def stated(self) -> dict[str, float]:
        """Those that differ from what holds without a file."""
        plain = GenerationDefaults()
        names = [known.name for known in fields(self)]
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(plain, name)}


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model as the front sees it."""

    directory: Path | None  # None: the oracle, which has no files
    name: str
    context_length: int  # tokens the checkpoint was made for
    vocab_size: int
    eos_token_ids: tuple[int, ...]  # of config and generation config; the tokenizer's own is added in `text.py`
    revision: str  # hash over the configuration and the names and sizes of the weight files
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    length_key: str = "max_position_embeddings"  # where the context length stands in config.json
    model_impl: str = "penstock"  # penstock | transformers: the code that will run it
    model_impl_reason: str = ""
    architecture: DecoderConfig | ForeignConfig | None = None  # sizes, as that code reads them; None: the oracle


def describe(runner: RunnerSettings, weights: WeightSettings | None = None) -> ModelDescription:
    """Read the directory that `runner` names (empty: the embedded model). Raises ModelError and ConfigError.

    Workers may do without weight files here where `weights` tell them to take those from peers.
    """
    if runner.kind == "oracle":
        return ModelDescription(None, "oracle", 1 << 20, runner.oracle_vocab, (), "oracle")
    directory = Path(runner.model_dir) if runner.model_dir else EMBEDDED_MODEL
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such model directory", path=str(directory))
    config, config_path = read_raw_config(directory), directory / "config.json"
    chosen = choose_implementation(runner.model_impl, config, str(config_path))
    generation_path = directory / "generation_config.json"
    generation = read_json(generation_path, required=False)
    elsewhere = weights is not None and weights.source == "peer" and not any(directory.glob("*.safetensors*"))
    shards = [] if elsewhere else weight_files(directory)
    return ModelDescription(
        directory=directory,
        name=directory.resolve().name if runner.model_dir else "penstock-embedded",
        context_length=chosen.config.max_positions,
        vocab_size=chosen.config.vocab_size,
        eos_token_ids=tuple(sorted({*_ids(config, config_path), *_ids(generation, generation_path)})),
        revision=_revision(config, shards),
        defaults=_defaults(generation, generation_path),
        length_key=chosen.length_key,
        model_impl="penstock" if isinstance(chosen.config, DecoderConfig) else "transformers",
        model_impl_reason=chosen.reason,
        architecture=chosen.config,
    )


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files, each of which exists; an index may name only files of this very directory."""
    index_path = directory / "model.safetensors.index.json"
    if not index_path.exists():
        single = directory / "model.safetensors"
        if not single.is_file():
            raise ModelError(
                f"{directory}: neither model.safetensors nor model.safetensors.index.json; pickled weights (.bin, .pt) "
                "are not read: convert them to safetensors",
                path=str(single),
            )
        return [single]
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index_path}: 'weight_map' is missing or empty", path=str(index_path))
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or name in {".", ".."}:
            raise ModelError(
                f"{index_path}: 'weight_map' names {name!r}, which is not a plain file name", str(index_path)
            )
        if not (directory / name).is_file():
            raise ModelError(f"{directory / name}: shard named by {index_path.name} is missing", str(directory / name))
    return [directory / name for name in names]


def read_json(path: Path, required: bool = True) -> dict[str, Any]:
    """A JSON object from a model directory; {} for an absent optional file."""
    if not path.is_file():
        if required:
            raise ModelError(f"{path}: missing", path=str(path))
        return {}
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path}: larger than {MAX_JSON_BYTES} bytes", path=str(path))
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}", path=str(path)) from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: must hold a JSON object", path=str(path))
    return raw


def _ids(raw: dict[str, Any], path: Path) -> list[int]:
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids) or len(ids) > 64:
        raise ModelError(f"{path}: 'eos_token_id' must be a token id or a short list of them", path=str(path))
    return ids


def _defaults(raw: dict[str, Any], path: Path) -> GenerationDefaults:
    """What generation_config.json states; a value out of range is the directory's fault and is named.

    `do_sample: false` means greedy, whatever else is said of sampling.
    """
    found: dict[str, Any] = {}
    for name, (key, low, high, kind) in _DEFAULT_FIELDS.items():
        value = raw.get(key)
        if value is None:
            continue
        kinds = (int,) if kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            raise ModelError(f"{path}: {key!r} is {value!r}, outside {low} to {high}", path=str(path))
        found[name] = kind(value)
    if raw.get("do_sample") is False:
        found = {name: value for name, value in found.items() if name in ("repetition_penalty", "max_tokens")}
        found["temperature"] = 0.0
    return GenerationDefaults(**found)


def _revision(config: dict[str, Any], shards: list[Path]) -> str:
    stated = [json.dumps(config, sort_keys=True), *(f"{p.name}:{p.stat().st_size}" for p in shards)]
    return hashlib.sha256("\n".join(stated).encode()).hexdigest()[:32]
