"""The flags of `penstock serve`: one table from flag to configuration key, spelled and meant as in `vllm serve`.

`serve.py` turns it into a command line. Values stay text here; `config.load_config` parses and checks them, so that a
flag, a YAML key and a Python value fail with the same words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from penstock.cluster.config import Sourced


@dataclass(frozen=True, slots=True)
class Flag:
    """One option. `metavar` is empty for a switch; `many`: it may be given several times."""

    spelling: str  # as typer declares it, "--on/--off" for switches with two sides
    key: str
    help: str
    metavar: str = ""
    many: bool = False
    unit: str = ""  # suffix that the flag's bare number stands for

    def sized(self, value: object) -> object:
        """The value as the configuration takes it."""
        return f"{value}{self.unit}" if self.unit else value

    @property
    def parameter(self) -> str:
        """The Python parameter that typer fills."""
        return self.spelling.split("/")[0].lstrip("-").replace("-", "_")


SERVE_FLAGS = (
    Flag("--prefill", "pools.prefill", "Prefill workers.", "N"),
    Flag("--decode", "pools.decode", "Decode workers.", "N"),
    Flag("--mixed", "pools.mixed", "Workers that do both; alone they replace the split pair.", "N"),
    Flag("--host", "front.host", "Address the HTTP server listens on.", "H"),
    Flag("--port", "front.port", "Its port; 0 takes a free one.", "P"),
    Flag("--admin-host", "front.admin_host", "Address that answers operators: /metrics, /status.", "H"),
    Flag("--admin-port", "front.admin_port", "Its port; 0: the one after --port.", "P"),
    Flag("--admin", "front.admin", "apart, or shared: /metrics and /status on --port.", "WHERE"),
    Flag("--grpc-port", "front.grpc_port", "Serve gRPC too, on this port, with reflection.", "P"),
    Flag("--served-model-name", "front.served_model_name", "Name in the API; may be repeated.", "S", many=True),
    Flag("--dtype", "runner.dtype", "auto, float32, bfloat16 or float16.", "D"),
    Flag("--device", "runner.device", "cpu, cuda, cuda:N, or auto: a GPU where one is seen.", "D"),
    Flag("--model-impl", "runner.model_impl", "auto, penstock (our own decoders) or transformers.", "IMPL"),
    Flag(
        "--generation-config",
        "front.generation_config",
        "auto: sampling defaults from generation_config.json; vllm or none: without them.",
        "G",
    ),
    Flag(
        "--tool-call-parser", "front.tool_call_parser", "How the model writes tool calls; auto: see its template.", "P"
    ),
    Flag(
        "--enable-auto-tool-choice/--no-enable-auto-tool-choice",
        "front.enable_auto_tool_choice",
        "Let the model decide on tool calls; on where its way of writing them is known.",
    ),
    Flag("--max-model-len", "scheduler.max_model_len", "Longest sequence in tokens; takes 8k, 8K.", "L"),
    Flag("--block-size", "kv.block_size", "Tokens per KV block.", "B"),
    Flag("--max-num-seqs", "scheduler.max_num_seqs", "Most sequences in one step.", "S"),
    Flag("--max-num-batched-tokens", "scheduler.max_num_batched_tokens", "Most tokens in one step.", "T"),
    Flag(
        "--long-prefill-token-threshold",
        "scheduler.long_prefill_token_threshold",
        "Most tokens of one prompt in one step; 0: the step's budget.",
        "C",
    ),
    Flag("--kv-cache-memory-bytes", "kv.memory_bytes", "KV pool of each worker; takes 512M, 1G.", "BYTES"),
    Flag(
        "--gpu-memory-utilization",
        "kv.gpu_memory_utilization",
        "Share of a GPU's memory that one worker may take, KV pool included.",
        "U",
    ),
    Flag("--num-gpu-blocks-override", "kv.num_blocks", "KV blocks of each worker, on any device.", "N"),
    Flag("--enable-prefix-caching/--no-enable-prefix-caching", "kv.prefix_caching", "Reuse KV of equal prefixes."),
    Flag("--kv-offloading-size", "kv.host_bytes", "GiB of host memory below each KV pool.", "GIB", unit="G"),
    Flag("--kv-disk-path", "kv.disk_path", "Directory below that, kept over restarts.", "DIR"),
    Flag("--kv-disk-bytes", "kv.disk_bytes", "Most that each worker keeps there; takes 512M, 10G.", "BYTES"),
    Flag("--skip-tokenizer-init", "front.skip_tokenizer_init", "Token ids in, token ids out."),
    Flag("--tensor-parallel-size", "pools.tensor_parallel_size", "Ranks that share the layers of one worker.", "K"),
    Flag("--prefill-tensor-parallel-size", "pools.prefill_tensor_parallel_size", "The same of prefill workers.", "K"),
    Flag("--decode-tensor-parallel-size", "pools.decode_tensor_parallel_size", "The same of decode workers.", "K"),
    Flag("--expert-parallel-size", "pools.expert_parallel_size", "Ranks that share the experts of one worker.", "K"),
    Flag("--context-parallel-size", "pools.context_parallel_size", "Ranks that share long prompts of one worker.", "K"),
    Flag("--lora-dir", "adapters.directory", "Where low-rank adapters lie, a folder each.", "DIR"),
    Flag(
        "--lora-modules", "adapters.modules", "An adapter served from the start; may be repeated.", "N=DIR", many=True
    ),
    Flag("--max-loras", "adapters.max_loaded", "Adapters that one worker computes with at a time.", "N"),
    Flag("--max-lora-rank", "adapters.max_rank", "Highest rank of an adapter.", "R"),
    Flag("--address", "ray.address", "Join this Ray cluster instead of starting one.", "RAY"),
    Flag("--api-key", "front.api_key", "Ask callers for this key; better: $PENSTOCK_API_KEY.", "K"),
    Flag("--api-keys", "front.api_keys_file", "YAML file of keys with tenants, models and limits.", "FILE"),
    Flag("--ssl-certfile", "tls.cert_file", "Serve HTTPS (and gRPC) with this certificate, PEM.", "FILE"),
    Flag("--ssl-keyfile", "tls.key_file", "Its private key.", "FILE"),
    Flag("--ssl-ca-certs", "tls.ca_file", "Who signed it; see tls.internal in the configuration.", "FILE"),
    Flag("--metrics-aliases", "front.metrics_aliases", "vllm: its metric names beside ours; or none.", "WHOSE"),
    Flag("--otlp-traces-endpoint", "tracing.endpoint", "Send spans there, by OTLP over HTTP.", "URL"),
    Flag("--otlp-traces-sample-ratio", "tracing.sample_ratio", "Share of requests traced, 0 to 1.", "R"),
    Flag("--log-format", "logs.format", "text or json.", "F"),
    Flag("--log-level", "logs.level", "debug, info, warning or error.", "L"),
    Flag("--access-log/--no-access-log", "logs.access", "One line per HTTP request; never its text."),
    Flag("--enable-tokenizer-info-endpoint", "front.enable_tokenizer_info", "Serve GET /tokenizer_info."),
)


def flag_values(given: Mapping[str, object]) -> dict[str, Sourced]:
    """What was typed, as configuration keys that remember their flag."""
    found: dict[str, Sourced] = {}
    for flag in SERVE_FLAGS:
        value = given.get(flag.parameter)
        if value is not None and value != []:
            found[flag.key] = Sourced(flag.sized(value), flag.spelling.split("/")[0])
    return found
