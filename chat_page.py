"""A chat in the browser, made with gradio, under /chat."""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import fields
from itertools import pairwise
from typing import Any

from fastapi import FastAPI
from pydantic import ValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from api import Metrics, RequestInfo, is_valid_key, kind_of, log, path_of, with_headers
from engine import ChatModel, Message, SamplingParams
from schemas import ChatRequest, reject_lone_surrogates, validation_error

# ---- Chat page --------------------------------------------------------------
# A chat in the browser, made with gradio, under /chat. It is a client like any other: a question
# becomes a ChatRequest, and ChatModel.answer answers it.

# The page's texts in English and Chinese; the browser's language decides.
TRANSLATIONS = {
    "ask": ("Write a message", "输入消息"),
    "new": ("New chat", "新对话"),
    "settings": ("Settings", "设置"),
    "default": ("default", "默认"),
    "system": ("System prompt", "系统提示词"),
    "max_new_tokens": ("Max new tokens", "最大生成 token 数"),
    "temperature": ("Temperature (0: greedy)", "温度（0 为贪心）"),
    "top_k": ("Top-k (0: off)", "Top-k（0 为关闭）"),
    "top_p": ("Top-p", "Top-p"),
    "min_p": ("Min-p (0: off)", "Min-p（0 为关闭）"),
    "repetition_penalty": ("Repetition penalty (1: off)", "重复惩罚（1 为关闭）"),
    "seed": ("Seed", "随机种子"),
}
# gradio does not translate these, so they hold both languages.
LOGIN_MESSAGE = "Any username; the password is the server's key. · 用户名任意，密码为服务器的密钥。"
DROPPED_MESSAGE = (
    "The oldest turns no longer fit and are left out. · 最早的几轮对话已超出长度，不再发送。"
)
PAGE_PARAMETERS = [knob.name for knob in fields(SamplingParams) if knob.name in TRANSLATIONS]
PAGE_CSS = """
#settings .form {display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr))}
#settings .form {background: none}
#settings .form > :first-child {grid-column: 1 / -1}
"""
# The only gradio routes that the page needs. Others read files, take uploads or fetch pages;
# heartbeat would hold a connection for each open page, of which a browser allows six per host and
# for which uvicorn would wait at shutdown.
PAGE_ROUTES = re.compile(
    r"/(login|theme\.css|(assets|static)/.+"
    r"|gradio_api/(run/predict|queue/join|queue/data|cancel))?"
)
# The browser loads nothing from other hosts, not even an image in an answer.
PAGE_CSP = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; form-action 'self'"
)
# The second turns off nginx's buffering of streams.
PAGE_HEADERS = {"Content-Security-Policy": PAGE_CSP, "X-Accel-Buffering": "no"}
# Seconds between updates of an answer: each costs CPU time that the model could use.
UPDATE_INTERVAL = 0.1
# Most sessions that gradio keeps, and most requests that it queues; the engine has limits of
# its own.
MAX_SESSIONS = 1024
FORMULAS = (("$$", "$$", True), (r"\[", r"\]", True), (r"\(", r"\)", False), ("$", "$", False))
# Code, a formula, or else the start of a tag. The bound on a formula's length keeps the search
# linear.
VERBATIM_OR_TAG = re.compile(
    r"(```.*?(?:```|\Z)|`[^`\n]+`|\$\$.{1,1000}?\$\$|\$[^$\n]+\$"
    r"|\\\(.{1,1000}?\\\)|\\\[.{1,1000}?\\\])|<(?=[a-z/!?])",
    re.DOTALL | re.IGNORECASE,
)


def escape_tags(text: str) -> str:
    """Escape HTML tags outside code and formulas, so that they are shown and not interpreted."""
    return VERBATIM_OR_TAG.sub(lambda m: m[1] or "&#60;", text)


def messages_from_gradio(history: list[dict[str, Any]]) -> list[Message]:
    """gradio's messages as ours, without questions that got no answer or an error."""
    turns = []
    for pair in pairwise(history):
        refused = (pair[1].get("metadata") or {}).get("title")
        if [m["role"] for m in pair] == ["user", "assistant"] and not refused:
            for m in pair:
                text = "".join(part.get("text", "") for part in m["content"])
                turns.append({"role": m["role"], "content": text.replace("&#60;", "<")})
    return turns


class ChatPage:
    """The page and its callbacks. gradio takes seconds to import, so it is imported here."""

    def __init__(self, model: Callable[[], ChatModel], metrics: Metrics):
        import gradio

        self.model, self.metrics, self.gradio = model, metrics, gradio
        english, chinese = (
            {name: words[i] for name, words in TRANSLATIONS.items()} for i in range(2)
        )
        self.words = gradio.I18n(en=english, **dict.fromkeys(("zh-CN", "zh-TW"), chinese))

    async def answer(self, *asked: Any) -> AsyncGenerator[Any]:
        """Yield the answer so far, again and again, or the error."""
        call = RequestInfo(uuid.uuid4().hex, "/chat")
        try:
            model = self.model()
            body = self._request(model, *asked)
            self.metrics.record_prompt(call, body)
            prompt = await asyncio.to_thread(body.prepare, model)
            if prompt.dropped_turns:
                self.gradio.Info(DROPPED_MESSAGE, title="")
            said, due = "", 0.0
            async with aclosing(model.answer(prompt, label=call)) as deltas:
                async for delta in deltas:
                    said += delta.text
                    if delta.finish_reason or (delta.text and time.monotonic() >= due):
                        due = time.monotonic() + UPDATE_INTERVAL
                        yield escape_tags(said)
            return
        except Exception as error:
            refusal = error
        call.outcome = kind_of(refusal).code
        self.metrics.record(call)
        yield {"role": "assistant", "content": "", "metadata": {"title": f"⚠️ {refusal}"}}

    def _request(
        self, model: ChatModel, text: str, history: Any, system: str, *values: Any
    ) -> ChatRequest:
        knobs = zip(PAGE_PARAMETERS, values, strict=True)
        # An unchanged default is not sent: only a length that was set must fit as it is.
        given = {knob: x for knob, x in knobs if x not in (None, getattr(model.defaults, knob))}
        texts = {"prompt": text, "history": messages_from_gradio(history), "system": system or None}
        try:
            return ChatRequest.model_validate({**texts, **given, "truncate": True})
        except ValidationError as error:
            raise validation_error(error) from error

    def fill(self) -> list[Any]:
        """Once the model is loaded, stop the timer and show its name and defaults."""
        try:
            model = self.model()
        except Exception:
            return [self.gradio.skip()] * (2 + len(PAGE_PARAMETERS))
        name = self.gradio.Chatbot(label=f"chat-api · {model.name}")
        values = [getattr(model.defaults, knob) for knob in PAGE_PARAMETERS]
        return [self.gradio.Timer(active=False), name, *values]

    def resume(self, saved: list[Any]) -> tuple[Any, ...]:
        """Open the browser's newest conversation: its index and, twice, its messages."""
        return (0, saved[0], saved[0]) if saved else (None, [], [])

    def check(self, text: str) -> Any:
        """Refuse a blank or malformed message."""
        try:
            reject_lone_surrogates(text)
        except ValueError as error:
            return self.gradio.validate(False, f"a message {error}")
        return self.gradio.validate(bool(text.strip()), "")

    def build(self) -> Any:
        gr, words = self.gradio, self.words
        page = gr.ChatInterface(
            self.answer,
            chatbot=gr.Chatbot(
                label="chat-api",
                scale=1,
                buttons=["copy", "copy_all"],
                latex_delimiters=[{"left": a, "right": b, "display": c} for a, b, c in FORMULAS],
            ),
            textbox=gr.Textbox(
                label=words("ask"), placeholder=words("ask"), submit_btn=True, stop_btn=True
            ),
            additional_inputs=[
                gr.Textbox(label=words("system")),
                *map(self._number_box, PAGE_PARAMETERS),
            ],
            additional_inputs_accordion=gr.Accordion(
                words("settings"), open=False, elem_id="settings"
            ),
            editable=True,
            save_history=True,
            validator=self.check,
            concurrency_limit=None,
            analytics_enabled=False,
            api_visibility="undocumented",
        )
        page.title, page.max_threads = "chat-api", MAX_SESSIONS
        page.state_session_capacity = MAX_SESSIONS
        page.new_chat_button.icon, page.new_chat_button.value = None, words("new")
        # The same at every start, so that saved conversations survive a restart.
        page.saved_conversations.storage_key = page.saved_conversations.secret = "chat-api"
        self._connect(page)
        return page.queue(max_size=MAX_SESSIONS)

    def _connect(self, page: Any) -> None:
        gr = self.gradio
        with page:
            timer = gr.Timer(2)
            quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "undocumented"}
            filled = [timer, page.chatbot, *page.additional_inputs[1:]]
            gr.on([page.load, timer.tick], self.fill, None, filled, **quiet)
            resumed = [page.conversation_id, page.chatbot, page.chatbot_state]
            page.load(self.resume, page.saved_conversations, resumed, **quiet)
            # gradio clears the placeholder with the first message.
            page.saved_conversations.change(
                lambda: gr.update(placeholder=self.words("ask")), None, page.textbox, **quiet
            )

    def _number_box(self, knob: str) -> Any:
        whole = knob in ("max_new_tokens", "top_k", "seed")
        return self.gradio.Number(
            label=self.words(knob),
            placeholder=self.words("default"),
            precision=0 if whole else None,
            step=1 if whole else 0.05,
        )


class ChatPageMiddleware:
    """Closes the gradio routes that the page does not need, and sets its headers."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not PAGE_ROUTES.fullmatch(path_of(scope)):
            raise HTTPException(404)
        # gradio would allow any origin to read its responses.
        del MutableHeaders(scope=scope)["origin"]
        await self.app(scope, receive, with_headers(send, PAGE_HEADERS))


def mount_chat_page(
    app: FastAPI, model: Callable[[], ChatModel], metrics: Metrics, keys: tuple[str, ...]
) -> bool:
    """Mount the page, with a login if there are keys; False if gradio is not installed."""
    try:
        page = ChatPage(model, metrics)
    except ImportError as missing:
        log.warning("there is no chat page: %s", missing)
        return False

    def known(_: str, given: str) -> bool:
        return is_valid_key(given.encode(), keys)

    page.gradio.mount_gradio_app(
        app,
        page.build(),
        "/chat",
        auth=known if keys else None,
        auth_message=LOGIN_MESSAGE,
        i18n=page.words,
        theme=page.gradio.themes.Default(
            primary_hue="blue", neutral_hue="slate", font="system-ui", font_mono="monospace"
        ),
        css=PAGE_CSS,
        footer_links=[],
        show_error=False,
        **dict.fromkeys(("run_history", "ssr_mode", "mcp_server", "pwa"), False),
    )
    mount = app.routes[-1]
    assert isinstance(mount, Mount)
    mount.app = ChatPageMiddleware(mount.app)
    return True
