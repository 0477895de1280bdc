"""Recorded requests of real agents get answers of their SDKs' shape, later turns from the cache.

The recordings are looked for in CHAT_TEST_DATA.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pydantic
import pytest
import torch
from anthropic.types import Message, RawMessageStreamEvent
from openai.types.responses import Response, ResponseStreamEvent

from tests.conftest import chat_model, ready, serve
from tests.tool_caller import ToolCaller, tool_tokenizer

FOLDER = Path(os.environ.get("CHAT_TEST_DATA", "")) / "agents" / "recordings"
RECORDINGS = sorted(FOLDER.glob("*.json")) if "CHAT_TEST_DATA" in os.environ else []
NUM_SLOTS = 400_000
# Paths with a generated answer, and the types of an answer and of an event.
PATHS = {
    "/v1/messages": (Message, pydantic.TypeAdapter(RawMessageStreamEvent)),
    "/v1/responses": (Response, pydantic.TypeAdapter(ResponseStreamEvent)),
}
# Each of whose requests is a later turn of the one before it.
CONVERSATIONS = (
    "claude-code", "claude-code-bare", "claude-code-2.1.197", "codex", "codex-catalogue",
    "codex-small",
)  # fmt: skip


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    caller = ToolCaller(tool_tokenizer())
    caller.rows, caller.ids = NUM_SLOTS, torch.zeros(NUM_SLOTS, dtype=torch.long)
    with serve(lambda _: chat_model(caller, caller.tokenizer, 65_536)) as url:
        yield ready(url)


def requests_of(recording: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Paths and bodies; tools that an earlier request had are whole again."""
    bodies: dict[int, Any] = {}
    for request in json.loads(recording.read_text(encoding="utf-8"))["requests"]:
        body = request["body"]
        path = request["path"].partition("?")[0]
        if not isinstance(body, dict):
            continue
        bodies[request["n"]] = body
        if isinstance(body.get("tools"), str):
            body["tools"] = bodies[int(body["tools"].rsplit(" ", 1)[1])]["tools"]
        yield path, body | {"model": "test"}


def answer_of(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The whole answer, or the object around it in a stream, checked by the SDK's types."""
    whole, event_type = PATHS[path]
    response = httpx.post(url + path, json=body)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        whole.model_validate(response.json())
        return dict(response.json())
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    for event in events:
        event_type.validate_python(event)
    return dict(events[-1].get("response") or events[-2])


def counts(usage: dict[str, Any]) -> tuple[int, int]:
    """Tokens of a prompt, and how many of them were cached."""
    details = usage.get("input_tokens_details")
    if details:
        return usage["input_tokens"], details["cached_tokens"]
    cached = usage["cache_read_input_tokens"]
    return usage["input_tokens"] + cached, cached


def needs_memory(body: dict[str, Any]) -> bool:
    """Whether it goes on from what another server kept."""
    items = body["input"] if isinstance(body.get("input"), list) else []
    refers = any(isinstance(i, dict) and set(i) == {"type", "id"} for i in items)
    return refers or "previous_response_id" in body or "thread" in body


@pytest.mark.skipif(not RECORDINGS, reason="CHAT_TEST_DATA has no recordings")
@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda path: path.stem)
def test_recording_is_answered(url, recording):
    before = 0
    for path, body in requests_of(recording):
        if path not in PATHS or needs_memory(body):
            continue
        size, cached = counts(answer_of(url, path, body)["usage"])
        if recording.stem in CONVERSATIONS:
            assert cached >= 0.95 * before
        before = size
