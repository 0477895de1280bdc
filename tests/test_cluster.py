"""Two servers behind Ray Serve: who answers, and that nothing is lost when one goes."""

import importlib.util
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from openai import OpenAI
from scale import SAID, Answer, Cluster, ask, ask_all, started

from tests.conftest import wait_for

pytestmark = [
    pytest.mark.release,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,
        reason="Ray is not installed; `pip install -r deploy/requirements.txt` brings it",
    ),
]


@contextmanager
def under_way(url: str, *names: str) -> Iterator[list[Future[Answer]]]:
    """Answers of which each has begun."""
    begun = [threading.Event() for _ in names]
    with ThreadPoolExecutor(len(names)) as pool:
        answers = [pool.submit(ask, url, n, begun=e) for n, e in zip(names, begun, strict=True)]
        assert all(event.wait(20) for event in begun)
        yield answers


@pytest.fixture(scope="module")
def two() -> Iterator[Cluster]:
    with started("--script", CHAT_MAX_BATCH="4", CHAT_MAX_WAITING="4") as cluster:
        cluster.deploy()
        assert len(cluster.servers()) == 2
        yield cluster


def test_it_answers_as_one_server_does(two):
    answer = httpx.post(two.url, json={"prompt": "x", "max_length": 20}, timeout=30).json()
    assert int(answer["response"][:8]) in two.servers()
    assert answer["response"][8:] == SAID[:12]
    assert answer["usage"]["completion_tokens"] == 20
    assert ask(two.url).text[8:] == SAID
    asked = {"model": "test", "messages": [{"role": "user", "content": "x"}], "max_tokens": 20}
    with OpenAI(base_url=f"{two.url}/v1", api_key="none") as client:
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].message.content[8:] == SAID[:12]
        chunks = list(client.chat.completions.create(**asked, stream=True))
        assert len(chunks) > 10
        assert "".join(c.choices[0].delta.content or "" for c in chunks)[8:] == SAID[:12]


def test_a_conversation_comes_home_and_others_spread(two):
    for server, name in two.homes().items():
        assert {ask(two.url, name, max_length=8).server for _ in range(5)} == {server}
    assert {answer.server for answer in ask_all(two.url, *[""] * 6)} == two.servers()


def test_a_conversation_whose_server_is_full_goes_elsewhere(two):
    server, name = two.homes().popitem()
    with under_way(two.url, *[name] * 4) as answers:
        assert {answer.server for answer in ask_all(two.url, name, name)} == two.servers() - {
            server
        }
        assert {answer.result().server for answer in answers} == {server}


def test_who_hangs_up_is_soon_forgotten_by_the_server(two):
    (name, other) = two.homes().values()
    # By itself the answer would end after two seconds.
    with httpx.stream(
        "POST", two.url, json={"prompt": "x", "stream": True}, headers={"X-Session-Id": name}
    ) as response:
        lines = response.iter_lines()
        next(lines)
        assert (two.health(name)["running"], two.health(other)["running"]) == (1, 0)
    wait_for(lambda: two.health(name)["running"] == 0, 1)
    # Without a stream there is nothing to send to who is gone.
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(two.url, json={"prompt": "x"}, headers={"X-Session-Id": name}, timeout=0.4)
    wait_for(lambda: two.health(name)["running"] == 0, 1)


def test_what_is_too_much_is_told_in_the_servers_own_words(two):
    answers = ask_all(two.url, *[""] * 40, max_length=40)
    served = [answer for answer in answers if answer.whole]
    refused = [answer for answer in answers if not answer.whole]
    assert len(served) >= 4
    assert len(refused) >= 8
    assert {answer.text[8:] for answer in served} == {SAID[:32]}
    assert {(answer.status, answer.error["code"]) for answer in refused} == {(429, "queue_full")}
    assert all(1 <= answer.retry_after <= 60 for answer in refused)


def test_a_server_that_dies_takes_only_its_own_answers_with_it(two):
    (gone, lost), (_, kept) = two.homes().items()
    with under_way(two.url, *[lost, kept] * 3) as answers:
        os.kill(gone, signal.SIGKILL)
        assert [answer.result().whole for answer in answers] == [False, True] * 3
    # Whoever comes now is served, whether at home there or not, and not by one that still loads.
    begin = time.monotonic()
    while gone in two.servers() or len(two.servers()) < 2 or time.monotonic() < begin + 2:
        answer = ask(two.url, lost, max_length=8)
        assert answer.whole, answer
        assert time.monotonic() < begin + 60
    wait_for(two.both_answer, 60)


def test_a_server_whose_engine_died_is_replaced(two):
    dying, name = two.homes().popitem()
    assert ask(two.url, name, prompt="poison").error["code"] == "not_serving"
    wait_for(lambda: dying not in two.servers(), 20)
    wait_for(two.both_answer, 60)


def test_nothing_is_lost_while_new_servers_take_the_places_of_the_old(two):
    old, answers, stop = two.servers(), [], threading.Event()

    def client(name: str) -> None:
        while not stop.is_set():
            answers.append(answer := ask(two.url, name))
            if answer.retry_after:
                stop.wait(answer.retry_after)

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, name) for name in ("", "", *two.homes().values())]
        try:
            two.deploy()
        finally:
            stop.set()
    for ended in clients:
        ended.result()
    assert all(answer.whole or answer.retry_after for answer in answers)
    assert {answer.server for answer in answers if answer.whole} >= old
    assert not old & two.servers()
    assert ask(two.url).server in two.servers()
