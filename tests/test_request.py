"""request.py is what a user copies, so it runs here against a live server."""

import json
import os
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import requests

from request import get_completion
from tests.conftest import PATIENCE, ROOT, chat_model, ready, serve, wait_for


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "request.py"), *arguments]


def run(*arguments: str, said: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """The command to its end; the user says `said`, in UTF-8 whatever the locale."""
    return subprocess.run(
        command(*arguments),
        input=said,
        env=os.environ | variables,
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
    )


def asked(runner) -> list[str]:
    """The prompts that the model was given, as text."""
    return [runner.tokenizer.decode(prompt) for prompt in runner.prompts]


@contextmanager
def answering(status: int, kind: str, content: bytes) -> Iterator[str]:
    """Some other server, which says this to everybody; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as other:
        thread = Thread(target=other.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{other.server_port}"
        finally:
            other.shutdown()
            thread.join()


# ---- As a function


def test_get_completion_returns_the_text(server, runner):
    runner.say = "你好，世界"
    assert get_completion("hi", url=server) == "你好，世界"
    assert get_completion("and?", [["hi", "hello"]], url=server) == "你好，世界"
    assert asked(runner) == [
        "<|user|>hi<|end|><|assistant|>",
        "<|user|>hi<|end|><|assistant|>hello<|end|><|user|>and?<|end|><|assistant|>",
    ]


def test_model_is_chosen_by_its_name(server, runner):
    assert run("hi", "--url", server, "--model", "test").stdout == f"{runner.say}\n"
    refused = run("hi", "--url", server, "--model", "poet")
    assert refused.returncode == 1
    assert "there is no model 'poet' here" in refused.stderr


def test_get_completion_raises_the_servers_message(server):
    with pytest.raises(requests.HTTPError, match=r"prompt is empty.*\(400\)") as refused:
        get_completion("", url=server)
    assert refused.value.response.status_code == 400


def test_proxies_are_not_used_for_this_machine(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert get_completion("hi", url=server) == "hello"


# ---- As a command


def test_command_prints_the_answer(server):
    done = run("hi", "--url", server)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")


def test_answer_is_printed_as_it_streams(server, runner):
    """Each letter is read before the model may take its next step."""
    runner.hold()
    runner.permits.release()
    with subprocess.Popen(command("hi", "--url", server), stdout=subprocess.PIPE) as process:
        for letter in b"hello":
            assert process.stdout.read(1) == bytes([letter])
            runner.permits.release()
        assert process.stdout.read() == b"\n"


def test_cut_off_answer_is_marked(server, runner):
    runner.say = "x" * 600
    done = run("hi", "--url", server)
    assert done.stdout.endswith("x … (cut off)\n")


def test_chat_sends_its_history(server, runner):
    done = run("--url", server, said="hi\nand?\nexit\nnever asked\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "> hello\n> hello\n> ", "")
    assert asked(runner) == [
        "<|user|>hi<|end|><|assistant|>",
        "<|user|>hi<|end|><|assistant|>hello<|end|><|user|>and?<|end|><|assistant|>",
    ]


def test_chat_goes_on_after_a_refusal_and_ends_with_its_input(server, runner):
    done = run("--url", server, said="hi\n\nand?")
    assert done.stdout == "> hello\n> > hello\n> \n"
    assert done.stderr == "request.py: prompt is empty; send the user's text (400)\n"
    assert done.returncode == 0, "the last question was answered"
    assert "hello" in asked(runner)[-1], "what was said before the refusal is kept"
    assert run("--url", server, said="\n").returncode == 1


def test_long_chat_drops_its_oldest_turns(server, runner):
    done = run("--url", server, said="".join(f"{i}{'q' * 60}\n" for i in range(9)))
    assert (done.returncode, done.stderr) == (0, "")
    assert "0q" not in asked(runner)[-1]
    assert "7q" in asked(runner)[-1]


@pytest.mark.parametrize(
    "locale",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "gbk"},
        {"LANG": "C", "LC_ALL": "C"},
        {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_chinese_works_in_any_locale(server, runner, locale):
    runner.say = "再见 ½"
    done = run("--url", server, said="你好 ½\n", **locale)
    assert (done.returncode, done.stdout, done.stderr) == (0, "> 再见 ½\n> \n", "")
    assert asked(runner) == ["<|user|>你好 ½<|end|><|assistant|>"]


# ---- What goes wrong is one sentence and an exit code


def failed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("request.py: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_unreachable_server_is_told_with_how_to_start_one():
    with socket.socket() as taken:  # so that nobody else comes to listen there
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        message = failed(run("hi", "--url", f"http://127.0.0.1:{port}"))
    assert "python api.py" in message
    assert "ssh -CN -L 6006:127.0.0.1:6006" in message


def test_key_is_taken_from_flag_or_variable(runner, tokenizer):
    with serve(lambda settings: chat_model(runner, tokenizer), api_key="sesame, 芝麻") as url:
        ready(url)
        assert "Authorization: Bearer" in failed(run("hi", "--url", url))
        assert "(401)" in failed(run("hi", "--url", url, "--api-key", "wrong"))
        for quoted in ('"sesame"', "'sesame,芝麻'"):
            message = failed(run("hi", "--url", url, CHAT_API_KEY=quoted))
            assert "begins with a quotation mark, leave it out (401)" in message
        assert run("hi", "--url", url, "--api-key", "芝麻").stdout == "hello\n"
        # The server's own variable, which may hold several.
        assert run("hi", "--url", url, CHAT_API_KEY="sesame,芝麻").stdout == "hello\n"


def test_full_queue_says_when_to_try_again(runner, tokenizer):
    runner.hold()
    with ExitStack() as stack:
        narrow = {"max_batch": 1, "max_waiting": 1}
        url = stack.enter_context(serve(lambda settings: chat_model(runner, tokenizer, **narrow)))
        ready(url)
        for state in ("running", "waiting"):
            asking = command("hi", "--url", url)
            stack.enter_context(subprocess.Popen(asking, stdout=subprocess.DEVNULL))
            wait_for(lambda state=state: requests.get(f"{url}/health").json()[state] == 1)
        again = requests.post(url, json={"prompt": "3"}).headers["Retry-After"]
        message = failed(run("3", "--url", url))
        runner.free()
    assert f"try again in {again} seconds (429)" in message


def test_error_in_the_middle_of_an_answer_is_told(server, runner):
    runner.hold()
    runner.permits.release()
    with subprocess.Popen(
        command("hi", "--url", server), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.read(1) == b"h"
        runner.failure = RuntimeError("a fault")
        runner.free()
        said = process.stderr.read().decode()
    assert process.returncode == 1
    assert said == "request.py: the model failed on this request; try again\n"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((502, "text/html", b"<p>no"), ["Bad Gateway", "(502)"]),
        ((404, "application/json", b'{"detail": "Not Found"}'), ["Not Found", "(404)"]),
        ((404, "application/json", b'{"error": "no"}'), ["Not Found", "(404)"]),
        ((200, "text/html", b"<p>hello"), ["broke off"]),
        ((200, "text/event-stream", b'data: {"delta": ""}\n\n'), ["broke off"]),
    ],
)
def test_address_of_another_server_is_one_sentence(answer, words):
    with answering(*answer) as url:
        message = failed(run("hi", "--url", url))
    assert all(word in message for word in words)


def test_address_without_a_scheme_is_one_sentence():
    assert "127.0.0.1:6006" in failed(run("hi", "--url", "127.0.0.1:6006"))


@pytest.mark.parametrize("client", ["codex", "claude", "opencode"])
def test_agents_settings_name_this_server(server, client, tmp_path):
    told = run("--print-client", client, "--url", server)
    assert (told.returncode, told.stderr) == (0, "")
    assert server in told.stdout
    assert "512" in told.stdout  # the model's context
    # What it writes, it can write: the agent itself is left out.
    shell = f"codex() {{ :; }}; opencode() {{ :; }}; claude() {{ :; }}\n{told.stdout}"
    subprocess.run(["bash", "-ec", shell], cwd=tmp_path, check=True, capture_output=True)
    if client == "codex":
        config = tomllib.loads((tmp_path / "codex-home/config.toml").read_text())
        assert config["model_providers"]["local"]["base_url"] == f"{server}/v1"
        catalogue = json.loads(Path(config["model_catalog_json"]).read_text())
        assert catalogue["models"][0]["context_window"] == 512
    if client == "opencode":
        provider = json.loads((tmp_path / "opencode.json").read_text())["provider"]["local"]
        assert provider["models"]["test"]["limit"]["context"] == 512


def test_agents_settings_need_a_server():
    told = run("--print-client", "codex", "--url", "http://127.0.0.1:1")
    assert told.returncode == 1
    assert told.stderr.startswith("request.py: the server at http://127.0.0.1:1 does not say")


def test_request_py_is_at_most_70_lines():
    lines = (ROOT / "request.py").read_text(encoding="utf-8").splitlines()
    assert sum(map(bool, lines)) <= 70
