"""Raw values (from YAML, flags, the environment, Python) as the types that the configuration tree states.

Used by `config.py`. Knows nothing of particular keys. Nothing is rounded or guessed; integers take vLLM's suffixes.
"""

from __future__ import annotations

import collections.abc
import enum
import re
import types
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Union, get_args, get_origin

from penstock.workers.errors import ConfigError

_WORDS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_NUMBER = re.compile(r"([+-]?[0-9]{1,30}(?:\.[0-9]{1,30})?)([kmgtKMGT]?)")


def coerce(value: object, kind: Any, key: str, source: str) -> Any:
    """`value` as `kind`; text is parsed. Raises ConfigError naming `key` and `source`."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _optional(value, kind, key, source)
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, (list, tuple)):
            return tuple(coerce(item, get_args(kind)[0], key, source) for item in items)
    elif origin in (dict, Mapping, collections.abc.Mapping):
        value = _pairs(value)
        if isinstance(value, Mapping):
            return {str(name): coerce(item, get_args(kind)[1], f"{key}.{name}", source) for name, item in value.items()}
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        if value in [member.value for member in kind]:
            return kind(value)
        raise ConfigError(f"{source}: {key}: {value!r} is none of {', '.join(str(m.value) for m in kind)}", key=key)
    elif (parsed := _scalar(value, kind)) is not None:
        return parsed
    raise ConfigError(f"{source}: {key}: {value!r} is not of type {getattr(kind, '__name__', kind)}", key=key)


def _pairs(value: object) -> object:
    """`NAME=VALUE`, once or several times, as a mapping; all else as it is, and so what names one thing twice."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and "=" in text for text in texts):
        return value
    pairs = dict(text.split("=", 1) for text in texts)
    return pairs if len(pairs) == len(texts) else value


def _optional(value: object, kind: Any, key: str, source: str) -> Any:
    options = [option for option in get_args(kind) if option is not type(None)]
    if value is None and len(options) < len(get_args(kind)):
        return None
    return coerce(value, options[0], key, source)


def _scalar(value: object, kind: Any) -> object | None:
    """`value` as bool, int, float or str; None where it is not one."""
    if kind is bool:
        if isinstance(value, str):
            return _WORDS.get(value.lower())
        return value if isinstance(value, bool) else None
    if isinstance(value, bool):
        return None
    if kind is str:
        return value if isinstance(value, str) else None
    if kind is int:
        return _integer(value) if isinstance(value, str) else value if isinstance(value, int) else None
    if kind is float and isinstance(value, (int, float, str)):
        try:
            return float(value)
        except ValueError:
            return None
    return None


def _integer(text: str) -> int | None:
    """`16384`, `16k` (thousands), `16K` (1024s), `1.5k`; None for what is no whole number."""
    found = _NUMBER.fullmatch(text)
    if found is None:
        return None
    exact = Decimal(found[1]) * _SUFFIXES.get(found[2], 1)
    return int(exact) if exact == int(exact) and ("." not in found[1] or found[2]) else None
