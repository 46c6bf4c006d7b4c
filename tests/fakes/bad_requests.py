"""Bad requests as data, one table for every front: which row of the project's list of bad inputs, what is sent, what is
complained of. `fields` go over a good body; None removes a field.

The HTTP test sends all of them; the handle's and gRPC's send what their languages can say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fakes.tiny_model import CONTEXT

VOCAB = 400
X = 90  # the token "x"
LONG = "a" * 300_000
INF = float("inf")
NAN = float("nan")
EMITTED, FORBIDDEN = "emitted_token_ids", "forbidden_next_token_ids"
PATHS = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "embeddings": "/v1/embeddings",
    "tokenize": "/tokenize",
    "detokenize": "/detokenize",
}
GOOD: dict[str, dict[str, Any]] = {
    "completions": {"model": "tiny", "prompt": "x"},
    "chat": {"model": "tiny", "messages": [{"role": "user", "content": "x"}]},
    "embeddings": {"model": "tiny", "input": "x"},
    "tokenize": {"prompt": "x"},
    "detokenize": {"tokens": [5]},
}


@dataclass(frozen=True)
class BadRequest:
    """`row` counts as in the list of bad inputs; 0: not in it."""

    row: int
    name: str
    api: str
    fields: dict[str, Any]
    param: str | None
    status: int = 400

    @property
    def id(self) -> str:
        return f"{self.row}-{self.api}: {self.name}"

    def body(self) -> dict[str, Any]:
        merged = {**GOOD[self.api], **self.fields}
        return {name: value for name, value in merged.items() if value is not None}


def _rows(api: str, rows: Sequence[tuple[Any, ...]]) -> list[BadRequest]:
    return [BadRequest(row[0], row[1], api, *row[2:]) for row in rows]


def _user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def _image(url: str) -> dict[str, Any]:
    return _user([{"type": "image_url", "image_url": {"url": url}}])


def _tool(name: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def _of(schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, "required": ["a"]}


def _called(calls: Any, role: str = "assistant") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "", "tool_calls": calls}]}


ARGUMENTS = "messages[0].tool_calls[0].function.arguments"
CALLED: dict[str, Any] = {"tool_choice": "required"}
UNSATISFIABLE = _of({"type": "string", "minLength": 5, "maxLength": 1})
WIDE = {"type": "object", "properties": {f"property_{i}": {"enum": ["x" * 60]} for i in range(1000)}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 5}}}
PART = "messages[0].content[0].type"
NESTED: Any = "x"
for _ in range(60):
    NESTED = {"type": "array", "items": NESTED}

PROMPTS: list[tuple[Any, ...]] = [
    (32, "no prompt", {"prompt": None}, "prompt"),
    (61, "min_tokens of none", {"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"),
    (32, "empty prompt", {"prompt": ""}, "prompt"),
    (32, "empty list", {"prompt": []}, "prompt"),
    (32, "empty inner list", {"prompt": [[]]}, "prompt"),
    (32, "empty inner text", {"prompt": ["x", ""]}, "prompt"),
    (32, "object", {"prompt": {"a": 1}}, "prompt"),
    (33, "negative id", {"prompt": [1, -1]}, "prompt"),
    (33, "id at vocabulary size", {"prompt": [VOCAB]}, "prompt"),
    (33, "id 2^31", {"prompt": [2**31]}, "prompt"),
    (33, "id 2^63", {"prompt": [2**63]}, "prompt"),
    (33, "id of 400 digits", {"prompt": [10**400]}, "prompt"),
    (33, "bools", {"prompt": [True, False]}, "prompt"),
    (33, "bool among ids", {"prompt": [1, True]}, "prompt"),
    (33, "floats", {"prompt": [1.0]}, "prompt"),
    (33, "bad id in an inner list", {"prompt": [[1], [2, VOCAB]]}, "prompt"),
    (34, "text and id", {"prompt": ["a", 1]}, "prompt"),
    (34, "ids and text", {"prompt": [[1], "a"]}, "prompt"),
    (34, "null among texts", {"prompt": ["a", None]}, "prompt"),
    (34, "list in a list in a list", {"prompt": [[[1]]]}, "prompt"),
    (34, "too many prompts", {"prompt": ["a"] * 129}, "prompt"),
    (34, "too many choices", {"prompt": ["a"] * 100, "n": 2}, "prompt"),
    (36, "longer than the context", {"prompt": [1] * (CONTEXT + 1)}, "prompt"),
    (36, "text longer than the context", {"prompt": "word " * 600}, "prompt"),
    (37, "prompt and max_tokens too long", {"prompt": [1] * 500, "max_tokens": 13}, "prompt"),
    (38, "exactly the context", {"prompt": [1] * CONTEXT}, "prompt"),
    (38, "exactly the context, scored", {"prompt": [1] * CONTEXT, "echo": True, "max_tokens": 0}, "prompt"),
    (39, "long text without spaces", {"prompt": LONG}, "prompt"),
    (52, "too many scores", {"prompt": [[1] * 500] * 40, "echo": True, "logprobs": 20}, "prompt"),
    (0, "max_tokens 0 without echo", {"max_tokens": 0}, "max_tokens"),
    (0, "suffix", {"suffix": "x"}, "suffix"),
    (0, "echo a string", {"echo": "yes"}, "echo"),
    (0, "best_of less than n", {"n": 3, "best_of": 2}, "best_of"),
    (0, "best_of 10^6", {"best_of": 10**6}, "best_of"),
    (0, "best_of with stream", {"best_of": 2, "stream": True}, "best_of"),
    (0, "best_of and prompts", {"best_of": 100, "prompt": ["a", "b"]}, "prompt"),
    (51, "logprobs -1", {"logprobs": -1}, "logprobs"),
    (51, "logprobs 21", {"logprobs": 21}, "logprobs"),
    (51, "logprobs 10^6", {"logprobs": 10**6}, "logprobs"),
    (51, "logprobs bool", {"logprobs": True}, "logprobs"),
]
FUNCTION = "tools[0].function"
TOOLS: list[tuple[Any, ...]] = [
    (74, "tools an object", {"tools": {"f": {}}}, "tools"),
    (74, "a tool that is none", {"tools": ["f"]}, "tools[0]"),
    (74, "a tool without a function", {"tools": [{"type": "function"}]}, FUNCTION),
    (74, "a tool of another type", {"tools": [{"type": "web_search"}]}, "tools[0].type"),
    (74, "10,000 tools", {"tools": [_tool(f"f{i}") for i in range(10_000)]}, "tools"),
    (74, "1 MB of tools", {"tools": [_tool("f", description="x" * 1_000_000)]}, "tools"),
    (74, "no name", {"tools": [_tool(None)]}, f"{FUNCTION}.name"),
    (74, "empty name", {"tools": [_tool("")]}, f"{FUNCTION}.name"),
    (74, "name with quotes", {"tools": [_tool('a "b')]}, f"{FUNCTION}.name"),
    (74, "name with a newline", {"tools": [_tool("ab\n")]}, f"{FUNCTION}.name"),
    (74, "name of 65", {"tools": [_tool("f" * 65)]}, f"{FUNCTION}.name"),
    (74, "name a number", {"tools": [_tool(5)]}, f"{FUNCTION}.name"),
    (74, "one name twice", {"tools": [_tool("f"), _tool("f")]}, "tools[1].function.name"),
    (74, "description a list", {"tools": [_tool("f", description=[])]}, f"{FUNCTION}.description"),
    (74, "strict a string", {"tools": [_tool("f", strict="yes")]}, f"{FUNCTION}.strict"),
    (74, "parameters a string", {"tools": [_tool("f", parameters="{}")]}, f"{FUNCTION}.parameters"),
    (74, "parameters of a number", {"tools": [_tool("f", parameters={"type": "integer"})]}, f"{FUNCTION}.parameters"),
    (64, "type 5 in parameters", {"tools": [_tool("f", parameters=_of({"type": 5}))]}, "tools"),
    (74, "pattern invalid", {"tools": [_tool("f", parameters=_of({"type": "string", "pattern": "["}))]}, "tools"),
    (66, "$ref in parameters", {"tools": [_tool("f", parameters=_of({"$ref": "file:///etc/passwd"}))]}, "tools"),
    (69, "unsatisfiable call", {**CALLED, "tools": [_tool("f", parameters=UNSATISFIABLE)]}, "tools"),
    (67, "1,000 properties", {**CALLED, "tools": [_tool("f", parameters=WIDE)]}, "tools"),
    (74, "choice without tools", {"tool_choice": "required"}, "tool_choice"),
    (74, "choice of no tools", {"tool_choice": "required", "tools": []}, "tool_choice"),
    (74, "auto without tools", {"tool_choice": "auto"}, "tool_choice"),
    (74, "named without tools", {"tool_choice": _tool("f")}, "tool_choice"),
    (74, "named as nobody is", {"tool_choice": _tool("g"), "tools": [_tool("f")]}, "tool_choice"),
    (74, "named without a name", {"tool_choice": {"type": "function"}, "tools": [_tool("f")]}, "tool_choice"),
    (74, "choice unknown", {"tool_choice": "always", "tools": [_tool("f")]}, "tool_choice"),
    (74, "choice a number", {"tool_choice": 3, "tools": [_tool("f")]}, "tool_choice"),
    (74, "choice of allowed tools", {"tool_choice": {"type": "allowed_tools"}, "tools": [_tool("f")]}, "tool_choice"),
    (74, "parallel a string", {"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    (
        71,
        "calls and JSON",
        {**CALLED, "tools": [_tool("f")], "response_format": {"type": "json_object"}},
        "tool_choice",
    ),
    (71, "tools and a regex", {"tools": [_tool("f")], "guided_regex": "a"}, "tools"),
    (74, "no function in a call", _called([{"id": "1"}]), "messages[0].tool_calls[0].function"),
    (74, "a call a string", _called(["f"]), "messages[0].tool_calls[0]"),
    (74, "calls a number", _called(5), "messages[0].tool_calls"),
    (74, "10,000 calls", _called([{"function": {"name": "f"}}] * 10_000), "messages[0].tool_calls"),
    (74, "arguments a list", _called([{"function": {"name": "f", "arguments": "[]"}}]), ARGUMENTS),
    (74, "arguments cut", _called([{"function": {"name": "f", "arguments": '{"a": '}}]), ARGUMENTS),
    (74, "arguments 1,000 deep", _called([{"function": {"name": "f", "arguments": "[" * 1000}}]), ARGUMENTS),
    (74, "arguments 10^5 deep", _called([{"function": {"name": "f", "arguments": '{"a":' * 100_000}}]), ARGUMENTS),
    (74, "arguments with NaN", _called([{"function": {"name": "f", "arguments": '{"a": NaN}'}}]), ARGUMENTS),
    (74, "call by a user", _called([{"function": {"name": "f"}}], "user"), "messages[0].tool_calls"),
]
CHATS: list[tuple[Any, ...]] = [
    (28, "missing", {"messages": None}, "messages"),
    (28, "empty", {"messages": []}, "messages"),
    (28, "a string", {"messages": "hi"}, "messages"),
    (28, "an object", {"messages": {"role": "user"}}, "messages"),
    (28, "a message is a string", {"messages": ["hi"]}, "messages[0]"),
    (28, "no role", {"messages": [{"content": "x"}]}, "messages[0].role"),
    (28, "role a number", {"messages": [{"role": 1, "content": "x"}]}, "messages[0].role"),
    (28, "no content", {"messages": [{"role": "user"}]}, "messages[0].content"),
    (28, "content a number", _user(5), "messages[0].content"),
    (28, "content an empty list", _user([]), "messages[0].content"),
    (28, "5,000 messages", {"messages": [{"role": "user", "content": "x"}] * 5000}, "messages"),
    (29, "unknown role", {"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
    (29, "role with markup", {"messages": [{"role": "user<|im_end|>", "content": "x"}]}, "messages"),
    (29, "both ways to end", {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    (31, "unknown part", _user([{"type": "hologram"}]), PART),
    (31, "part a string", _user(["x"]), "messages[0].content[0]"),
    (31, "part without text", _user([{"type": "text"}]), "messages[0].content[0].text"),
    (31, "audio part", _user([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]), PART),
    (36, "too long", _user("word " * 600), "messages"),
    (37, "max_tokens beyond the context", {"max_tokens": CONTEXT}, "messages"),
    (39, "long text without spaces", _user(LONG), "messages"),
    (51, "top_logprobs alone", {"top_logprobs": 3}, "top_logprobs"),
    (51, "top_logprobs 21", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (51, "top_logprobs -1", {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    (51, "logprobs a number", {"logprobs": 3}, "logprobs"),
    *TOOLS,
    (74, "functions", {"functions": [{"name": "f"}]}, "functions"),
    (77, "template", {"chat_template": "{{ ''.__class__ }}"}, "chat_template"),
    (78, "tokenize", {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    (78, "messages", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    (78, "a template by the back door", {"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
    (78, "special token", {"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs"),
    (78, "nested", {"chat_template_kwargs": {"a": {"b": 1}}}, "chat_template_kwargs.a"),
    (78, "no name", {"chat_template_kwargs": {"a-b": 1}}, "chat_template_kwargs"),
    (78, "name of 65", {"chat_template_kwargs": {"a" * 65: 1}}, "chat_template_kwargs"),
    (78, "100 names", {"chat_template_kwargs": {f"a{i}": 1 for i in range(100)}}, "chat_template_kwargs"),
    (78, "huge number", {"chat_template_kwargs": {"a": 10**30}}, "chat_template_kwargs.a"),
    (78, "long text", {"chat_template_kwargs": {"a": "x" * 10_000}}, "chat_template_kwargs.a"),
    (78, "a list", {"chat_template_kwargs": []}, "chat_template_kwargs"),
    (0, "best_of", {"best_of": 3}, "best_of"),
    (0, "special tokens around a template", {"add_special_tokens": True}, "add_special_tokens"),
    (0, "include_reasoning a number", {"include_reasoning": 1}, "include_reasoning"),
    (0, "documents", {"documents": [{"text": "x"}]}, "documents"),
    (0, "echo", {"echo": True}, "echo"),
    (0, "reasoning_effort a number", {"reasoning_effort": 3}, "reasoning_effort"),
    (0, "max_completion_tokens 0", {"max_completion_tokens": 0}, "max_completion_tokens"),
    (81, "image by http", _image("http://127.0.0.1:1/x.png"), PART),
    (81, "image by file", _image("file:///etc/passwd"), PART),
    (81, "image by ftp", _image("ftp://h/x"), PART),
    (81, "image from metadata service", _image("http://169.254.169.254/latest"), PART),
    (81, "image by mapped address", _image("http://[::ffff:10.0.0.1]/"), PART),
    (81, "image with user", _image("http://a@b:c@127.0.0.1/"), PART),
    (82, "bad base64", _image("data:image/png;base64,@@@"), PART),
    (82, "JPEG 2000", _image("data:image/jp2;base64,AAAA"), PART),
]
SHARED: list[tuple[Any, ...]] = [
    (26, "unknown model", {"model": "nobody"}, "model", 404),
    (26, "model a number", {"model": 5}, "model"),
    (27, "model ../../etc", {"model": "../../etc"}, "model", 404),
    (27, "model a path", {"model": "/etc/passwd"}, "model", 404),
    (27, "model a URL", {"model": "http://169.254.169.254/"}, "model", 404),
    (27, "model empty", {"model": ""}, "model", 404),
    (27, "model of 1 MB", {"model": "m" * 1_000_000}, "model", 404),
    (37, "max_tokens negative", {"max_tokens": -1}, "max_tokens"),
    (37, "max_tokens a string", {"max_tokens": "9"}, "max_tokens"),
    (37, "max_tokens a float", {"max_tokens": 9.5}, "max_tokens"),
    (37, "max_tokens bool", {"max_tokens": True}, "max_tokens"),
    (37, "max_tokens 2^63", {"max_tokens": 2**63}, "max_tokens"),
    (41, "temperature -1", {"temperature": -1}, "temperature"),
    (41, "temperature 1e308", {"temperature": 1e308}, "temperature"),
    (41, "temperature 10^400", {"temperature": 10**400}, "temperature"),
    (41, "temperature a string", {"temperature": "hot"}, "temperature"),
    (41, "temperature bool", {"temperature": True}, "temperature"),
    (41, "temperature a list", {"temperature": [1]}, "temperature"),
    (43, "top_p 0", {"top_p": 0}, "top_p"),
    (43, "top_p -0.1", {"top_p": -0.1}, "top_p"),
    (43, "top_p 1.1", {"top_p": 1.1}, "top_p"),
    (43, "top_k -2", {"top_k": -2}, "top_k"),
    (43, "top_k 10^12", {"top_k": 10**12}, "top_k"),
    (43, "top_k a float", {"top_k": 1.5}, "top_k"),
    (43, "min_p 2", {"min_p": 2}, "min_p"),
    (43, "min_p -1", {"min_p": -1}, "min_p"),
    (44, "presence_penalty 3", {"presence_penalty": 3}, "presence_penalty"),
    (44, "frequency_penalty -2.1", {"frequency_penalty": -2.1}, "frequency_penalty"),
    (44, "frequency_penalty a string", {"frequency_penalty": "1"}, "frequency_penalty"),
    (44, "repetition_penalty 0", {"repetition_penalty": 0}, "repetition_penalty"),
    (44, "repetition_penalty -1", {"repetition_penalty": -1}, "repetition_penalty"),
    (44, "repetition_penalty 1e300", {"repetition_penalty": 1e300}, "repetition_penalty"),
    (44, "repetition_penalty 1e-300", {"repetition_penalty": 1e-300}, "repetition_penalty"),
    (46, "300,000 stops", {"stop": ["x"] * 300_000}, "stop"),
    (46, "empty stop", {"stop": ""}, "stop"),
    (46, "empty stop among others", {"stop": ["a", ""]}, "stop"),
    (46, "stop of 1 MB", {"stop": "x" * 1_000_000}, "stop"),
    (46, "stop a number", {"stop": [5]}, "stop"),
    (46, "stop an object", {"stop": {"a": 1}}, "stop"),
    (46, "stop in a list in a list", {"stop": [["a"]]}, "stop"),
    (48, "stop id out of range", {"stop_token_ids": [VOCAB]}, "stop_token_ids"),
    (48, "stop id negative", {"stop_token_ids": [-1]}, "stop_token_ids"),
    (48, "stop id bool", {"stop_token_ids": [True]}, "stop_token_ids"),
    (48, "10^5 stop ids", {"stop_token_ids": [1] * 100_000}, "stop_token_ids"),
    (48, "stop ids a number", {"stop_token_ids": 7}, "stop_token_ids"),
    (49, "bias on a word", {"logit_bias": {"fox": 1}}, "logit_bias"),
    (49, "bias on an id that is none", {"logit_bias": {"1.5": 1}}, "logit_bias"),
    (49, "bias on a signed id", {"logit_bias": {"+5": 1}}, "logit_bias"),
    (49, "bias on a padded id", {"logit_bias": {"05": 1}}, "logit_bias"),
    (49, "bias on a foreign digit", {"logit_bias": {"\u0665": 1}}, "logit_bias"),
    (49, "bias on a huge id", {"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    (49, "bias on the vocabulary's size", {"logit_bias": {str(VOCAB): 1}}, "logit_bias"),
    (49, "bias 1e9", {"logit_bias": {"5": 1e9}}, "logit_bias.5"),
    (49, "bias -101", {"logit_bias": {"5": -101}}, "logit_bias.5"),
    (49, "bias a string", {"logit_bias": {"5": "1"}}, "logit_bias.5"),
    (49, "bias null", {"logit_bias": {"5": None}}, "logit_bias.5"),
    (49, "bias a list", {"logit_bias": [1]}, "logit_bias"),
    (49, "10^5 biases", {"logit_bias": {str(i): 1 for i in range(100_000)}}, "logit_bias"),
    (49, "every token banned by bias", {"logit_bias": {str(i): -100 for i in range(VOCAB)}}, "logit_bias"),
    (49, "the allowed ones banned", {"logit_bias": {"7": -100}, "allowed_token_ids": [7]}, "logit_bias"),
    (49, "the allowed ones bad words", {"bad_words": ["x"], "allowed_token_ids": [X]}, "bad_words"),
    (49, "bad_words a string", {"bad_words": "x"}, "bad_words"),
    (49, "bad word empty", {"bad_words": [""]}, "bad_words"),
    (49, "bad word a number", {"bad_words": [5]}, "bad_words"),
    (49, "bad word of 1 MB", {"bad_words": ["x" * 1_000_000]}, "bad_words"),
    (49, "bad words of too many tokens", {"bad_words": [f"{i:02}" + "q" * 1000 for i in range(30)]}, "bad_words"),
    (49, "the allowed one may not come next", {"allowed_token_ids": [7], FORBIDDEN: [7]}, FORBIDDEN),
    (49, "300 may not come next", {FORBIDDEN: [7] * 300}, FORBIDDEN),
    (33, "emitted ids with a bool", {EMITTED: [True]}, EMITTED),
    (33, "emitted id 2^63", {EMITTED: [2**63]}, EMITTED),
    (33, "emitted id negative", {EMITTED: [-1]}, EMITTED),
    (52, "prompt_logprobs behind emitted ids", {EMITTED: [5], "prompt_logprobs": 0}, EMITTED),
    (53, "logprobs of 10^5 named tokens", {"logprob_token_ids": [1] * 100_000}, "logprob_token_ids"),
    (49, "10,000 bad words", {"bad_words": ["x"] * 10_000}, "bad_words"),
    (52, "prompt_logprobs -1", {"prompt_logprobs": -1}, "prompt_logprobs"),
    (52, "prompt_logprobs 21", {"prompt_logprobs": 21}, "prompt_logprobs"),
    (52, "prompt_logprobs streamed", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    (54, "seed a string", {"seed": "7"}, "seed"),
    (54, "seed 2^64", {"seed": 2**64}, "seed"),
    (54, "seed a float", {"seed": 1.5}, "seed"),
    (57, "user of 1 MB", {"user": "x" * 1_000_000}, "user"),
    (57, "user a number", {"user": 5}, "user"),
    (57, "metadata a list", {"metadata": ["a"]}, "metadata"),
    (57, "store a string", {"store": "yes"}, "store"),
    (58, "priority bool", {"priority": True}, "priority"),
    (57, "metadata of 1 MB", {"metadata": {"a": "x" * 1_000_000}}, "metadata"),
    (57, "safety_identifier of 1 MB", {"safety_identifier": "x" * 1_000_000}, "safety_identifier"),
    (58, "priority of 1 MB", {"priority": "x" * 1_000_000}, "priority"),
    (59, "salt empty", {"cache_salt": ""}, "cache_salt"),
    (59, "salt with slash", {"cache_salt": "../x"}, "cache_salt"),
    (59, "salt with at", {"cache_salt": "a@b"}, "cache_salt"),
    (59, "salt with newline", {"cache_salt": "ab\n"}, "cache_salt"),
    (59, "salt of 1 MB", {"cache_salt": "x" * 1_000_000}, "cache_salt"),
    (59, "salt a number", {"cache_salt": 5}, "cache_salt"),
    (61, "min_tokens beyond max_tokens", {"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    (61, "min_tokens negative", {"min_tokens": -1}, "min_tokens"),
    (61, "min_tokens beyond the context", {"min_tokens": 10**9}, "min_tokens"),
    (61, "only a stop token, and not yet", {"min_tokens": 1, "allowed_token_ids": [0, 2, 399]}, "min_tokens"),
    (63, "no token allowed", {"allowed_token_ids": []}, "allowed_token_ids"),
    (63, "allowed id out of range", {"allowed_token_ids": [VOCAB]}, "allowed_token_ids"),
    (63, "allowed id bool", {"allowed_token_ids": [True]}, "allowed_token_ids"),
    (63, "allowed ids a number", {"allowed_token_ids": 5}, "allowed_token_ids"),
    (64, "JSON schema", {"response_format": SCHEMA}, "response_format"),
    (64, "no schema", {"response_format": {"type": "json_schema"}}, "response_format"),
    (64, "format unknown", {"response_format": {"type": "yaml"}}, "response_format"),
    (64, "response_format a string", {"response_format": "json"}, "response_format"),
    (66, "$ref to a URL", {"structured_outputs": {"json": {"$ref": "http://127.0.0.1:1/s"}}}, "structured_outputs"),
    (66, "$ref to a file", {"guided_json": {"$ref": "file:///etc/passwd"}}, "guided_json"),
    (67, "deep schema", {"guided_json": NESTED}, "guided_json"),
    (67, "large enum", {"structured_outputs": {"choice": ["x"] * 100_000}}, "structured_outputs"),
    (68, "regex", {"guided_regex": "(?=a)"}, "guided_regex"),
    (68, "regex of repeated repeats", {"guided_regex": "(((.{1,999}){1,999}){1,999}x){99}(?!a)"}, "guided_regex"),
    (69, "unsatisfiable", {"structured_outputs": {"json": {"enum": []}}}, "structured_outputs"),
    (71, "JSON and regex", {"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
    (72, "grammar", {"guided_grammar": 'root ::= nobody'}, "guided_grammar"),
    (68, "regex that ends within an escape", {"guided_regex": "a\\"}, "guided_regex"),
    (83, "prompt_embeds", {"prompt_embeds": "AAAA"}, "prompt_embeds"),
    (83, "inputs_embeds", {"inputs_embeds": [[0.5]]}, "inputs_embeds"),
    (83, "multi_modal_data", {"multi_modal_data": {"image": "AAAA"}}, "multi_modal_data"),
    (88, "previous_response_id", {"previous_response_id": "resp_1"}, "previous_response_id"),
    (22, "kv_transfer_params", {"kv_transfer_params": {"peer": "10.0.0.1"}}, "kv_transfer_params"),
    (84, "adapter by path", {"lora_path": "/tmp/x"}, "lora_path"),
    (0, "n 0", {"n": 0}, "n"),
    (0, "n 10^6", {"n": 10**6}, "n"),
    (0, "stream a string", {"stream": "yes"}, "stream"),
    (0, "stream_options without stream", {"stream_options": {"include_usage": True}}, "stream_options"),
    (0, "stream_options a list", {"stream": True, "stream_options": []}, "stream_options"),
    (0, "usage a number", {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    (0, "truncate_prompt_tokens 0", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    (0, "truncate_prompt_tokens -2", {"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    (0, "truncate_prompt_tokens 10^9", {"truncate_prompt_tokens": 10**9}, "truncate_prompt_tokens"),
    (0, "beam search", {"use_beam_search": True}, "use_beam_search"),
    (0, "logits processors", {"logits_processors": ["os.system"]}, "logits_processors"),
]  # fmt: skip
EMBEDDINGS: list[tuple[Any, ...]] = [
    (26, "unknown model", {"model": "nobody"}, "model", 404),
    (32, "no input", {"input": None}, "input"),
    (32, "empty", {"input": ""}, "input"),
    (32, "empty list", {"input": []}, "input"),
    (33, "id out of range", {"input": [VOCAB]}, "input"),
    (34, "mixed", {"input": ["a", 1]}, "input"),
    (36, "too long", {"input": [1] * CONTEXT}, "input"),
    (39, "long text", {"input": LONG}, "input"),
    (22, "kv_transfer_params", {"kv_transfer_params": {"peer": "10.0.0.1"}}, "kv_transfer_params"),
    (57, "metadata of 1 MB", {"metadata": {"a": "x" * 1_000_000}}, "metadata"),
    (58, "priority a text", {"priority": "high"}, "priority"),
    (59, "salt with slash", {"cache_salt": "a/b"}, "cache_salt"),
    (81, "image", {"input": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}]}, "input"),
    (83, "prompt_embeds", {"prompt_embeds": "AAAA"}, "prompt_embeds"),
    (84, "adapter by path", {"lora_path": "/tmp/x"}, "lora_path"),
    (0, "dimensions", {"dimensions": 8}, "dimensions"),
    (0, "encoding", {"encoding_format": "int8"}, "encoding_format"),
    (0, "encoding a list", {"encoding_format": ["float"]}, "encoding_format"),
    (57, "user of 1 MB", {"user": "x" * 1_000_000}, "user"),
]
TOKENIZES: list[tuple[Any, ...]] = [
    (26, "unknown model", {"model": "nobody"}, "model", 404),
    (32, "nothing", {"prompt": None}, "prompt"),
    (32, "prompt a number", {"prompt": 5}, "prompt"),
    (34, "prompt and messages", {"messages": [{"role": "user", "content": "x"}]}, "prompt"),
    (28, "messages a string", {"prompt": None, "messages": "x"}, "messages"),
    (77, "role unknown", {"prompt": None, "messages": [{"role": "wizard", "content": "x"}]}, "messages"),
    (57, "user of 1 MB", {"user": "x" * 1_000_000}, "user"),
    (77, "template", {"chat_template": "{{ 1 }}"}, "chat_template"),
    (77, "template for messages", {"prompt": None, **GOOD["chat"], "chat_template": "x"}, "chat_template"),
    (81, "image", {"prompt": None, **_image("http://127.0.0.1:1/x.png")}, PART),
    (83, "prompt_embeds", {"prompt_embeds": "AAAA"}, "prompt_embeds"),
    (0, "add_special_tokens a number", {"add_special_tokens": 1}, "add_special_tokens"),
]
DETOKENIZES: list[tuple[Any, ...]] = [
    (33, "no tokens", {"tokens": None}, "tokens"),
    (33, "tokens a string", {"tokens": "5"}, "tokens"),
    (33, "negative", {"tokens": [-1]}, "tokens"),
    (33, "out of range", {"tokens": [VOCAB]}, "tokens"),
    (33, "bool", {"tokens": [True]}, "tokens"),
    (33, "float", {"tokens": [1.5]}, "tokens"),
    (33, "2^64", {"tokens": [2**64]}, "tokens"),
    (57, "metadata of 1 MB", {"metadata": {"a": "x" * 1_000_000}}, "metadata"),
    (33, "a million and more", {"tokens": [5] * ((1 << 20) + 1)}, "tokens"),
]
BAD_REQUESTS: list[BadRequest] = [
    *_rows("completions", PROMPTS + SHARED),
    *_rows("chat", CHATS + SHARED),
    *_rows("embeddings", EMBEDDINGS),
    *_rows("tokenize", TOKENIZES),
    *_rows("detokenize", DETOKENIZES),
]
# What no JSON can say, but a handle or another language may try.
UNSAYABLE: list[BadRequest] = [
    BadRequest(row, name, "completions", fields, param)
    for row, name, fields, param in [
        (41, "temperature NaN", {"temperature": NAN}, "temperature"),
        (41, "temperature infinite", {"temperature": INF}, "temperature"),
        (41, "temperature NaN beside much text", {"prompt": "x" * 9000, "temperature": NAN}, "temperature"),
        (43, "top_p infinite beside much text", {"prompt": "x" * 9000, "top_p": INF}, "top_p"),
        (44, "repetition_penalty NaN", {"repetition_penalty": NAN}, "repetition_penalty"),
        (49, "bias NaN", {"logit_bias": {"5": NAN}}, "logit_bias.5"),
        (6, "lone surrogate", {"prompt": "\ud800"}, "prompt"),
    ]
]
