"""What the tests share: a tiny model, a tokenizer, a scripted runner, a live server.

Nothing is downloaded but the demo model, once, into models/demo.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import api  # noqa: E402
import model_download  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and four special ones that a template uses."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    """Two layers, random weights from a fixed seed, float32."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": 256,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The real demo model; fetched on the first run."""
    return model_download.fetch_demo()


class ScriptedRunner:
    """Says a given text instead of what a model would, as slowly as asked.

    `say` is what every answer will be. After `hold`, a step needs a `permits.release()`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, say: str = "hello"):
        self.tokenizer, self.say, self.pause = tokenizer, say, 0.0
        self.free()
        self.prompts: list[list[int]] = []
        self.samplings: list[api.Sampling] = []
        self.steps = 0
        self.failure: BaseException | None = None

    def hold(self) -> None:
        self.permits = threading.Semaphore(0)

    def free(self) -> None:
        held = getattr(self, "permits", None)
        self.permits = threading.Semaphore(10**6)
        if held:
            held.release(10**6)

    def next_token(self, seq: api.Sequence) -> int:
        self.permits.acquire(timeout=20)
        time.sleep(self.pause)
        self.steps += 1
        if self.failure:
            raise self.failure
        if not seq.completion:
            self.prompts.append(seq.prompt)
            self.samplings.append(seq.sampling)
        ids = [*self.tokenizer.encode(self.say, add_special_tokens=False), 256]
        return ids[len(seq.completion)] if len(seq.completion) < len(ids) else 256


def chat_model(
    runner: object, tokenizer: PreTrainedTokenizerFast, context_length: int = 512
) -> api.ChatModel:
    """A model that answers by way of the runner."""
    text = api.ChatTokenizer(tokenizer)
    engine = api.Engine(runner, text.plain, {256})
    return api.ChatModel("test", text, engine, api.Sampling(), context_length)


@pytest.fixture
def runner(tokenizer: PreTrainedTokenizerFast) -> ScriptedRunner:
    return ScriptedRunner(tokenizer)


@contextmanager
def serve(load: Callable[[api.Settings], api.ChatModel], **settings: object) -> Iterator[str]:
    """A real server on a free port; yields its address once it answers at all."""
    app = api.build_app(api.Settings(**settings), load)
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="on")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def ready(url: str) -> str:
    wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)
    return url


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    """Return as soon as the condition holds; fail if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


@pytest.fixture
def server(runner: ScriptedRunner, tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """A live server whose model says what the `runner` fixture says."""
    with serve(lambda settings: chat_model(runner, tokenizer)) as url:
        yield ready(url)
