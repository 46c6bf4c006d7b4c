"""The file of keys: what it may say, and that its mistakes are named without telling a key."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.cluster.config import load_config
from penstock.cluster.key_file import key_digest, read_key_file
from penstock.workers.errors import ConfigError

GOOD = f"""
- {{name: team-a, key: sk-secret-a, tenant: research, models: [tiny], max_open_requests: 2, requests_per_minute: 60}}
- {{name: team-b, key_sha256: {key_digest("sk-secret-b").hex()}, tokens_per_minute: 1000, operator: true}}
"""


def test_a_good_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(GOOD)
    first, second = read_key_file(path)
    assert (first.name, first.tenant, first.models, first.operator) == ("team-a", "research", ("tiny",), False)
    assert (first.max_open_requests, first.requests_per_minute, first.tokens_per_minute) == (2, 60, None)
    assert (second.tenant, second.operator, second.tokens_per_minute) == ("team-b", True, 1000)
    assert first.digest == key_digest("sk-secret-a")
    assert second.digest == key_digest("sk-secret-b")
    assert "secret" not in repr((first, second))
    assert first.digest.hex() not in repr(first)


@pytest.mark.parametrize(
    ("stated", "seconds"),
    [
        ("1970-01-02", 2 * 86400),
        ("'1970-01-02'", 2 * 86400),
        ("1970-01-02T00:00:10Z", 86410),
        ("'1970-01-02T00:00:10+00:00'", 86410),
        ("1970-01-02 00:00:10", 86410),
        ("1970-01-02T02:00:10+02:00", 86410),
    ],
)
def test_last_days(tmp_path: Path, stated: str, seconds: float) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"- {{name: a, key: sk-secret, not_after: {stated}, max_tokens: 9}}")
    (entry,) = read_key_file(path)
    assert (entry.not_after, entry.max_tokens) == (seconds, 9)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "list of 1 to"),
        ("[]", "list of 1 to"),
        ("a: 1", "list of 1 to"),
        ("- sk-secret", "entry 1: must have the keys"),
        ("- {name: a}", "needs either 'key' or 'key_sha256'"),
        ("- {name: a, key: sk-secret, key_sha256: x}", "needs either"),
        ("- {key: sk-secret}", "'name' must be"),
        ("- {name: 'a b', key: sk-secret}", "'name' must be"),
        ("- {name: a, key: 'sk secret'}", "without spaces"),
        ("- {name: a, key: 5}", "'key' must be"),
        ("- {name: a, key_sha256: abc}", "64 hex digits"),
        ("- {name: a, key: sk-secret, tenant: ''}", "'tenant' must be"),
        ("- {name: a, key: sk-secret, models: tiny}", "'models' must be"),
        ("- {name: a, key: sk-secret, operator: 1}", "'operator' must be"),
        ("- {name: a, key: sk-secret, tokens_per_minute: 0}", "'tokens_per_minute' must be"),
        ("- {name: a, key: sk-secret, requests_per_minute: true}", "'requests_per_minute' must be"),
        ("- {name: a, key: sk-secret, max_tokens: 0}", "'max_tokens' must be"),
        ("- {name: a, key: sk-secret, not_after: soon}", "'not_after' must be"),
        ("- {name: a, key: sk-secret, not_after: '2027-02-30'}", "'not_after' must be"),
        ("- {name: a, key: sk-secret, not_after: 5}", "'not_after' must be"),
        ("- {name: a, key: sk-secret, request_per_minute: 5}", "unknown key 'request_per_minute'"),
        ("- {name: a, key: sk-secret}\n- {name: a, key: other}", "two entries have the same name"),
        ("- {name: a, key: sk-secret}\n- {name: b, key: sk-secret}", "two entries have the same key"),
        ("- {name: a, key: sk-secret", "is not YAML"),
        ("- !!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason) as wrong:
        read_key_file(path)
    assert wrong.value.key == "front.api_keys_file"
    assert str(path) in str(wrong.value)
    assert "secret" not in str(wrong.value).replace(str(path), "")


def test_the_configuration_reads_it_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(values={"front.api_keys_file": str(tmp_path / "none.yaml")}, environment={})
