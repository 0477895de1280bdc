"""From a name to a model that answers, or to one sentence with the remedy."""

import re
import shutil
import signal
import socket
import threading
from contextlib import suppress
from typing import NamedTuple

import httpx
import pytest
import torch
from benchmark import free_port

import api
import model_download
from engine import ChatModel
from engine.checkpoint.checkpoint import check_gpus
from engine.errors import StartError
from engine.layers.autotune import choose_weight_format
from engine.loading import load
from model_download import DownloadError, find_model
from tests.conftest import PATIENCE, byte_tokenizer, tiny_llama, wait_for
from tests.server_process import server_process


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny checkpoint on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_find_model_takes_a_folder(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    assert find_model(str(checkpoint)) == checkpoint
    assert find_model("./tiny").samefile(checkpoint)


def test_find_model_looks_up_a_name_in_models_whatever_the_working_directory(
    checkpoint, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_download, "MODELS", tmp_path / "models")
    (tmp_path / "models").symlink_to(checkpoint.parent, target_is_directory=True)
    assert find_model("tiny") == tmp_path / "models" / "tiny"


@pytest.mark.parametrize(
    "layout",
    [
        "models/org--tiny-1.0/snapshots/master",  # modelscope
        "models--org--tiny-1.0/snapshots/0a1b2c",  # huggingface_hub
        "org/tiny-1___0",  # modelscope's older releases, as in the tutorials
    ],
)
def test_find_model_takes_the_folder_of_a_hubs_cache(checkpoint, tmp_path, layout):
    cache = tmp_path / "cache"
    shutil.copytree(checkpoint, cache / layout)
    (cache / ".docker").mkdir()
    (cache / ".docker" / "config.json").write_text("{}")
    assert find_model(str(cache)) == cache / layout
    assert find_model(str(cache / layout)) == cache / layout
    shutil.copytree(checkpoint, (cache / layout).parent / "other")
    with pytest.raises(DownloadError, match=r"holds several models.*other"):
        find_model(str(cache))


def test_model_in_the_working_directory_has_its_folders_name(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint)
    model = load(".", cache_memory="1MiB")
    model.engine.close()
    assert model.name == checkpoint.name


def test_checkpoint_is_loaded_in_the_given_dtype(checkpoint):
    model = load(checkpoint, dtype="float32")
    try:
        assert model.name == "tiny"
        assert model.context_length == 512
        assert model.vocabulary == 260
        assert model.engine.runner.model.dtype == torch.float32
    finally:
        model.engine.close()


def test_card_that_torch_cannot_use_stops_the_start(monkeypatch):
    monkeypatch.setattr(api.Path, "glob", lambda self, pattern: iter([self / "nvidia0"]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if torch.cuda.is_available():
        check_gpus("auto")
        return
    with pytest.raises(StartError, match=r"cannot use.*--device-map cpu"):
        check_gpus("auto")
    check_gpus("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_gpus("auto")


class Done(NamedTuple):
    code: int
    said: str


def run_api(*flags: str) -> Done:
    """`python api.py` to its end."""
    with server_process(api.load_served, "--host", "127.0.0.1", *flags) as process:
        return Done(process.wait(PATIENCE), process.said())


@pytest.mark.slow
@pytest.mark.parametrize("check", [[], ["--check"]])
def test_missing_model_ends_the_process_with_one_sentence_and_code_1(check):
    done = run_api("--model", "nowhere", "--port", str(free_port()), *check)
    assert done.code == 1
    assert "api.py: there is no model 'nowhere'" in done.said
    assert "Traceback" not in done.said


def test_unreadable_weights_end_the_process_with_one_sentence(checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "model.safetensors").write_bytes(b"\xff" * 100)
    done = run_api("--model", str(broken), "--port", str(free_port()))
    assert done.code == 1
    assert "Traceback" not in done.said
    said = [line for line in done.said.splitlines() if line.startswith("api.py: ")]
    assert len(said) == 1
    assert f"the model could not be loaded from {broken / 'model.safetensors'}" in said[0]
    assert "run the download again" in said[0]


def test_port_in_use_ends_the_process_with_one_sentence(checkpoint):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run_api("--model", str(checkpoint), "--port", str(taken.getsockname()[1]))
    assert done.code == 1
    assert re.fullmatch(
        r"api\.py: cannot listen on '127\.0\.0\.1', port \d+: Address already in use; .*\n",
        done.said,
    )


def load_for_long(settings: api.Settings) -> ChatModel:
    threading.Event().wait(10 * PATIENCE)
    raise AssertionError("nobody ended it")


def test_ctrl_c_while_loading_ends_the_process():
    """The loader is a daemon: nobody waits for weights that nobody wants."""
    port = free_port()

    def explained() -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/health").json()["status"] == "loading"
        return False

    with server_process(load_for_long, "--port", str(port), "--no-chat-page") as process:
        wait_for(explained)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
        assert "Traceback" not in process.said()


@pytest.mark.parametrize(
    ("device_map", "reason"),
    [
        ("cuda:9", "names cuda:9, but torch sees .* CUDA card"),
        ('{"model": "cpu", "lm_head": "cuda:9"}', "names cuda:9"),
        ('{"model": 9}', "names .*:9|is no device map"),
        ("gpu", "'gpu' is no device map; --device-map takes"),
        ("{model: cpu}", "is no device map"),
    ],
)
def test_device_that_is_not_there_is_no_damaged_file(checkpoint, device_map, reason):
    with pytest.raises(StartError, match=reason) as refused:
        load(checkpoint, device_map=device_map)
    assert "damaged" not in str(refused.value)


@pytest.mark.parametrize("cards", [0, 1, 2])
@pytest.mark.parametrize("wish", ["cuda:{}", '{{"": "cuda:{}"}}'])
def test_card_behind_the_last_is_not_there(checkpoint, monkeypatch, cards, wish):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr("engine.loading.check_gpus", lambda _: None)
    with pytest.raises(StartError, match=f"names cuda:{cards}, but torch sees {cards or 'no'}"):
        load(checkpoint, device_map=wish.format(cards))


def test_what_computes_while_loading_ends_with_its_thread(checkpoint, monkeypatch):
    """OpenMP's threads are then the engine's alone."""
    computing = []

    def settle(*args):
        computing.append(threading.current_thread())
        return choose_weight_format(*args)

    monkeypatch.setattr("engine.loading.choose_weight_format", settle)
    load(checkpoint, cache_memory="8MiB").close()
    assert computing[0] is not threading.current_thread()
    wait_for(lambda: not computing[0].is_alive())


def test_what_is_measured_is_kept_for_the_next_start(checkpoint, monkeypatch, tmp_path):
    measured = []

    def costs(runner, most):
        measured.append(most)
        return {1: 0.01, 16: 0.02 * len(measured)}

    monkeypatch.setattr("engine.kernels.kept.cache_folder", lambda: tmp_path / "chat-api")
    monkeypatch.setattr("engine.loading.step_costs", costs)
    for anew, wanted in ((False, 0.02), (False, 0.02), (True, 0.04), (False, 0.04)):
        model = load(checkpoint, cache_memory="8MiB", measure_anew=anew)
        assert dict(model.engine.scheduler.budget.costs) == {1: 0.01, 16: wanted}
        model.close()
    assert len(measured) == 2
