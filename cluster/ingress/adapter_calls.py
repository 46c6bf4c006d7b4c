"""`POST /v1/load_lora_adapter` and `POST /v1/unload_lora_adapter`: what operators do to the list of adapters.

Used by `service.py`; the names of paths and fields are vLLM's. Says what is wrong with a body before any file is looked
at; the rest is `adapters.py`'s. What one ingress is told, the others find in the list a moment later.
"""

from __future__ import annotations

import os
from typing import Any

from penstock.cluster.ingress.adapters import Adapters
from penstock.cluster.ingress.fields import Fields
from penstock.workers.adapter_ref import ADAPTER_NAME
from penstock.workers.errors import AdapterError, RequestError
from penstock.workers.lora.adapter_files import check_folder

MAX_NAME_BYTES, MAX_PATH_BYTES = 128, 4096
NAME, PATH, IN_PLACE = "lora_name", "lora_path", "load_inplace"


async def load_adapter(body: dict[str, Any], adapters: Adapters, model_names: tuple[str, ...]) -> dict[str, Any]:
    """Serve an adapter from now on, everywhere and after restarts. Raises RequestError or HttpProblem."""
    fields = Fields(body)
    name, folder, in_place = _name(fields), _folder(fields, adapters), fields.boolean(IN_PLACE)
    if name in model_names:
        raise fields.refuse(NAME, f"{name} is the name of the model itself")
    listed = await adapters.load(name, folder, in_place)
    return {"id": name, "revision": listed.revision, "folder": listed.folder}


async def unload_adapter(body: dict[str, Any], adapters: Adapters, model_names: tuple[str, ...]) -> dict[str, Any]:
    """Serve it no more. Raises RequestError or HttpProblem."""
    name = _name(Fields(body))
    await adapters.unload(name)
    return {"id": name}


def _name(fields: Fields) -> str:
    name = fields.text(NAME, MAX_NAME_BYTES)
    if name is None:
        raise fields.refuse(NAME, "is needed")
    if not ADAPTER_NAME.match(name):
        raise fields.refuse(NAME, "is 1 to 128 letters, digits, '.', '_' and '-'")
    return name


def _folder(fields: Fields, adapters: Adapters) -> str:
    """The folder below the directory; an absolute path is taken as text, so that nothing outside is looked at."""
    path = fields.text(PATH, MAX_PATH_BYTES)
    if path is None:
        raise fields.refuse(PATH, "is needed")
    if path.startswith("/"):
        roots = (str(adapters.directory), os.path.realpath(adapters.directory))
        below = [os.path.relpath(path, root) for root in roots]
        path = min(below, key=lambda each: each.startswith(".."))
    try:
        check_folder(path)
    except AdapterError as error:
        raise RequestError(f"{PATH}: {error}", field=PATH, code="invalid_value") from error
    return path
