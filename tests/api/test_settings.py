"""One field is one flag and one variable; a bad value is one sentence."""

import os
import re
import shutil
import subprocess
import sys

import pytest

import api
from engine.checkpoint.checkpoint import SUPPORTED, check_versions
from engine.errors import StartError
from serving import __version__
from serving.command_line import EPILOG, GROUPS
from tests.conftest import ROOT


def test_a_flag_beats_a_variable_and_a_variable_beats_the_default(monkeypatch):
    assert api.read_settings([]).port == 6006
    monkeypatch.setenv("CHAT_PORT", "7000")
    assert api.read_settings([]).port == 7000
    assert api.read_settings(["--port", "8000"]).port == 8000


def test_an_empty_variable_is_no_value(monkeypatch):
    monkeypatch.setenv("CHAT_PORT", "")
    assert api.read_settings([]).port == 6006


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "abc"], ["--port: must be a whole number from 1 to 65535, not 'abc'."]),
        (["--port", "70000"], ["--port: must be a whole number from 1 to 65535, not '70000'."]),
        (["--max-batch", "1.5"], ["--max-batch: must be a whole number, not '1.5'."]),
        (["--request-timeout", "-1"], ["--request-timeout: must be greater than 0, not '-1'."]),
        (["--drain-timeout", "inf"], ["--drain-timeout: must be a finite number, not 'inf'."]),
        (["--dtype", "int3"], ["--dtype: must be", "bfloat16"]),
    ],
)
def test_a_bad_value_is_one_sentence_that_names_the_flag(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        api.read_settings(arguments)
    said = f"{stop.value}{capsys.readouterr().err}"
    assert all(word in said for word in words), said
    assert "Traceback" not in said


def test_a_bad_variable_is_one_sentence_too(monkeypatch):
    monkeypatch.setenv("CHAT_PORT", "banana")
    with pytest.raises(SystemExit, match=r"CHAT_PORT: must be a whole number.*banana"):
        api.read_settings([])
    with pytest.raises(SystemExit, match=r"--port: .*70000"):
        api.read_settings(["--port", "70000"])


def test_variable_of_kubernetes_is_explained(monkeypatch):
    monkeypatch.setenv("CHAT_PORT", "tcp://10.96.0.17:6006")
    told = r"CHAT_PORT: .*not 'tcp://10.*Kubernetes .* Service called chat: .*enableServiceLinks"
    with pytest.raises(SystemExit, match=told):
        api.read_settings([])
    assert api.read_settings(["--port", "7000"]).port == 7000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prot", "1"], "there is no flag --prot; did you mean --port?"),
        (["--cache_memory=1GiB"], "did you mean --cache-memory?"),
        (["--no-check-page"], "did you mean --no-chat-page?"),
        (["-port", "1"], "there is no flag -port; did you mean --port?"),
        (["internlm2-7b"], "'internlm2-7b' is no flag; did you mean --model internlm2-7b?"),
        (["--port", "1", "--nonsense"], "there is no flag --nonsense; --help lists them."),
    ],
)
def test_unknown_flag_is_one_sentence(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        api.read_settings(arguments)
    assert str(stop.value) == f"api.py: {words}" or str(stop.value).endswith(words)
    assert not capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "ascii"])
def test_check_is_written_whatever_the_encoding_of_the_console(encoding):
    """A prompt in Chinese, and a model that says anything."""
    code = (
        "import sys, api; api.check_files = api.load_served = lambda settings: None;"
        "api.check_model = lambda model: '你好 \U0001f642 é\\n';"
        "sys.argv = ['api.py', '--check']; api.main()"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.decode() == "你好 🙂 é\n"


@pytest.fixture(scope="module")
def help_text():
    return subprocess.run(
        [sys.executable, "api.py", "--help"],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_help_names_every_field(help_text):
    for name, field in api.Settings.model_fields.items():
        flag = name.replace("_", "-")
        assert f"  --{flag} " in help_text or f"  --[no-]{flag} " in help_text
        assert " ".join(field.description.split()) in " ".join(help_text.split())


def test_every_setting_has_a_group_of_help(help_text):
    placed = [name for names in GROUPS.values() for name in names]
    assert sorted(placed) == sorted(api.Settings.model_fields)
    headings = [line[:-1] for line in help_text.splitlines() if re.fullmatch("[A-Z][a-z]+:", line)]
    assert headings == [*GROUPS, "Help"]


def test_help_is_in_plain_words(help_text):
    for noise in (" str ", " int ", " float ", "SecretStr", "Path ", "None", "(default: )"):
        assert noise not in help_text
    assert "--port PORT" in help_text
    assert "--[no-]reuse" in help_text
    assert "(default: on)" in help_text
    assert "python api.py --model internlm2-7b" in help_text


def test_examples_of_help_parse():
    lines = [line.split("   ")[0] for line in EPILOG.splitlines() if "python api.py" in line]
    assert len(lines) >= 4
    for line in lines:
        api.read_settings(line.partition("api.py")[2].split())


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stop:
        api.read_settings(["--version"])
    assert not stop.value.code
    assert capsys.readouterr().out == f"chat-api {__version__}\n"


def test_version_is_that_of_the_changelog():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", text, re.MULTILINE)
    assert versions[0] == __version__


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], "--model"),
        (["--port", "banana"], "--port"),
        (["--model", "no-such-model"], "there is no model 'no-such-model'"),
        (["--model", "/no/where", "--check"], "there is no folder /no/where"),
        (["--chat-template", "chatml", "--model", "demo"], "there is no file 'chatml'"),
    ],
)
def test_what_needs_no_model_is_told_without_importing_torch(arguments, words, tmp_path):
    out = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "api.py"), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert words in out.stdout + out.stderr
    imported = {line.rpartition("|")[2].strip() for line in out.stderr.splitlines()}
    assert "fastapi" in imported
    assert not {"torch", "transformers", "gradio"} & imported
    assert "Traceback" not in out.stderr


def test_a_template_file_loses_its_byte_order_mark(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_bytes("{{ messages }}".encode("utf-8-sig"))
    assert api.read_template(api.Settings(chat_template=file)) == "{{ messages }}"


def test_a_template_file_that_is_no_text_is_named(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_bytes("{{ 你好 }}".encode("gbk"))
    with pytest.raises(StartError, match=r"--chat-template: .*chat\.jinja.* UTF-8"):
        api.read_template(api.Settings(chat_template=file))


def test_importing_api_loads_and_parses_nothing():
    """With arguments that it would refuse, and a variable that it would refuse."""
    code = "import sys; sys.argv += ['--nonsense']; import api; print(api.__name__)"
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"CHAT_PORT": "banana", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert out.stdout == "api\n", out.stderr


def test_an_old_python_is_told_what_to_do(tmp_path):
    """The check runs before anything that an old Python cannot import."""
    source = (ROOT / "api.py").read_text(encoding="utf-8")
    head = source[: source.index("import asyncio")]
    old = "import sys; sys.version_info = (3, 10, 14)\n" + head.replace("import sys\n", "")
    out = subprocess.run([sys.executable, "-c", old], capture_output=True, text=True)
    assert out.returncode == 1
    assert "Python 3.11 or newer" in out.stderr
    assert "Traceback" not in out.stderr


@pytest.mark.skipif(not shutil.which("python3.10"), reason="there is no Python 3.10 here")
def test_pip_of_an_old_python_says_what_is_needed(tmp_path):
    done = subprocess.run(
        ["python3.10", "-m", "pip", "install", "-r", ROOT / "requirements.txt", "--dry-run"],
        env={"PATH": os.environ["PATH"], "PYENV_VERSION": "3.10", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode
    assert "Python-3.11-or-newer-is-needed" in done.stderr
    assert "Collecting" not in done.stdout


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_a_library_out_of_range_is_named_with_the_remedy(name):
    versions = {"torch": "2.13.0+cpu", "transformers": "5.23.0"}
    check_versions((versions).__getitem__)
    with pytest.raises(StartError, match=f"{name} 2.1.*pip install"):
        check_versions((versions | {name: "2.1"}).__getitem__)


def test_the_ranges_agree_with_requirements_txt():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert f"torch{SUPPORTED['torch']}" in lines
    pinned = next(line for line in lines if line.startswith("transformers=="))
    check_versions({"torch": "2.6", "transformers": pinned.partition("==")[2]}.__getitem__)


def test_base_is_for_an_adapter(tmp_path):
    settings = api.read_settings(["--model", str(tmp_path), "--base", "demo"])
    with pytest.raises(
        StartError, match=r"--base is for a LoRA adapter in --model, and .* is none"
    ):
        api.find_adapters_base(settings, tmp_path)
    assert api.find_adapters_base(api.read_settings([]), tmp_path) is None


def test_base_that_is_missing_stops_the_start(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/root/gone"}')
    with pytest.raises(StartError, match=r"on /root/gone, which is not here; .* with --base"):
        api.check_files(api.read_settings(["--model", str(tmp_path)]))
    with pytest.raises(StartError, match="there is no folder /no/where"):
        api.check_files(api.read_settings(["--model", str(tmp_path), "--base", "/no/where"]))


@pytest.mark.parametrize("name", [" padded", "two\nlines", "x" * 201])
def test_served_name_is_one_line(name):
    with pytest.raises(SystemExit, match="--served-model-name: must be a name of at most 200"):
        api.read_settings([f"--served-model-name={name}"])


@pytest.mark.parametrize("now", [256, 20_000])
def test_limit_of_files_on_macos(monkeypatch, now: int):
    """Its hard limit is none, and to ask for that is an error."""
    resource = pytest.importorskip("resource")
    asked = []

    def setrlimit(_: int, limits: tuple[int, int]) -> None:
        if limits[0] == resource.RLIM_INFINITY:
            raise ValueError("current limit exceeds maximum limit")
        asked.append(limits)

    monkeypatch.setattr(resource, "getrlimit", lambda _: (now, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    api.allow_many_files()
    assert asked == [(max(now, 10_240), resource.RLIM_INFINITY)]
