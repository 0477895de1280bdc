"""A round of call, result and answer with each Python client of the agents' two dialects.

    python agent_clients.py ADDRESS [NAME…]

It runs by itself, in an environment of the versions that agent-clients.txt names, which are other
ones than those of the tests.
"""

import asyncio
import sys
import warnings
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

QUESTION = "How is the weather?"
URL = ""
# How often the tool was called.
asked: list[str] = []


class Weather(BaseModel):
    """How the weather is."""

    city: str


def weather(city: str) -> str:
    """How the weather is.

    Args:
        city: where
    """
    asked.append(city)
    return "sunny"


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


def openai_sdk() -> None:
    import openai

    client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    ask: Any = client.responses
    tools = [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}]
    question = [{"role": "user", "content": QUESTION}]
    for stream in (False, True):
        for kept in (False, True):
            more = {"tools": tools, "store": kept}
            first = _response(ask, stream, input=question, **more)
            (call,) = [item for item in first.output if item.type == "function_call"]
            weather(**Weather.model_validate_json(call.arguments).model_dump())
            result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
            if kept:
                second = _response(
                    ask, stream, input=[result], previous_response_id=first.id, **more
                )
            else:
                second = _response(ask, stream, input=[*question, *first.output, result], **more)
            assert second.output_text == "done", second
    parsed = ask.parse(model="test", input="where?", text_format=Weather)
    assert isinstance(parsed.output_parsed, Weather)
    with ask.stream(model="test", input="where?", text_format=Weather) as events:
        for _ in events:
            pass
        assert isinstance(events.get_final_response().output_parsed, Weather)
    called = ask.parse(model="test", input=QUESTION, tools=[openai.pydantic_function_tool(Weather)])
    assert isinstance(called.output[-1].parsed_arguments, Weather)
    counted = ask.input_tokens.count(model="test", input=QUESTION)
    assert counted.input_tokens > 0


def _response(ask: Any, stream: bool, **how: Any) -> Any:
    if not stream:
        return ask.create(model="test", **how)
    with ask.stream(model="test", **how) as events:
        for _ in events:
            pass
        return events.get_final_response()


def anthropic_sdk() -> None:
    import anthropic

    client: Any = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
    question = [{"role": "user", "content": QUESTION}]
    more = {"model": "test", "max_tokens": 1000}
    for stream in (False, True):
        asked.clear()
        runner = client.beta.messages.tool_runner(
            tools=[anthropic.beta_tool(weather)], messages=question, stream=stream, **more
        )
        steps = [step.get_final_message() if stream else step for step in runner]
        assert steps[-1].content[-1].text == "done", steps
        assert len(asked) == 1
    parsed = client.messages.parse(messages=question, output_format=Weather, **more)
    assert isinstance(parsed.parsed_output, Weather), parsed
    with client.messages.stream(messages=question, output_format=Weather, **more) as events:
        assert isinstance(events.get_final_message().parsed_output, Weather)
    counted = client.messages.count_tokens(model="test", messages=question)
    usage = client.messages.create(messages=question, **more).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def _langchain(chat: Any) -> None:
    bound = chat.bind_tools([Weather])
    for stream in (False, True):

        def ask(messages: list[Any], stream: bool = stream) -> Any:
            if not stream:
                return bound.invoke(messages)
            first, *rest = bound.stream(messages)
            return sum(rest, first)

        question = {"role": "user", "content": QUESTION}
        answer = ask([question])
        (call,) = answer.tool_calls
        assert Weather(**call["args"])
        result = {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}
        said = ask([question, answer, result])
        assert said.text == "done", said
    for method in ("function_calling", "json_schema"):
        structured = chat.with_structured_output(Weather, method=method)
        assert isinstance(structured.invoke("where?"), Weather), method


def langchain_openai() -> None:
    from langchain_openai import ChatOpenAI

    how = {"model": "test", "base_url": f"{URL}/v1", "api_key": "none", "max_retries": 0}
    for kept in ({"store": False}, {"use_previous_response_id": True}):
        _langchain(ChatOpenAI(use_responses_api=True, **how, **kept))


def langchain_anthropic() -> None:
    from langchain_anthropic import ChatAnthropic

    _langchain(ChatAnthropic(model="test", base_url=URL, api_key="none", max_retries=0))


def _pydantic_ai(model: Any, *, has_schemas: bool) -> None:
    import pydantic_ai

    class Report(BaseModel):
        """What was found."""

        city: str

    async def answers() -> None:
        agent = pydantic_ai.Agent(model, tools=[weather])
        asked.clear()
        assert (await agent.run(QUESTION)).output == "done"
        async with agent.run_stream(QUESTION) as run:
            assert await run.get_output() == "done"
        assert len(asked) == 2
        outputs = [pydantic_ai.ToolOutput(Report), pydantic_ai.NativeOutput(Report)]
        for output in outputs if has_schemas else outputs[:1]:
            typed = pydantic_ai.Agent(model, output_type=output)
            assert isinstance((await typed.run("where?")).output, Report)

    asyncio.run(answers())


def pydantic_ai_openai() -> None:
    from pydantic_ai.models.openai import OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{URL}/v1", api_key="none")
    _pydantic_ai(OpenAIResponsesModel("test", provider=provider), has_schemas=True)


def pydantic_ai_anthropic() -> None:
    from anthropic import AsyncAnthropic
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.providers.anthropic import AnthropicProvider

    client = AsyncAnthropic(base_url=URL, api_key="none", max_retries=0)
    model = AnthropicModel("test", provider=AnthropicProvider(anthropic_client=client))
    _pydantic_ai(model, has_schemas=False)  # it takes them only of models that it knows


def openai_agents() -> None:
    import agents
    import openai

    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    model = agents.OpenAIResponsesModel("test", client)

    async def answers() -> None:
        agent = agents.Agent("helper", model=model, tools=[agents.function_tool(weather)])
        asked.clear()
        assert (await agents.Runner.run(agent, QUESTION)).final_output == "done"
        run = agents.Runner.run_streamed(agent, QUESTION, auto_previous_response_id=True)
        async for _ in run.stream_events():
            pass
        assert run.final_output == "done"
        assert len(asked) == 2
        typed = agents.Agent("typist", model=model, output_type=Weather)
        assert isinstance((await agents.Runner.run(typed, "where?")).final_output, Weather)

    asyncio.run(answers())


def litellm_responses() -> None:
    import litellm

    how: Any = {
        "model": "openai/test",
        "api_base": f"{URL}/v1",
        "api_key": "none",
        "max_retries": 0,
    }
    tools = [{"type": "function", "name": "weather", "parameters": SCHEMA}]
    question = [{"role": "user", "content": QUESTION}]
    for stream in (False, True):
        first = _whole(litellm.responses(input=question, tools=tools, stream=stream, **how))
        (call,) = [item for item in first.output if item.type == "function_call"]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        items = [*question, *[item.model_dump() for item in first.output], result]
        second = _whole(litellm.responses(input=items, tools=tools, stream=stream, **how))
        assert second.output[-1].content[0].text == "done", second


def _whole(answer: Any) -> Any:
    """A response, or the one that a stream ends with."""
    if hasattr(answer, "output"):
        return answer
    *_, last = answer
    return last.response


def litellm_messages() -> None:
    import litellm

    how: Any = {"model": "anthropic/test", "api_base": URL, "api_key": "none", "max_tokens": 1000}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    for stream in (False, True):
        answer: Any = litellm.completion(messages=messages, tools=tools, stream=stream, **how)
        if stream:
            answer = litellm.stream_chunk_builder([*answer], messages=messages)
        message = answer.choices[0].message
        (call,) = message.tool_calls
        result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        again = [*messages, message.model_dump(), result]
        said: Any = litellm.completion(messages=again, tools=tools, **how)
        assert said.choices[0].message.content == "done", said


CLIENTS: list[Callable[[], None]] = [
    openai_sdk,
    anthropic_sdk,
    langchain_openai,
    langchain_anthropic,
    pydantic_ai_openai,
    pydantic_ai_anthropic,
    openai_agents,
    litellm_responses,
    litellm_messages,
]

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    URL = sys.argv[1]
    for client in CLIENTS:
        if len(sys.argv) == 2 or client.__name__ in sys.argv[2:]:
            client()
            sys.stdout.write(f"{client.__name__}\n")
            sys.stdout.flush()
