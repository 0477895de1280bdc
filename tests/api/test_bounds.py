"""The bounds that docs/operating.md states: what it says of each, and what is at its edge."""

import json
import re

import httpx
import pytest
from conftest import ROOT

import api
from engine import InvalidInput, guide, schema_trial, tool_grammar
from serving import connection, log_queue, schemas, tool_fields

STATED = {
    "headers, and what stands between them and the body": (
        f"{connection.MAX_HEADER_BYTES // 2**10} KiB"
    ),
    "time to send the headers": f"{connection.HEADER_TIMEOUT:g} seconds",
    "an idle connection": f"{connection.KEEP_ALIVE} seconds",
    "a body": f"{api.MAX_BODY // 2**20} MiB",
    "time to send the body": f"{api.BODY_TIMEOUT:g} seconds",
    "turns of a history, or messages": f"{schemas.MAX_TURNS:,}",
    "a JSON schema": f"{guide.MAX_SCHEMA_CHARS:,} characters",
    "tools of a request": (
        f"{tool_fields.MAX_TOOLS}, with schemas of {tool_grammar.MAX_SCHEMAS_CHARS:,} characters"
        " together"
    ),
    "time to compile a schema": f"{schema_trial.COMPILE_TIMEOUT:g} seconds",
    "memory to compile a schema": f"{schema_trial.COMPILE_MEMORY // 2**20} MiB",
    "lines of the log that wait to be written": f"{log_queue.MAX_LINES:,}",
    "a step of the model": f"{api.STEP_TIMEOUT:g} seconds",
}


def test_docs_state_the_bounds_as_they_are():
    text = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    section = text.partition("## Bounds")[2].partition("## Metrics")[0]
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \| .+? \|$", section, re.MULTILINE))
    assert {name: rows.get(name) for name in STATED} == STATED


@pytest.mark.parametrize(("more", "status"), [(0, 200), (1, 413)])
def test_body_at_its_bound(server, more, status):
    body = b'{"prompt": "x"}'
    body += b" " * (api.MAX_BODY + more - len(body))
    assert httpx.post(server, content=body, timeout=30).status_code == status


@pytest.mark.parametrize(("more", "status"), [(0, 200), (1, 413)])
def test_body_without_a_length_at_its_bound(server, more, status):
    body = b'{"prompt": "x"}'
    body += b" " * (api.MAX_BODY + more - len(body))
    pieces = (body[at : at + 2**20] for at in range(0, len(body), 2**20))
    assert httpx.post(server, content=pieces, timeout=30).status_code == status


@pytest.mark.parametrize(("more", "status"), [(0, 200), (1, 400)])
def test_history_at_its_bound(server, more, status):
    history = [["a", "b"]] * (schemas.MAX_TURNS + more)
    body = {"prompt": "x", "history": history, "truncate": True, "max_length": 5}
    answer = httpx.post(server, json=body, timeout=30)
    assert answer.status_code == status, answer.text


@pytest.mark.parametrize(("n", "status"), [(16, 200), (17, 400)])
def test_answers_to_one_request_at_their_bound(server, n, status):
    body = {"prompt": "x", "n": n}
    assert httpx.post(f"{server}/v1/completions", json=body).status_code == status


def test_schema_at_its_bound():
    frame = len(json.dumps({"const": ""}))
    longest = {"const": "x" * (guide.MAX_SCHEMA_CHARS - frame)}
    assert len(guide.spell_schema(longest)) == guide.MAX_SCHEMA_CHARS
    with pytest.raises(InvalidInput, match="longer than 65,536 characters"):
        guide.spell_schema({"const": longest["const"] + "x"})


@pytest.mark.parametrize(("length", "kept"), [(128, True), (129, False)])
def test_request_id_at_its_bound(server, length, kept):
    given = "x" * length
    answer = httpx.get(f"{server}/health", headers={"X-Request-ID": given})
    assert (answer.headers["x-request-id"] == given) == kept
