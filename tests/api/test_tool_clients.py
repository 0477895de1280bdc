"""Clients that people use call a tool, hand in its result and get an answer, whole and streamed."""

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.client_packages import node_packages
from tests.conftest import ROOT, chat_model, ready, serve
from tests.tool_caller import ToolCaller, tool_tokenizer

MESSAGES: list[Any] = [{"role": "user", "content": "How is the weather?"}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    tokenizer = tool_tokenizer()
    with serve(lambda _: chat_model(ToolCaller(tokenizer), tokenizer, 4096)) as url:
        yield f"{ready(url)}/v1"


class Weather(BaseModel):
    """How the weather is."""

    city: str


@pytest.mark.parametrize("stream", [False, True])
def test_openai_parses_calls_and_sends_them_back(url, stream):
    tools = [openai.pydantic_function_tool(Weather)]
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        ask = client.chat.completions
        if stream:
            with ask.stream(model="test", messages=MESSAGES, tools=tools) as events:
                message = events.get_final_completion().choices[0].message
        else:
            message = ask.parse(model="test", messages=MESSAGES, tools=tools).choices[0].message
        (call,) = message.tool_calls
        assert isinstance(call.function.parsed_arguments, Weather)
        result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        answer = ask.parse(model="test", messages=[*MESSAGES, message, result], tools=tools)
    assert answer.choices[0].message.content == "done"


@pytest.mark.release
@pytest.mark.parametrize("stream", [False, True])
def test_langchain(url, stream):
    ChatOpenAI = pytest.importorskip("langchain_openai").ChatOpenAI
    chat = ChatOpenAI(model="test", base_url=url, api_key="none", max_retries=0)
    bound = chat.bind_tools([Weather])

    def ask(messages: list[Any]) -> Any:
        if not stream:
            return bound.invoke(messages)
        first, *rest = bound.stream(messages)
        return sum(rest, first)

    answer = ask(MESSAGES)
    (call,) = answer.tool_calls
    assert Weather(**call["args"])
    result = {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}
    assert ask([*MESSAGES, answer, result]).content == "done"
    structured = chat.with_structured_output(Weather, method="function_calling")
    assert isinstance(structured.invoke("where?"), Weather)


@pytest.mark.release
@pytest.mark.parametrize("stream", [False, True])
def test_pydantic_ai(url, stream):
    pydantic_ai = pytest.importorskip("pydantic_ai")
    models = pytest.importorskip("pydantic_ai.models.openai")
    providers = pytest.importorskip("pydantic_ai.providers.openai")
    asked = []

    def weather(city: str) -> str:
        """How the weather is."""
        asked.append(city)
        return "sunny"

    async def answer() -> str:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            provider = providers.OpenAIProvider(openai_client=client)
            model = models.OpenAIChatModel("test", provider=provider)
            agent = pydantic_ai.Agent(model, tools=[weather])
            if not stream:
                return (await agent.run("How is the weather?")).output
            async with agent.run_stream("How is the weather?") as run:
                return await run.get_output()

    assert asyncio.run(answer()) == "done"
    assert len(asked) == 1


@pytest.mark.release
@pytest.mark.parametrize("stream", [False, True])
def test_llm_calls_functions_with_and_without_arguments(url, stream, monkeypatch, tmp_path):
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    chat = pytest.importorskip("llm.default_plugins.openai_models").Chat
    asked = []

    def weather(city: str) -> str:
        """How the weather is."""
        asked.append(city)
        return "sunny"

    def now() -> str:
        """The time."""
        asked.append("now")
        return "noon"

    for function in (weather, now):
        model = chat("ours", model_name="test", api_base=url, supports_tools=True)
        model.key = "none"
        assert model.chain("How is it?", tools=[function], stream=stream).text() == "done"
    assert len(asked) == 2


NODE_PACKAGES = (
    "openai@6.49.0",
    "ai@6.0.326",
    "@ai-sdk/openai-compatible@2.0.92",
    "@langchain/openai@1.5.8",
    "@langchain/core@1.4.0",
    "zod@4.6.7",
)


@pytest.mark.release
def test_clients_in_javascript(url, pytestconfig):
    folder = node_packages(pytestconfig, "tool-clients", NODE_PACKAGES)
    # A module looks for others beside itself.
    script = shutil.copy(ROOT / "tests" / "tool_clients.mjs", folder)
    done = subprocess.run(["node", script, url], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
