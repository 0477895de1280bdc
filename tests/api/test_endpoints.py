"""One row of the table is a whole endpoint: its route, label, docs and the shape of its errors."""

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import Field

import api
from engine import ChatModel
from serving.classic import ChatRequest, ChatResponse, ClassicReply
from serving.dialects import OPENAI
from tests.conftest import chat_model, ready, serve


class EchoRequest(ChatRequest):
    volume: int | None = Field(None, ge=0)


class EchoReply(ClassicReply):
    pass


ROW = api.Endpoint("/v1/echo", EchoRequest, EchoReply, ChatResponse, OPENAI)


@pytest.fixture
def url(runner, tokenizer, monkeypatch):
    monkeypatch.setitem(api.ENDPOINTS, ROW.path, ROW)

    def load(settings: api.Settings) -> ChatModel:
        return chat_model(runner, tokenizer)

    with serve(load) as served:
        yield ready(served)


def test_row_is_a_whole_endpoint(url):
    assert httpx.post(f"{url}/v1/echo", json={"prompt": "x"}).json()["response"] == "hello"
    refused = httpx.post(f"{url}/v1/echo", json={"prompt": "x", "volume": -1})
    assert refused.json()["error"]["param"] == "volume"
    assert set(refused.json()) == {"error"}  # and nothing of our own shape
    document = httpx.get(f"{url}/openapi.json").json()
    assert "volume" in document["components"]["schemas"]["EchoRequest"]["properties"]
    body = document["paths"]["/v1/echo"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["$ref"].endswith("/EchoRequest")
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    requests = [s for family in families for s in family.samples if s.name == "chat_requests_total"]
    assert {s.labels["outcome"] for s in requests if s.labels["route"] == "/v1/echo"} == {
        "served",
        "invalid_value",
    }
