"""The READMEs say the same, and with docs/ nothing that the program does not do."""

import ast
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import pytest
import requests
import torch
from pydantic import SecretStr
from transformers import GenerationConfig

import api
import model_download
from engine.prompt.families import FAMILIES
from engine.prompt.generation_defaults import checkpoint_defaults
from engine.sampling_params import SamplingParams
from serving import request_model
from tests.conftest import ROOT, byte_tokenizer, chat_model, ready, serve, tiny_llama, wait_for

NAMES = ("README.md", "README.zh.md")
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (*NAMES, "CHANGELOG.md", "CONTRIBUTING.md", *DOCS)
}
TEXTS = {name: PAGES[name] for name in NAMES}
# Each English page and its Chinese one.
PAIRS = [("README.md", "README.zh.md")]
PAIRS += [(name.replace(".zh", ""), name) for name in DOCS if name.endswith(".zh.md")]
API, OPERATING = PAGES["docs/api.md"], PAGES["docs/operating.md"]
HOW = PAGES["docs/how-it-works.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
# Others' programs' flags.
FOREIGN = {
    *("--factory", "--host", "--port", "--root-path"),  # uvicorn
    *("--http", "--timeout-graceful-shutdown", "--workers"),
    *("--generate", "--head", "--address", "--http-host", "--http-port"),  # ray, serve
    *("--index-url", "--system-site-packages"),  # pip, venv
    *("--no-binary", "--no-deps", "--build", "--target", "--allow-requantize"),  # llama.cpp
    *("--tasks", "--apply", "--batch", "--now"),  # lm-eval (--apply_chat_template), systemctl
    *("--no-cache-dir", "--gpus"),  # pip, docker
    *("--continuous-batching", "--data-binary"),  # transformers serve, curl
}
FAMILY_OF = {
    "deepseek-coder-v2-lite": "deepseek-v2",
    "index-1.9b": "index",
    "llama-3-8b": "llama-3",
    "xverse-7b": "xverse",
    "internlm2-7b": "internlm2",
    # Of no family; these defaults are any model's.
    "qwen3.5-0.8b": "internlm2",
    "qwen3.5-4b": "internlm2",
}

IN_THE_OTHER_LANGUAGE = {Path(name).name for pair in PAIRS for name in pair}
each = pytest.mark.parametrize("text", TEXTS.values(), ids=NAMES)
every = pytest.mark.parametrize("name", PAGES)


def rows_under(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table with this first column."""
    lines = [*text.splitlines(), ""]
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {heading} |")) + 2
    end = next(n for n in range(start, len(lines)) if not lines[n].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines[start:end]]


def table(*headings: str) -> pytest.MarkDecorator:
    """Gives a test the cells of the table with this first column, in each language."""
    rows = [rows_under(TEXTS[name], heading) for name, heading in zip(NAMES, headings, strict=True)]
    return pytest.mark.parametrize("rows", rows, ids=NAMES)


def blocks(text: str, *languages: str) -> list[str]:
    found = BLOCK.findall(text)
    return [code for language, code in found if not languages or language in languages]


def without_comments(code: str) -> str:
    return re.sub(r" *(?<!\S)# .*", "", code)


def prose(text: str) -> str:
    return BLOCK.sub("", text)


class Section(NamedTuple):
    level: int
    spans: set[str]
    tables: list[int]  # the columns of each table's lines
    items: int
    links: list[str]


def sections(text: str) -> list[Section]:
    """What must be alike in two languages."""
    found = []
    for part in re.split(r"^(?=#+ )", prose(text), flags=re.MULTILINE)[1:]:
        rows = [line for line in part.splitlines() if line.startswith("|")]
        links = re.findall(r"\]\(([^)]+)\)", part)
        found.append(
            Section(
                level=len(part) - len(part.lstrip("#")),
                spans=set(SPAN.findall(part)),
                tables=[len(re.findall(r"(?<!\\)\|", row)) for row in rows],
                items=len(re.findall(r"^- ", part, re.MULTILINE)),
                links=[
                    link.replace(".zh.md", ".md").replace("-chinese.png", ".png")
                    for link in links
                    if not (link.startswith("#") or link in IN_THE_OTHER_LANGUAGE)
                ],
            )
        )
    return found


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    named = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
    return named | set(re.findall(r'<a id="([\w-]+)"></a>', text))


def literals(*files: str) -> str:
    """All texts in these programs, each with a mark where something is put in."""
    found = []
    for file in files:
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


# ---- The two languages

in_pairs = pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=[pair[0] for pair in PAIRS])


@in_pairs
def test_both_languages_have_the_same_code_but_for_comments(english, chinese):
    for ours, theirs in zip(blocks(PAGES[english]), blocks(PAGES[chinese]), strict=True):
        assert without_comments(ours) == without_comments(theirs)


@in_pairs
def test_comments_in_code_are_in_the_language_of_the_page(english, chinese):
    said = (blocks(PAGES[name], "bash", "nginx", "ini", "python") for name in (english, chinese))
    ours, theirs = (re.findall(r"(?<!\S)# (.+)", "\n".join(codes)) for codes in said)
    assert len(ours) == len(theirs)
    assert [comment for comment in ours if not comment.isascii()] == []
    assert [comment for comment in theirs if not re.search("[\u4e00-\u9fff]", comment)] == []


@in_pairs
def test_both_languages_have_the_same_sections_tables_and_names(english, chinese):
    ours, theirs = sections(PAGES[english]), sections(PAGES[chinese])
    assert len(ours) >= 3
    assert ours == theirs


def test_scaling_starts_from_a_measured_table():
    measured = {(row[0], row[1]) for row in rows_under(PAGES["docs/benchmarks.md"], "clients")}
    told = {(row[0], row[1]) for row in rows_under(PAGES["docs/scaling.md"], "concurrent clients")}
    assert told
    assert told <= measured


@every
def test_links_have_targets(name):
    links = re.findall(r"\]\(([^)]+)\)", PAGES[name])
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@each
def test_readmes_are_read_in_five_minutes(text):
    assert len(text.splitlines()) <= 150


@pytest.mark.parametrize("index", ["docs/README.md", "docs/README.zh.md"])
def test_index_links_every_document(index):
    linked = {f"docs/{name}" for name in re.findall(r"\]\(([\w.-]+\.md)\)", PAGES[index])}
    translated = {chinese: english for english, chinese in PAIRS}
    others = translated.values() if index.endswith(".zh.md") else translated
    ours = {"docs/README.md", "docs/README.zh.md"}
    assert linked - ours == set(DOCS) - set(others) - ours


# ---- The program


def flags_of(file: str) -> set[str]:
    if file == "api.py":
        names = {f"--{name.replace('_', '-')}" for name in api.Settings.model_fields}
        switches = [name for name, f in api.Settings.model_fields.items() if f.annotation is bool]
        return (
            names
            | {f"--no-{name.replace('_', '-')}" for name in switches}
            | {"--help", "--version"}
        )
    source = (ROOT / file).read_text(encoding="utf-8")
    return set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', source)) | {"--help"}


OURS = (
    *("api.py", "model_download.py", "request.py", "benchmarks/simulate.py"),
    *("benchmarks/benchmark.py", "benchmarks/soak.py", "benchmarks/scale.py", "benchmarks/host.py"),
    *("benchmarks/model_types.py", "benchmarks/states.py"),
)


@every
def test_every_flag_exists(name):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGES[name]))
    assert len(named) > 15 or name != "docs/operating.md"
    assert named <= FOREIGN.union(*map(flags_of, OURS))


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Each `python FILE …` and what follows it, up to the next command."""
    for code in [*blocks(text, "bash", "powershell"), *SPAN.findall(prose(text))]:
        yield from re.findall(r"\bpython (\S+\.py)\b([^&\n]*)", code)


@every
def test_every_program_exists_and_takes_its_flags(name):
    started = list(commands(PAGES[name]))
    if name in TEXTS:
        assert {"api.py", "model_download.py", "request.py"} <= {file for file, _ in started}
    for file, rest in started:
        assert (ROOT / file).is_file(), file
        assert set(re.findall(r"--[a-z-]+", rest)) <= flags_of(file), (file, rest)
    files = r"\b(?:tests|benchmarks|docs|deploy)/(?:\w+/)*[\w-]+\.(?:py|txt|md|png)|\.ci/\w+"
    for path in re.findall(files, PAGES[name]):
        assert (ROOT / path).is_file(), path


def cluster_settings() -> set[str]:
    """Read from the source, as the module itself starts Ray."""
    tree = ast.parse((ROOT / "deploy/cluster.py").read_text(encoding="utf-8"))
    (kind,) = (n for n in tree.body if getattr(n, "name", None) == "ClusterSettings")
    return {f"CLUSTER_{n.target.id.upper()}" for n in kind.body if isinstance(n, ast.AnnAssign)}


def test_every_variable_exists():
    fields = {f"CHAT_{name.upper()}" for name in api.Settings.model_fields} | cluster_settings()
    named = {name: set(re.findall(r"\b(?:CHAT|CLUSTER)_[A-Z_]+\b", PAGES[name])) for name in PAGES}
    tests = named.pop("docs/testing.md")
    assert tests - fields == {"CHAT_TEST_DATA", "CHAT_TEST_DEVICE", "CHAT_TEST_TOKENIZERS"}
    assert set.union(*named.values()) <= fields
    assert cluster_settings() <= named["docs/scaling.md"]


def test_table_of_settings_is_the_programs():
    def spelled(value: object) -> str:
        if isinstance(value, bool):
            return "on" if value else "off"
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        return "" if value in (None, ()) else str(value)

    real = {
        f"--{name.replace('_', '-')}": spelled(f.default)
        for name, f in api.Settings.model_fields.items()
    }
    assert {row[0].strip("`"): row[2] for row in rows_under(OPERATING, "flag")} == real


@table("tokens/s ([all](docs/benchmarks.md))", "tokens/s（[全部数据](docs/benchmarks.md)）")
def test_figures_are_those_of_the_benchmarks(rows):
    measured = set(re.findall(r"(?<=\| )[\d.,]+(?= \|)", PAGES["docs/benchmarks.md"]))
    quoted = [re.findall(r"[\d,]*\d\.?\d*$", cell)[0] for row in rows for cell in row[2:]]
    assert len(quoted) == 2 * len(rows)
    assert set(quoted) <= measured


@each
def test_setup_commands_are_in_readme(text):
    lines = "".join(blocks(text, "bash")).splitlines()
    assert "pip install -r requirements.txt && python api.py" in lines
    assert "pip install -r tests/requirements.txt && python -m pytest" in lines


def test_table_of_statuses_is_the_programs():
    told = {int(code) for row in rows_under(API, "status") for code in row[0].split(", ")}
    assert told == {kind.status for kind in (*api.ERRORS.values(), api.SERVER_FAILED)}


def test_table_of_fields_is_the_programs():
    rows = rows_under(API, "field")
    told = {field for row in rows for field in SPAN.findall(row[0])}
    taken = {"max_length" if f == "max_new_tokens" else f for f in api.ChatRequest.model_fields}
    assert told == taken
    (lengths,) = (set(SPAN.findall(row[1])) for row in rows if row[0] == "`max_length`")
    assert lengths | {"max_length"} == set(request_model.LENGTH_NAMES)


def test_table_of_defaults_is_the_programs(demo_folder):
    families = {family.name: family.defaults for family in FAMILIES}
    real = {name: families[family] for name, family in FAMILY_OF.items()}
    real["demo"] = checkpoint_defaults(GenerationConfig.from_pretrained(demo_folder))
    knobs = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
    told = []
    for row in rows_under(API, "defaults of"):
        given = [re.match(r"[\d.]*", cell)[0] for cell in row[1:]]
        for name in SPAN.findall(row[0]):
            told.append(name)
            for text, knob in zip(given, knobs, strict=True):
                # Greedy decoding needs neither.
                unused = real[name].temperature == 0 and knob in ("top_k", "top_p")
                assert unused or float(text) == getattr(real[name], knob), (name, knob)
    assert sorted(told) == sorted(model_download.KNOWN)
    assert real["internlm2-7b"] == SamplingParams()  # and so of any other model


def test_models_whose_own_defaults_go_first_are_listed():
    said = re.search(r"^For `(.+?)generation_config", API, re.MULTILINE | re.DOTALL)[0]
    theirs = GenerationConfig(do_sample=True, temperature=0.123)
    own = {f.name for f in FAMILIES if checkpoint_defaults(theirs, f).temperature == 0.123}
    assert {FAMILY_OF[name] for name in SPAN.findall(said)} == own


@table("name", "名称")
def test_table_of_models_is_the_programs(rows):
    hubs = {"ModelScope": "modelscope", "Hugging Face": "huggingface"}
    told = {}
    for row in rows:
        named = [hubs[hub] for hub in re.split(", |、", row[-1]) if hub in hubs]
        (name,) = SPAN.findall(row[0])
        told[name] = (row[2], named)
    known = {name: (m.size, list(m.repos)) for name, m in model_download.KNOWN.items()}
    assert told == known


def test_fields_told_as_refused_are_refused(server):
    start = API.index("`n`, `tools`")
    names = SPAN.findall(API[start : API.index("\n\n", start)])
    assert len(names) >= 5
    for name in names:
        answer = requests.post(server, json={"prompt": "x", name: 2})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


def test_fields_told_as_refused_under_v1_are_refused(server):
    items = re.split(r"^(?=- |$)", API, flags=re.MULTILINE)
    (item,) = (item for item in items if "`modalities`" in item)
    names = SPAN.findall(item)
    prompts = {
        "chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "completions": {"prompt": "x"},
    }
    assert len(names) >= 2
    for call, prompt in prompts.items():
        for name in names:
            answer = requests.post(f"{server}/v1/{call}", json={**prompt, name: 2})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


def test_every_metric_exists(server):
    known = set(re.findall(r"^# TYPE (\w+)", requests.get(f"{server}/metrics").text, re.M))
    told = {
        name: set(re.findall(r"\bchat_(?!page\b)[a-z0-9_]+\b", text))
        for name, text in PAGES.items()
    }
    fields = api.ChatRequest.model_fields.keys() | api.Settings.model_fields.keys()
    assert set.union(*told.values()) - fields <= known
    assert {name for name in known if not name.endswith("_created")} <= told["docs/operating.md"]


def test_table_of_log_fields_is_a_real_log_line(server, caplog):
    caplog.set_level("INFO", "chat")
    requests.post(server, json={"prompt": "x"})
    wait_for(lambda: "completion_tokens" in caplog.text)
    (line,) = (r.getMessage() for r in caplog.records if "completion_tokens" in r.getMessage())
    rows = rows_under(OPERATING, "field of the log")
    assert [name for row in rows for name in SPAN.findall(row[0])] == re.findall(r"(\w+)=", line)


def test_quoted_error_messages_exist():
    page = PAGES["docs/troubleshooting.md"]
    start, _, answer = page.partition("## It does not answer")
    rows = [*rows_under(start, "what you see"), *rows_under(answer, "what you see")]
    engine = [str(path.relative_to(ROOT)) for path in (ROOT / "engine").rglob("*.py")]
    said = literals("api.py", "model_download.py", "hubs/demo.py", "request.py", *engine)
    theirs = {"/docs", "finish_reason", "length"}
    quoted = {word for row in rows for word in SPAN.findall(row[0])} - theirs
    assert len(quoted) >= 8
    assert not [words for words in quoted if words not in said]


def test_example_error_is_a_real_one(server):
    (told,) = (code for code in blocks(API, "json") if '"error"' in code)
    answer = requests.post(server, json={"prompt": "x", "temperature": 3})
    time = re.compile(r'"time":"[^"]+"')
    assert time.sub("", answer.text) == time.sub("", told.strip())


def definitions(file: str) -> set[str]:
    """Functions, classes, and methods as Class.method."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if hasattr(inner, "name")}
    return names


WAY = [
    (SPAN.findall(row[0])[0], SPAN.findall(row[1]))
    for row in rows_under(HOW.partition("## The way")[2], "file")
]


def test_way_of_a_request_names_functions_that_exist():
    assert len(WAY) > 20
    for file, names in WAY:
        assert names
        assert set(names) <= definitions(file), file


@contextmanager
def calls_recorded() -> Iterator[dict[str, None]]:
    """Yields the functions of ours that new threads call, as "file name", in order, each once."""
    called: dict[str, None] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)):
            path = Path(code.co_filename).relative_to(ROOT).as_posix()
            called[f"{path} {code.co_qualname}"] = None

    threading.setprofile(note)
    try:
        yield called
    finally:
        threading.setprofile(None)


def test_way_of_a_request_is_in_the_order_in_which_it_goes(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    settings = api.Settings(model=str(tmp_path), dtype="float32", cache_memory="16MiB")
    body = {"prompt": "x", "max_length": 2, "stream": True}
    with calls_recorded() as called, serve(lambda _: api.load_served(settings), api_key="k") as url:
        ready(url)
        called.clear()
        headers = {"Authorization": "Bearer k"}
        assert requests.post(url, json=body, headers=headers).text.endswith("data: [DONE]\n\n")
    places = []
    for file, names in WAY:  # a class stands for its methods, and a method may lack its class
        here = re.compile(rf"{file} (.+\.)?({'|'.join(names)})\b")
        first = next((n for n, call in enumerate(called) if here.match(call)), None)
        assert first is not None, (file, names)
        places.append(first)
    assert places == sorted(places)


def test_every_module_of_the_engine_is_described():
    told, room = [], ""
    for place, names, _ in rows_under(HOW, "room"):
        if place:
            (room,) = [name for name in SPAN.findall(place) if name.endswith("/")] or [""]
        told += [room + name for name in SPAN.findall(names)]
    files = [path.relative_to(ROOT / "engine") for path in (ROOT / "engine").rglob("*.*")]
    modules = {path.as_posix().removesuffix(".py") for path in files if path.suffix != ".pyc"}
    assert sorted(told) == sorted(name for name in modules if not name.endswith("/__init__"))


def test_every_room_of_serving_is_described():
    rooms = {f"serving/{path.name}" for path in (ROOT / "serving").glob("*.py")}
    told = {name for row in rows_under(HOW, "file") for name in SPAN.findall(row[0])}
    assert rooms - told == {"serving/__init__.py"}


# ---- Its examples


@pytest.fixture(scope="module")
def demo_model(demo_folder):
    return api.load_served(api.Settings(model=str(demo_folder)))


@pytest.fixture(scope="module")
def demo(demo_model):
    with serve(lambda settings: demo_model) as url:
        yield ready(url)


# What is measured at each start, and what follows from it.
MEASURED = re.compile(
    r"[\d.]+e-\d+|\b\d+ ms|\d+ and (?=\d+ ms)|KV cache: [\d,]+|(?<=up to )\d+(?= tokens of)"
    r"|(?<=weights: )[\w ,.]+|(?<=parameters, )[\w ,.]+(?=, on )"
    # In half precision, which a busy start may choose, these are others.
    r"|(?<=attention:    )[a-z ]+(?= over)|(?<=of a batch's logits, against ).+"
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is the log of a start without a card")
def test_example_start_log_is_a_real_one(demo_model, caplog):
    (log,) = (code for code in blocks(OPERATING) if " INFO ready: " in code)
    told = [line.split(" ", 3)[3] for line in log.splitlines()]
    caplog.set_level("INFO", "chat")
    app = api.build_app(api.Settings(), lambda settings: demo_model)
    app.state.service._load()
    real = [record.getMessage() for record in caplog.records]
    (begin,) = (line for line in told if line.startswith("model: "))
    start = told.index(begin)
    said = literals("hubs/demo.py", "engine/loading.py")
    assert told[0] == real[0]
    assert len(told[1:start]) == 2
    for stage in told[1:start]:
        assert stage.split(" (")[0].split(" ")[0] in said
    assert [MEASURED.sub("", line) for line in told[start:]] == [
        MEASURED.sub("", line) for line in real[1:]
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is of a start without a card")
def test_example_of_check_is_a_real_one(demo_model):
    (told,) = (code for code in blocks(OPERATING) if "eight tokens: " in code)
    real = api.check_model(demo_model)
    assert MEASURED.sub("", told) == MEASURED.sub("", real)


def test_example_call_is_answered_as_shown(demo):
    english = TEXTS["README.md"]
    (told,) = (code for code in blocks(english, "json") if '"response"' in code)
    (call,) = (code for code in blocks(english, "bash") if "'Content-Type" in code)
    body = re.search(r"-d '(.+)'", call)[1]
    answer = requests.post(demo, data=body.encode()).json()
    assert answer | {"time": ""} == json.loads(told) | {"time": ""}


@pytest.mark.slow
def test_python_examples_run(demo, capsys):
    names: dict[str, object] = {}
    pages = TEXTS["README.md"], PAGES["docs/tools.md"], API
    for code in (code for page in pages for code in blocks(page, "python")):
        code = code.replace("http://127.0.0.1:6006", demo)
        if "get_completion" in code:
            code = re.sub(
                r"(get_completion\(.+?)\)(\)?)$", rf'\1, url="{demo}")\2', code, flags=re.M
            )
        exec(code, names)
    names["client"].close()
    said = capsys.readouterr().out
    assert "Rome" in said
    assert said.count("The capital of France is Paris.") == 2
    assert re.search(r'\{"city":', said)
    assert "22 degrees in Paris" in said


@pytest.mark.release
def test_langchain_example_works(server):
    ChatOpenAI = pytest.importorskip("langchain_openai").ChatOpenAI

    (setting,) = (s for s in SPAN.findall(PAGES["docs/recipes.md"]) if s.startswith("ChatOpenAI("))
    setting = setting.replace("http://127.0.0.1:6006", server).replace('"demo"', '"test"')
    assert eval(setting, {"ChatOpenAI": ChatOpenAI}).invoke("hi").content == "hello"


def test_laptop_commands_send_the_key(runner, tokenizer):
    (code,) = (code for code in blocks(TEXTS["README.md"], "bash") if "export CHAT_API_KEY" in code)
    (key,) = re.findall(r"export CHAT_API_KEY=(\S+)", code)
    assert f"CHAT_API_KEY={key} python api.py" in TEXTS["README.md"]
    (call,), (asked,) = re.findall(r"^curl .+", code, re.M), re.findall(r"request.py .+", code)
    with serve(lambda settings: chat_model(runner, tokenizer), api_key=key) as url:
        ready(url)
        call = call.replace("http://127.0.0.1:6006", url)
        for line in (f"{call} --silent", f"{sys.executable} {asked} --url {url}"):
            done = subprocess.run(
                ["bash", "-c", line],
                cwd=ROOT,
                env=os.environ | {"CHAT_API_KEY": key},
                capture_output=True,
                text=True,
                check=True,
            )
            said = done.stdout
            assert (json.loads(said)["response"] if "curl" in line else said.strip()) == "hello"
