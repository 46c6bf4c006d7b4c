"""The whole front over the embedded model, split over two workers of this process."""

from __future__ import annotations

from dataclasses import replace

from fakes.oracle_app import BLOCK, OracleApp, oracle_settings

from penstock.cluster.model_directory import EMBEDDED_MODEL, describe
from penstock.cluster.text import TextCodec, load_text
from penstock.workers.protocol import Role
from penstock.workers.settings import KVSettings, RunnerSettings, WorkerSettings

RUNNER = RunnerSettings(model_dir=str(EMBEDDED_MODEL), dtype="float32")


def embedded_codec(context: int = 512) -> TextCodec:
    return load_text(describe(RUNNER), False, context)


class EmbeddedApp(OracleApp):
    """ASGI; the model is called "tiny"."""

    def worker_settings(self) -> list[WorkerSettings]:
        kv = KVSettings(block_size=BLOCK, num_blocks=256)
        roles = (Role.PREFILL, Role.DECODE)
        return [replace(oracle_settings(role), runner=RUNNER, kv=kv) for role in roles]
