"""Run in LangChain's environment: what a ChatOpenAI makes of the server at argv[1], as one JSON object."""

import asyncio
import json
import sys

from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI

base_url, key, model = sys.argv[1:]
chat = ChatOpenAI(base_url=base_url, api_key=key, model=model, temperature=0, stream_usage=True, max_retries=0)
question = [("system", "You are a helpful assistant."), ("human", "What is 17 + 25?")]
whole = chat.invoke("What is 17 + 25?")
streamed = None
for chunk in chat.stream("What is 17 + 25?"):
    streamed = chunk if streamed is None else streamed + chunk
tool = {
    "name": "look_up",
    "description": "Looks a number up.",
    "parameters": {
        "type": "object",
        "properties": {"n": {"enum": [17, 25]}},
        "required": ["n"],
        "additionalProperties": False,
    },
}
called = chat.bind_tools([tool], tool_choice="look_up").invoke("What is 17 + 25?")
try:
    chat.invoke("word " * 3000)
    overflow = ""
except ContextOverflowError as error:
    overflow = str(error)
print(
    json.dumps(
        {
            "invoke": whole.content,
            "usage": whole.usage_metadata,
            "finish": whole.response_metadata["finish_reason"],
            "stream": streamed.content,
            "stream_usage": streamed.usage_metadata,
            "batch": [answer.content for answer in chat.batch(["What is 1 + 1?", "What is 17 + 25?"])],
            "ainvoke": asyncio.run(chat.ainvoke(question)).content,
            "overflow": overflow,
            "called": [(call["name"], call["args"]["n"]) for call in called.tool_calls],
        }
    )
)
