"""What the tests share: a tiny model, a tokenizer, a scripted runner, a live server.

Nothing is downloaded but the demo model, once, into models/demo.
"""

import os

# Before torch is imported: several processes test at once, so each computes on one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import httpx
import hypothesis
import pytest
import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import api
import model_download
from engine.model import ChatModel
from engine.prompt.tokenizer import ChatTokenizer
from engine.sampling_params import SamplingParams
from engine.scheduling.engine import Engine
from engine.sequence import Delta, KVSpan, Sequence

ROOT = Path(__file__).resolve().parent.parent
# Seconds after which what never comes is given up; long, for machines that are busy or slow.
PATIENCE = 120.0
# So are hypothesis's bounds of an example's time.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")
# httpx gives up after 5 where nothing else is said.
for phase in ("connect", "read", "write", "pool"):
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, phase, PATIENCE)


def pytest_configure() -> None:
    """The settings of whoever runs the tests, such as a key, are not the tests'."""
    for name in [*os.environ]:
        if name.startswith("CHAT_") and not name.startswith("CHAT_TEST_"):
            del os.environ[name]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Four, which mostly wait; but each takes its time to import torch, so none for one file."""
    if len(config.args) == 1 and ".py" in config.args[0]:
        return 0
    return 4


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def byte_tokenizer(special: list[str] = SPECIAL) -> PreTrainedTokenizerFast:
    """One token a byte, and special ones that a template uses; the first ends a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


# A model of two layers for byte_tokenizer's vocabulary.
TINY = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    """Two layers, random weights from a fixed seed, float32."""
    torch.manual_seed(0)
    settings = TINY | {"eos_token_id": 256}
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


@pytest.fixture
def without_kernels(monkeypatch) -> str:
    """A machine without our kernels for its CPU; the reason that it gives."""
    reason = "there is no C++ compiler"
    monkeypatch.setattr("engine.layers.autotune.why_missing", lambda: reason)
    monkeypatch.setattr("engine.layers.merged.why_missing", lambda: reason)
    return reason


def greedy(model: LlamaForCausalLM, prompt: list[int], count: int) -> list[int]:
    """So many tokens that `generate` says to a prompt by itself, whatever ends an answer."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        max_length=None,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The real demo model's folder; fetched on the first run."""
    file = model_download.find_model("demo")
    assert file.suffix == ".gguf", f"remove {file}, of an earlier version; it is fetched again"
    return file.parent


GREEDY = SamplingParams(max_new_tokens=12, temperature=0)


def sequence(prompt: list[int], **how: float) -> Sequence:
    """A sequence with these sampling parameters."""
    return Sequence(prompt, params=SamplingParams(**how))


async def reply(
    model: ChatModel, prompt: list[int], params: SamplingParams = GREEDY, **options: bool
) -> tuple[str, Delta]:
    """An answer's text and its last Delta."""
    deltas = [delta async for delta in model.engine.stream(prompt, params, **options)]
    return "".join(delta.text for delta in deltas), deltas[-1]


def whole_of(engine: Engine) -> int:
    """All rows that no sequence has, free or kept; none twice."""
    spans = [(span.start, span.room) for span in engine.cache.kept]
    pieces = sorted(spans + engine.cache.allocator.gaps)
    assert all(a + n <= b for (a, n), (b, _) in pairwise(pieces))
    return sum(size for _, size in pieces)


class ScriptedRunner:
    """Says a given text instead of what a model would, as slowly as asked.

    `say` is what every answer will be. After `hold`, a step needs a `permits.release()`.
    `poison` is a prompt whose presence in a step makes the step fail with `failure`; None
    stands for every prompt.
    """

    states = None

    vocabulary = 260
    device = torch.device("cpu")

    def __init__(self, tokenizer: PreTrainedTokenizerFast, say: str = "hello", rows: int = 10_000):
        self.tokenizer, self.rows = tokenizer, rows
        self.ids = torch.zeros(rows, dtype=torch.long)
        self.start_over(say)

    def start_over(self, say: str = "hello") -> None:
        """Know nothing of what was said, held or to fail before."""
        self.say, self.pause = say, 0.0
        self.free()
        self.prompts: list[list[int]] = []
        self.samplings: list[SamplingParams] = []
        self.steps: list[list[int]] = []
        self.moved = 0
        self.failure: BaseException | None = None
        self.poison: list[int] | None = None

    def hold(self) -> None:
        self.permits = threading.Semaphore(0)

    def free(self) -> None:
        held = getattr(self, "permits", None)
        self.permits = threading.Semaphore(10**6)
        if held:
            held.release(10**6)

    def forward(self, work: list[tuple[Sequence, int]]) -> torch.Tensor:
        assert self.permits.acquire(timeout=PATIENCE), "held, and nobody freed it"
        time.sleep(self.pause)
        self.steps.append([new for _, new in work])
        hit = [seq for seq, _ in work if self.poison in (None, seq.tokens[: seq.num_prompt])]
        if self.failure and hit:
            raise self.failure
        logits = torch.full((len(work), self.vocabulary), -50.0)
        ids = [*self.tokenizer.encode(self.say, add_special_tokens=False), 256]
        for row, (seq, new) in zip(logits, work, strict=True):
            said = len(seq.tokens) - seq.num_prompt
            if not said and new == seq.pending:
                self.prompts.append(list(seq.tokens))
                self.samplings.append(seq.params)
            row[ids[min(said, len(ids) - 1)]] = 50.0
        return logits

    def copy(self, span: KVSpan, start: int, count: int) -> None:
        self.moved += 1

    def check_device(self) -> None:
        pass


def chat_model(
    runner: object, tokenizer: PreTrainedTokenizerFast, context_length: int = 512, **options: float
) -> ChatModel:
    """A model that answers by way of the runner."""
    text = ChatTokenizer(tokenizer)
    engine = Engine(runner, text.plain, {256}, **options)
    return ChatModel(
        "test",
        text,
        engine,
        SamplingParams(),
        context_length,
        prompt_length=context_length,
        vocabulary=len(tokenizer),
        facts={},
        summary={},
    )


@pytest.fixture
def make(tokenizer: PreTrainedTokenizerFast) -> Iterator[Callable[..., ChatModel]]:
    """Builds models and closes their engines afterwards."""
    made = []

    def build(runner: object, **options: int) -> ChatModel:
        made.append(chat_model(runner, tokenizer, **options))
        return made[-1]

    yield build
    for model in made:
        model.engine.close()


@pytest.fixture
def runner(tokenizer: PreTrainedTokenizerFast) -> ScriptedRunner:
    return ScriptedRunner(tokenizer)


@contextmanager
def serve(load: Callable[[api.Settings], ChatModel], **settings: object) -> Iterator[str]:
    """A real server on a free port; yields its address once it answers at all.

    Without the chat page, which takes a while to build, unless it is asked for.
    """
    chosen = api.Settings(**({"chat_page": False} | settings))
    app = api.build_app(chosen, load)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host="127.0.0.1",
            port=0,
            root_path=chosen.root_path,
            log_level="warning",
            lifespan="on",
            http=api.Connection,
        )
    )
    thread = threading.Thread(target=server.run)
    # A server that cannot load ends its process, which here is the tests', with what they found.
    ended = AssertionError("the server ended the process; see what it said on stderr")
    with patch.object(os, "_exit", side_effect=ended):
        thread.start()
        try:
            wait_for(lambda: server.started)
            port = server.servers[0].sockets[0].getsockname()[1]
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


def ready(url: str) -> str:
    wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)
    return url


def wait_for(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
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
