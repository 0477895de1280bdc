"""A model's folder as people have it: edited on Windows, cut short, cloned without its weights."""

import codecs
import json
import shutil
from pathlib import Path

import pytest
from transformers import GenerationConfig

from engine.checkpoint.checkpoint import load_model
from engine.checkpoint.files import OBJECTS, check_folder, plain_folder
from engine.checkpoint.model_config import MAX_CONTEXT
from engine.errors import StartError
from engine.loading import load
from engine.model import ChatModel
from tests.conftest import byte_tokenizer, tiny_llama

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny_llama()
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=[256, 258])
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "tiny"))


def loaded(folder: Path) -> ChatModel:
    model = load(folder, cache_memory="1MiB", dtype="float32")
    model.close()
    return model


def change(folder: Path, name: str, **said: object) -> None:
    file = folder / name
    held = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(held | said))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_saved_by_windows_editors_are_read_as_they_are(folder, encoding):
    for file in (*folder.glob("*.json"), *folder.glob("*.jinja")):
        text = file.read_text()
        file.write_text(text, encoding=encoding if file.suffix == ".json" else "utf-8-sig")
    model = loaded(folder)
    assert model.defaults.temperature == 0
    assert model.engine.end_ids == {256, 258}
    assert model.encode([{"role": "user", "content": "x"}])[0] == 258
    with plain_folder(folder) as plain:
        place = plain
        assert (plain / "model.safetensors").is_symlink()
    assert not place.exists()


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("damage", [codecs.BOM_UTF8 + b'{"a": ', b"[1]", b'{"a": "\xff"}', b""])
def test_damaged_json_ends_the_start_by_its_name(folder, name, damage):
    (folder / name).write_bytes(damage)
    with pytest.raises(StartError, match=rf"tiny/{name} .*run the download again"):
        check_folder(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_pointer_of_git_lfs_is_told_as_one(folder, name):
    (folder / name).write_text(POINTER)
    with pytest.raises(StartError, match=rf"{name} is a pointer of Git LFS.*git lfs pull"):
        load_model(folder)


def test_shard_that_only_the_index_has_is_named(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    change(folder, "model.safetensors.index.json", **index)
    with pytest.raises(StartError, match=r"model-00001-of-00002\.safetensors .*it is not there"):
        load_model(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"vocab_size": 2_000_000}, "describes a model of"),
        ({"num_hidden_layers": 5_000}, "describes a model of"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers 100000000"),
        ({"vocab_size": 0}, "vocab_size 0"),
        ({"num_attention_heads": -4}, "num_attention_heads -4"),
        ({"rope_theta": 0}, "rope_theta 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "rope_theta 0.0"),
    ],
    ids=str,
)
def test_number_that_cannot_be_is_named_before_it_costs(folder, said, name):
    change(folder, "config.json", **said)
    if "rope_theta" in said:
        held = json.loads((folder / "config.json").read_text())
        del held["rope_parameters"]
        (folder / "config.json").write_text(json.dumps(held))
    with pytest.raises(StartError, match=name):
        load_model(folder)


def test_context_beyond_all_models_is_cut_and_told(folder, caplog):
    change(folder, "config.json", max_position_embeddings=10**9)
    assert loaded(folder).context_length < MAX_CONTEXT  # as many as the cache has rows
    assert "a context of 1,000,000,000 tokens" in caplog.text


def test_end_beyond_the_vocabulary_is_left_out_or_refused(folder, caplog):
    change(folder, "generation_config.json", eos_token_id=[256, 99_999])
    assert loaded(folder).engine.end_ids == {256}
    assert "99999 ends an answer, and the last token of the model is 259" in caplog.text


def test_lone_chat_template_json_is_the_template(folder):
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(StartError, match="no chat template"):
        loaded(folder)
    change(folder, "chat_template.json", chat_template=template)
    assert loaded(folder).encode([{"role": "user", "content": "x"}])[0] == 258
