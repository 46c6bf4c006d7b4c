"""The committed model directory: its size and layout, its tokenizer and template, and what it has learned.

The model runs here through transformers, so that the directory is known to be a standard one.
"""

import json
import re
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
from fakes.embedded_app import embedded_codec
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.train_model.addition import answered, held_out_pairs, is_held_out, is_right, phrased, training_pair
from deploy.train_model.conversation import CHAT_TEMPLATE, SPECIAL, documents, rendered
from deploy.train_model.evaluation import replies
from deploy.train_model.exchange import Exchange

FOLDER = Path(__file__).parents[2] / "cluster" / "embedded_model"
FILES = {
    "TRAINING.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
MAX_BYTES = 6_000_000


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def chat_tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32).eval()


def test_the_files_are_the_expected_ones_and_small():
    found = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(found) == FILES
    assert sum(found.values()) <= MAX_BYTES


def test_the_configuration_says_what_is_stored():
    config = json.loads((FOLDER / "config.json").read_text())
    with safe_open(FOLDER / "model.safetensors", framework="pt") as weights:
        stored = {str(weights.get_slice(name).get_dtype()) for name in weights.keys()}  # noqa: SIM118
    assert (config["dtype"], stored) == ("bfloat16", {"BF16"})
    assert config["max_position_embeddings"] == 2048
    assert config["eos_token_id"] == json.loads((FOLDER / "generation_config.json").read_text())["eos_token_id"]


def test_the_report_has_every_figure_and_no_path():
    text = (FOLDER / "TRAINING.json").read_text()
    report = json.loads(text)
    assert "/" not in text
    assert report["cpu_seconds"] <= 30 * 60 * 2
    assert report["held_out"]["addition_accuracy"] >= 0.9
    assert report["held_out"]["perplexity"] > 1


@pytest.mark.parametrize(
    "text",
    ["What is 23 + 45?", "  two  blanks\n\nlines", "näïve Füße, 日本語 🙂", '{"name": "Ana", "age": 31}', "1234567890"],
)
def test_any_text_comes_back_from_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_every_digit_is_one_token(tokenizer):
    assert [token for token in tokenizer.encode("a 407+58=465").tokens if token.isdigit()] == list("40758465")
    assert not [token for token in tokenizer.get_vocab() if len(token) > 1 and re.search(r"\d", token)]


def test_the_transformers_tokenizer_gives_the_same_ids(tokenizer, chat_tokenizer):
    for document in islice(documents(Random(5), 0.0), 50):
        text = "".join(piece.text for piece in document)
        assert chat_tokenizer(text)["input_ids"] == tokenizer.encode(text).ids


def test_the_markers_are_special_and_end_an_answer(tokenizer):
    ids = [tokenizer.token_to_id(marker) for marker in SPECIAL]
    stops = json.loads((FOLDER / "generation_config.json").read_text())["eos_token_id"]
    assert ids == list(range(len(SPECIAL)))
    assert stops == [tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<|endoftext|>")]


def test_the_template_writes_what_training_wrote(chat_tokenizer):
    turns = [Exchange("Hello!", "Hi! What can I do for you?"), Exchange(" 2 + 2 ", "2 + 2 = 4.")]
    messages = [{"role": "system", "content": "Be polite."}]
    for turn in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": turn.answer})
    whole = "".join(piece.text for piece in rendered(turns, "Be polite."))
    assert (FOLDER / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert chat_tokenizer.apply_chat_template(messages, tokenize=False) == whole
    asked = chat_tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(asked)
    assert asked.endswith("<|user|> 2 + 2 <|end|><|assistant|>")


def test_the_template_tells_tools_as_transformers_would(chat_tokenizer):
    function = {"name": "add", "description": "Adds <é>.", "parameters": {"type": "object", "properties": {"n": {}}}}
    called = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"n": [1, "ü"]}}}
    messages = [
        {"role": "user", "content": "2 + 2"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    tools = [{"type": "function", "function": function}]
    text = chat_tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    ids = embedded_codec().encode_chat(messages, {"add_generation_prompt": True}, tools=tools)
    assert ids == chat_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert text.count("<tool_call>") == 2


def test_a_tenth_of_the_pairs_is_held_out_in_either_order():
    pairs = held_out_pairs()
    assert 0.08 < len(pairs) / 90**2 < 0.12
    assert all(is_held_out(b, a) for a, b in pairs)
    assert not any(is_held_out(a, b) for a in range(10) for b in range(100))


def test_training_text_never_shows_a_held_out_pair():
    rng = Random(3)
    assert not any(is_held_out(*training_pair(rng)) for _ in range(2000))
    text = "".join(piece.text for document in islice(documents(rng, 0.1), 3000) for piece in document)
    sums = [(int(a), int(b)) for a, b in re.findall(r"(\d+) \+ (\d+) = \d", text)]
    assert len(sums) > 1000
    assert not [pair for pair in sums if is_held_out(*pair)]


def test_the_last_number_of_a_reply_decides():
    assert is_right(answered(23, 45), 23, 45)
    assert not is_right("23 + 45 = 69.", 23, 45)
    assert not is_right("", 23, 45)


def test_held_out_additions_are_right(model, tokenizer):
    rng = Random(11)
    pairs = rng.sample(held_out_pairs(), 40)
    given = replies(model, tokenizer, [phrased(rng, a, b) for a, b in pairs], limit=16)
    assert sum(is_right(reply, a, b) for reply, (a, b) in zip(given, pairs, strict=True)) >= 36


def test_generate_stops_at_the_end_of_an_answer(model, chat_tokenizer):
    messages = [{"role": "user", "content": "What is 23 + 45?"}]
    asked = chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**asked, max_new_tokens=32)
    answer = out[0, asked["input_ids"].shape[1] :]
    assert chat_tokenizer.decode(answer, skip_special_tokens=False) == "23 + 45 = 68.<|end|>"
