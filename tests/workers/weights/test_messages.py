"""Messages about weights: what is sent is what arrives, and nothing that is not exactly a message arrives at all."""

import msgpack
import pytest

from penstock.workers.errors import WireError
from penstock.workers.weights.messages import (
    Absent,
    Greeting,
    Piece,
    Refusal,
    ServedFile,
    Terms,
    Want,
    WantConfig,
    decode,
    encode,
)

FILE = ServedFile("model-00001-of-00002.safetensors", 1 << 40, b"h" * 32, b"d" * 32)
MESSAGES = [
    Greeting("r" * 32, "10.0.0.1:4711"),
    Terms("r" * 32, 900, (FILE, ServedFile("a,b.safetensors", 8, b"h" * 32, b"d" * 32))),
    Refusal(True, "it serves 2 others", ("10.0.0.2:1", "[::1]:2")),
    Want(3, 1 << 40, 4096, 1 << 14, 128),
    WantConfig(),
    Piece(2**64 - 1),
    Absent(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_there_and_back(message) -> None:
    assert decode(*encode(message)) == message


def test_names_lead_nowhere() -> None:
    code, _ = encode(MESSAGES[1])
    for name in ("../model.safetensors", "/model.safetensors", "a\\b.safetensors", ".safetensors", "config.json", ""):
        body = msgpack.packb(["r", 1, [[name, 8, b"h" * 32, b"d" * 32]]])
        with pytest.raises(WireError, match=r"Terms.files"):
            decode(code, body)


@pytest.mark.parametrize(
    ("code", "fields"),
    [
        (1, ["r", 1, []]),
        (1, ["r", 1, [["m.safetensors", 7, b"h" * 32, b"d" * 32]]]),
        (1, ["r", 1, [["m.safetensors", 8, b"h", b"d" * 32]]]),
        (1, ["r", 1, [["m.safetensors", True, b"h" * 32, b"d" * 32]]]),
        (1, ["r", 1, "m.safetensors"]),
        (2, [1, "busy", ""]),
        (2, [True, "busy"]),
        (3, [0, -1, 1, 0, 1]),
        (3, [0, 0, 1, 0, 1.5]),
        (5, ["digest"]),
        (9, []),
    ],
)
def test_nothing_else_is_taken(code: int, fields: list[object]) -> None:
    with pytest.raises(WireError, match="weights: "):
        decode(code, msgpack.packb(fields))


def test_a_body_that_is_no_list_of_fields() -> None:
    for body in (b"", b"\xc1", msgpack.packb({}), msgpack.packb([1] * 5000), msgpack.packb("text")):
        with pytest.raises(WireError):
            decode(5, body)
