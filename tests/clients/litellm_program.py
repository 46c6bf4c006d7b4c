"""Run in LiteLLM's environment: its SDK, its router, and the kinds it gives our errors, as one JSON object."""

import asyncio
import json
import sys

import litellm

base_url, key, model = sys.argv[1:]
litellm.suppress_debug_info = True
place = {"model": f"openai/{model}", "api_base": base_url, "api_key": key}
question = [{"role": "user", "content": "What is 17 + 25?"}]
long = [{"role": "user", "content": "word " * 3000}]


def kind_of(**arguments):
    """The class of the error that a call raises."""
    try:
        litellm.completion(**{**place, "messages": question, "num_retries": 0, **arguments})
    except Exception as error:  # noqa: BLE001 - which one is the finding
        return type(error).__name__
    return ""


whole = litellm.completion(messages=question, temperature=0, **place)
chunks = list(
    litellm.completion(messages=question, temperature=0, stream=True, stream_options={"include_usage": True}, **place)
)
text = litellm.text_completion(
    prompt="17 + 25 =", max_tokens=3, temperature=0, **{**place, "model": f"text-completion-openai/{model}"}
)
router = litellm.Router(
    model_list=[
        {"model_name": "small", "litellm_params": place},
        {"model_name": "down", "litellm_params": {**place, "api_base": "http://127.0.0.1:1/v1"}},
    ],
    fallbacks=[{"down": ["small"]}],
    num_retries=0,
)
try:
    router.completion(model="small", messages=long)
    routed_overflow = ""
except litellm.ContextWindowExceededError as error:
    routed_overflow = str(error)


async def routed():
    """The router's asynchronous way, through a deployment that is down."""
    answer = await router.acompletion(model="down", messages=question, temperature=0)
    return answer.choices[0].message.content


print(
    json.dumps(
        {
            "completion": whole.choices[0].message.content,
            "usage": [whole.usage.prompt_tokens, whole.usage.completion_tokens],
            "stream": "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
            "text_tokens": text.usage.completion_tokens,
            "overflow": kind_of(messages=long),
            "far_overflow": kind_of(messages=[{"role": "user", "content": "word " * 30000}]),
            "bad": kind_of(temperature=-1),
            "unknown": kind_of(model="openai/nobody"),
            "key": kind_of(api_key="wrong"),
            "routed": router.completion(model="small", messages=question, temperature=0).choices[0].message.content,
            "fallback": asyncio.run(routed()),
            "routed_overflow": routed_overflow,
        }
    )
)
