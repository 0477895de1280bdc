"""Faults at the start end it in one sentence; faults in service cost only who has them."""

import asyncio
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch
from benchmark import free_port
from safetensors.torch import load_file, save_file

import api
from engine import child_process
from engine.blame import damaged
from engine.checkpoint.checkpoint import as_start_error
from engine.errors import StartError, StepFailed
from engine.loading import load as load_now
from engine.model import ChatModel
from engine.prompt import template_renderer
from engine.prompt.families import Message
from engine.prompt.tokenizer import ChatTokenizer
from engine.sampling_params import SamplingParams
from engine.scheduling.engine import Engine
from engine.scheduling.output import OutputProcessor, StreamedSequence
from engine.sequence import Delta
from tests.conftest import (
    ROOT,
    ScriptedRunner,
    byte_tokenizer,
    chat_model,
    ready,
    serve,
    tiny_llama,
    wait_for,
    whole_of,
)

# ---- At the start


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A tiny checkpoint in several shards."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(folder, max_shard_size="30KB")
    byte_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


SHARD = "model-00002-of-00005.safetensors"


def cut_short(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100])


def change_norm(change, folder: Path) -> None:
    (file,) = (f for f in folder.glob("*.safetensors") if "model.norm.weight" in load_file(f))
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


def write(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(os.environ["CHAT_TEST_FLAG"]),)


def plant_a_bomb(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Bomb()}))


def plant_modules(model_type: str, folder: Path) -> None:
    names = ("configuration_x", "modeling_x", "tokenization_x")
    for name in names:
        line = "import os, pathlib; pathlib.Path(os.environ['CHAT_TEST_FLAG']).touch()\n"
        (folder / f"{name}.py").write_text(line)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
    config["auto_map"] = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"}
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "tokenizer_config.json"
    its = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["tokenization_x.T", None]}}
    file.write_text(json.dumps(its))


ESCAPE = '{{ cycler.__init__.__globals__.os.popen("touch $CHAT_TEST_FLAG") }}'
CLIMB = "{{ messages.__class__.__mro__[1].__subclasses__() }}"

BROKEN = {
    "cut short": (cut_short, SHARD),
    "a page in place of a shard": (partial(write, SHARD, "<html>" * 99), SHARD),
    "an empty shard": (partial(write, SHARD, ""), SHARD),
    "a missing shard": (lambda folder: (folder / SHARD).unlink(), SHARD),
    "a wrong shape": (
        partial(change_norm, lambda weights: weights.update({"model.norm.weight": torch.ones(7)})),
        "of another shape, for example model.norm.weight",
    ),
    "a missing tensor": (
        partial(change_norm, lambda weights: weights.pop("model.norm.weight")),
        "not there, for example model.norm.weight",
    ),
    "numbers that are none": (
        partial(change_norm, lambda weights: weights["model.norm.weight"].fill_(torch.nan)),
        "NaN",
    ),
    "a config that is no JSON": (partial(write, "config.json", "garbage"), "config.json"),
    "a config that is empty": (partial(write, "config.json", ""), "config.json"),
    "a config that is a list": (partial(write, "config.json", "[]"), "config.json"),
    "a config that is deep": (partial(write, "config.json", "[" * 200_000), "recursion"),
    "a model nobody knows": (partial(write, "config.json", '{"model_type": "new"}'), "type new"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
    "a tokenizer that is none": (partial(write, "tokenizer.json", "{}"), "tiny"),
    "a pickle that runs": (plant_a_bomb, "weights_only"),
    "modules of a new kind": (partial(plant_modules, "x"), "never executed"),
    "a template that leaves its sandbox": (partial(write, "chat_template.jinja", ESCAPE), "unsafe"),
    "a template that climbs": (partial(write, "chat_template.jinja", CLIMB), "unsafe"),
    "a template that loops": (
        partial(write, "chat_template.jinja", "{% for i in range(10**9) %}{% endfor %}"),
        "Range too big",
    ),
}  # fmt: skip


def copy_of(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "tiny"))


def load(folder: Path) -> ChatModel:
    return load_now(folder, cache_memory="1MiB")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", BROKEN)
def test_broken_checkpoint_is_one_sentence_and_none_of_its_code_runs(
    sound, tmp_path, monkeypatch, how
):
    flag = tmp_path / "executed"
    monkeypatch.setenv("CHAT_TEST_FLAG", str(flag))
    folder = copy_of(sound, tmp_path)
    breaks, word = BROKEN[how]
    breaks(folder)
    with pytest.raises(StartError) as told:
        load(folder)
    message = str(told.value)
    assert word in message
    assert "download" in message or "take another model" in message
    assert message.isprintable()
    assert not flag.exists()


def test_checkpoint_with_custom_code_of_a_known_type_loads_without_it(sound, tmp_path, monkeypatch):
    flag = tmp_path / "executed"
    monkeypatch.setenv("CHAT_TEST_FLAG", str(flag))
    folder = copy_of(sound, tmp_path)
    plant_modules("llama", folder)
    load(folder).engine.close()
    assert not flag.exists()


def test_file_without_read_permission_is_named(sound, tmp_path, monkeypatch):
    folder = copy_of(sound, tmp_path)
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "tokenizer.json":  # root may read whatever its mode
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(StartError, match=r"Permission denied: .*tokenizer\.json"):
        load(folder)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate"),
    ],
)
def test_lack_of_memory_is_not_told_as_a_broken_file(tmp_path, error):
    words = "too little memory"
    with (
        pytest.raises(StartError, match=words) as told,
        as_start_error(tmp_path),
        damaged(tmp_path),
    ):
        raise error
    assert "damaged" not in str(told.value)


# What a mistake of ours can look like: none of a library's, in each stage of a start.
MISTAKES = {
    "engine.checkpoint.checkpoint.check_tensors": NameError("name 'reports' is not defined"),
    "engine.checkpoint.checkpoint.ChatTokenizer": KeyError("pieces"),
    "engine.checkpoint.model_config.check_architecture": TypeError("'NoneType' is no iterator"),
    "engine.checkpoint.checkpoint.check_attention": ValueError("not enough values to unpack"),
    "engine.prompt.tokenizer.token_ids": IndexError("list index out of range"),
    "engine.runner.create.affordable_rows": AttributeError("no attribute 'cache_bugdet'"),
    "engine.runner.create.make_faster": TypeError("'NoneType' object is not subscriptable"),
    "engine.runner.self_check.self_check": ZeroDivisionError("division by zero"),
    "engine.loading.checkpoint_defaults": OSError(22, "Invalid argument"),
}


@pytest.mark.parametrize("place", MISTAKES)
def test_mistake_of_ours_is_no_damaged_file(sound, monkeypatch, place, caplog):
    def mistaken(*_, **__):
        raise MISTAKES[place]

    monkeypatch.setattr(place, mistaken)
    with pytest.raises(type(MISTAKES[place])) as told:
        load(sound)
    said = api.start_error(told.value)
    assert "mistake in this program" in said
    assert "download" not in said
    assert str(MISTAKES[place]) not in said
    assert "Traceback" in caplog.text


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_server_starts_and_serves_where_standard_error_cannot_be_written(sound, tmp_path):
    """As on a full disk; and what cannot start ends all the same."""
    port = free_port()
    command = [sys.executable, str(ROOT / "api.py"), "--no-chat-page", "--port", str(port)]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen([*command, "--model", str(sound)], stderr=full)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda: is_ready(url), 120)
            for _ in range(3):
                assert httpx.post(url, json={"prompt": "x", "max_length": 2}).status_code == 200
        finally:
            process.terminate()
        assert process.wait(20) == 0
        folder = copy_of(sound, tmp_path)
        cut_short(folder)
        assert subprocess.Popen([*command, "--model", str(folder)], stderr=full).wait(60) == 1


def test_unknown_host_is_one_sentence(capsys):
    with pytest.raises(SystemExit, match=r"'no\.such\.host\.invalid', port 1: .*--host"):
        api.bind_socket("no.such.host.invalid", 1)
    api.bind_socket("127.0.0.1", 0).close()


# ---- In service


class Frail(ScriptedRunner):
    """Fails on prompts that begin with 7, while they are read or else once two tokens are said."""

    def __init__(self, tokenizer, after: int, fault: BaseException):
        super().__init__(tokenizer)
        self.after, self.fault = after, fault

    def forward(self, work):
        for seq, _ in work:
            if seq.tokens[0] == 7 and seq.num_completion == self.after:
                raise self.fault
        return super().forward(work)


@pytest.mark.parametrize("after", [0, 2], ids=["prefill", "decode"])
@pytest.mark.parametrize("fault", [RuntimeError("a fault"), torch.OutOfMemoryError("full")])
def test_fault_in_prefill_or_decode_fails_its_own_request_only(tokenizer, after, fault):
    runner = Frail(tokenizer, after, fault)
    with serve(lambda settings: chat_model(runner, tokenizer)) as url:
        ready(url)

        async def crowd() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=f"{url}/v1") as client:
                prompts = [[1, 1], [7, 7], [2] * 40, [7] * 40, [3]]
                asks = [client.post("/completions", json={"prompt": p}) for p in prompts]
                return await asyncio.gather(*asks)

        for _ in range(2):
            answers = asyncio.run(crowd())
            assert [a.status_code for a in answers] == [200, 500, 200, 500, 200]
            assert all(a.json()["choices"][0]["text"] == "hello" for a in answers[::2])
            assert all(a.json()["error"]["code"] == "step_failed" for a in answers[1::2])
        wait_for(lambda: httpx.get(f"{url}/health").json()["running"] == 0)


def test_rows_are_freed_after_out_of_memory(tokenizer):
    runner = Frail(tokenizer, 2, torch.OutOfMemoryError("full"))
    model = chat_model(runner, tokenizer)

    async def ask() -> list[Delta]:
        return [d async for d in model.engine.stream([7] * 30, SamplingParams(50))]

    try:
        for _ in range(3):
            with pytest.raises(StepFailed):
                asyncio.run(ask())
        wait_for(lambda: not model.num_running)
        assert whole_of(model.engine) == runner.rows
        assert model.engine.failure is None
    finally:
        model.engine.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("end", [SystemExit("the end"), KeyboardInterrupt(), MemoryError()])
def test_all_requests_get_503_when_the_engine_dies(tokenizer, end):
    """One answers, four wait, one streams, one comes later."""
    runner = ScriptedRunner(tokenizer)
    with serve(lambda settings: chat_model(runner, tokenizer, max_batch=1)) as url:
        ready(url)
        runner.hold()
        got: list[int] = []
        ask = lambda: got.append(httpx.post(url, json={"prompt": "x"}).status_code)  # noqa: E731
        askers = [threading.Thread(target=ask) for _ in range(5)]
        for asker in askers:
            asker.start()
        wait_for(lambda: httpx.get(f"{url}/health").json()["waiting"] == 4)
        runner.failure = end
        if isinstance(end, MemoryError):  # one that is an Exception, on a device that is gone
            runner.check_device = partial(next, iter(()))
        runner.free()
        for asker in askers:
            asker.join()
        assert got == [503] * 5
        late = httpx.post(url, json={"prompt": "x"}, timeout=10)
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "not_serving"
        # However many ask, who is dead never says that they should come again.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "num_waiting", 1000)
            assert httpx.post(url, json={"prompt": "x"}, timeout=10).status_code == 503
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "dead")


def test_step_that_does_not_end_is_told_as_dead_and_as_ready_once_it_ends(
    server, runner, monkeypatch
):
    monkeypatch.setattr(api, "STEP_TIMEOUT", 0.3)
    health = lambda: httpx.get(f"{server}/health").json()["status"]  # noqa: E731
    assert httpx.post(server, json={"prompt": "x"}).json()["response"] == "hello"
    runner.hold()
    asker = threading.Thread(target=httpx.post, args=(server,), kwargs={"json": {"prompt": "x"}})
    asker.start()
    wait_for(lambda: httpx.get(f"{server}/health").json()["running"] == 1)
    wait_for(lambda: health() == "dead")
    runner.free()
    asker.join(20)
    assert health() == "ready"


def test_template_process_that_does_not_start_is_a_503_and_seen(server, monkeypatch):
    """And it serves again as soon as the process does start, without a request that tries it."""
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    ask = lambda: httpx.post(f"{server}/v1/chat/completions", json=chat)  # noqa: E731
    health = lambda: httpx.get(f"{server}/health").json()["status"]  # noqa: E731
    assert ask().status_code == 200
    monkeypatch.setattr(child_process, "RETRY_S", 0.1)
    with monkeypatch.context() as broken:
        broken.setattr(template_renderer.renderer(), "module", "engine.prompt.gone")
        template_renderer.renderer().process.kill()
        for _ in range(2):
            refused = ask()
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            assert refused.json()["error"]["code"] == "not_serving"
            assert "gone" not in refused.text
        assert health() == "dead"
        completion = httpx.post(f"{server}/v1/completions", json={"prompt": "x"})
        assert completion.status_code == 200  # which needs no template
    wait_for(lambda: health() == "ready")
    assert ask().status_code == 200


def test_idle_server_is_not_dead(server, monkeypatch):
    monkeypatch.setattr(api, "STEP_TIMEOUT", 0.0)
    assert httpx.get(f"{server}/health").json()["status"] == "ready"


def one_fails(url: str, bad: str) -> None:
    async def crowd() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url) as client:
            return await asyncio.gather(
                *(client.post("/", json={"prompt": p}) for p in ("good", bad, "fine"))
            )

    answers = asyncio.run(crowd())
    assert [a.status_code for a in answers] == [200, 500, 200]
    assert [a.json()["response"] for a in answers[::2]] == ["hello"] * 2
    assert "secret" not in answers[1].text
    assert answers[1].headers["x-request-id"]
    assert httpx.get(f"{url}/health").status_code == 200


def test_tokenizer_fault_fails_one_request(server, monkeypatch):
    encode = ChatTokenizer.encode

    def broken(self, messages: list[Message], *given: object, **options: bool) -> list[int]:
        if "boom" in messages[-1]["content"]:
            raise RuntimeError("a secret")
        return encode(self, messages, *given, **options)

    monkeypatch.setattr(ChatTokenizer, "encode", broken)
    one_fails(server, "boom")


def test_detokenizer_fault_fails_one_request(server, monkeypatch):
    begin = OutputProcessor.__init__

    def fail(token: int) -> str:
        raise RuntimeError("a secret")

    def broken(self, answer: StreamedSequence, *given: object) -> None:
        begin(self, answer, *given)
        if answer.num_prompt > 30:
            self.detokenizer.push = fail

    monkeypatch.setattr(OutputProcessor, "__init__", broken)
    one_fails(server, "long" * 10)


SCHEMAS = {
    "needs too much at once": {"type": "string", "pattern": "^(a{1000}){1000}$"},
    "needs too much later": {
        "type": "array",
        "prefixItems": [{"enum": ["hello"]}, {"type": "string", "pattern": "^(a{1000}){1000}$"}],
        "minItems": 2,
    },
    "refers to itself": {"$ref": "#"},
    "is too long": {"enum": ["x" * 70_000]},
    "is deep": json.loads('{"items":' * 400 + "{}" + "}" * 400),
    "is wide": {"properties": {f"p{i}": {"type": "string"} for i in range(10_000)}},
    "cannot be met": {"type": "object", "properties": {"a": False}, "required": ["a"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("how", SCHEMAS)
def test_impossible_schema_is_a_400_and_holds_up_nobody(server, how):
    """It was once a 200 with an answer that ended at once."""
    schema = {"type": "json_schema", "json_schema": {"schema": SCHEMAS[how]}}
    body = {"messages": [{"role": "user", "content": "x"}], "response_format": schema}
    waits: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            started = time.process_time()
            httpx.get(f"{server}/health")
            waits.append(time.process_time() - started)

    watcher = threading.Thread(target=watch)
    watcher.start()
    # By this process's own use of the processor, whatever other programs leave to it.
    started = time.process_time()
    answer = httpx.post(f"{server}/v1/chat/completions", json=body)
    took = time.process_time() - started
    done.set()
    watcher.join()
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "response_format"
    assert "<state>" not in answer.text
    assert ("longer than 65,536" in answer.text) == (how in ("is too long", "is wide"))
    assert took < 5
    assert max(waits) < 2
    assert httpx.post(server, json={"prompt": "x"}).json()["response"] == "hello"
