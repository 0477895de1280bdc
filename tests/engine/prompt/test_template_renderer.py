"""What a chat template may take to render is bounded, by a process that is ended."""

import os
import signal
import subprocess
import sys

import pytest

from engine import ContextTooLong, InvalidInput, StartError, TemplateTooCostly
from engine.checkpoint.checkpoint import as_start_error, chat_tokenizer
from engine.child_process import ChildProcess
from engine.prompt import template_renderer
from engine.prompt.template_renderer import render_template, renderer
from engine.prompt.tokenizer import ChatTokenizer
from tests.conftest import ROOT, TEMPLATE, byte_tokenizer, wait_for

HI = [{"role": "user", "content": "hi"}]
SHOWN = "<|user|>hi<|end|>"
LOOPS = (
    "{% set many = range(100000) %}"
    "{% for a in many %}{% for b in many %}{% for c in many %}{% endfor %}{% endfor %}{% endfor %}"
)
CALLS_ITSELF_TWICE = (
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
)
DOUBLES = (
    "{% set ns = namespace(text='0123456789') %}"
    "{% for i in range(60) %}{% set ns.text = ns.text + ns.text %}{% endfor %}"
)


@pytest.fixture
def short_time(monkeypatch):
    monkeypatch.setattr(template_renderer, "RENDER_TIMEOUT", 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("template", [LOOPS, CALLS_ITSELF_TWICE])
def test_template_that_does_not_end_is_refused_and_the_next_is_rendered(
    short_time, monkeypatch, template
):
    with pytest.raises(TemplateTooCostly, match=r"chat template takes more than 0.3 seconds"):
        render_template(template, HI, {})
    monkeypatch.undo()
    assert render_template(TEMPLATE, HI, {}) == SHOWN


@pytest.mark.parametrize("template", ["{{ 'a' * 10**10 }}", "{{ 'a' | center(10**10) }}", DOUBLES])
def test_template_that_takes_too_much_memory_is_refused(template):
    with pytest.raises(TemplateTooCostly, match="512 MiB"):
        render_template(template, HI, {})
    assert render_template(TEMPLATE, HI, {}) == SHOWN


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ raise_exception('alternate, please') }}", "alternate, please$"),
        ("{{ raise_exception('no' * 10000) }}", "no$"),
        ("{% if %}", "Expected"),
    ],
)
def test_template_that_refuses_keeps_the_process(template, reason):
    renderer().start()
    process = renderer().process
    with pytest.raises(InvalidInput, match=reason) as refused:
        render_template(template, HI, {})
    assert len(str(refused.value)) < 1000
    assert renderer().process is process


def test_largest_body_is_rendered():
    turns = [{"role": "user", "content": "中" * 680} for _ in range(4096)]
    assert render_template(TEMPLATE, turns, {}).count("<|end|>") == 4096


def test_renderer_that_died_is_started_again():
    render_template(TEMPLATE, HI, {})
    os.kill(renderer().process.pid, signal.SIGKILL)
    wait_for(lambda: renderer().process.poll() is not None)
    assert render_template(TEMPLATE, HI, {}) == SHOWN


def test_renderer_ends_with_the_program_that_asks():
    code = (
        "import os, signal; from engine.prompt.template_renderer import renderer;"
        "renderer().start();"
        "print(renderer().process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    wait_for(lambda: not is_running(int(done.stdout)))


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_template_that_does_not_end_is_named_at_the_start(short_time):
    wanted = "chat template takes .* --chat-template FILE"
    with pytest.raises(StartError, match=wanted), as_start_error("models/x"):
        chat_tokenizer(None, byte_tokenizer(), LOOPS)


def test_what_fits_no_context_is_refused_before_it_is_rendered(monkeypatch):
    """A template that joins texts one by one takes the square of their length."""
    joins = (
        "{% set ns = namespace(text='') %}"
        "{% for m in messages %}{% set ns.text = ns.text + m['content'] | trim %}{% endfor %}"
        "{{ ns.text }}"
    )
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = joins
    text = ChatTokenizer(tokenizer)
    text.most_tokens = 2**17
    turns = [{"role": "system", "content": "a" * 2000} for _ in range(4096)]
    with monkeypatch.context() as patched:
        patched.setattr(ChildProcess, "ask", lambda *_: pytest.fail("it was rendered"))
        with pytest.raises(ContextTooLong):
            text.encode(turns)
    # Unless it may come to nothing.
    assert text.encode([{"role": "system", "content": " " * 2**18}]) == []


def test_mistake_of_ours_is_not_told_as_a_refusal():
    """`conversations` is ours to give, and jinja's functions for it would fail on a second one."""
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*TypeError.*multiple values"):
        render_template(TEMPLATE, HI, {"conversations": []})
    assert render_template(TEMPLATE, HI, {}) == SHOWN
