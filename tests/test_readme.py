"""The two READMEs say the same, and nothing that the program does not do."""

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import requests
from conftest import ROOT, serve, wait_for

import api
import model_download

NAMES = ("README.md", "README.zh.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
# The programs of others that the README starts, and their flags in it.
FOREIGN = {
    *("--factory", "--port"),  # uvicorn
    *("--index-url", "--system-site-packages"),  # pip, venv
    *("--continuous-batching", "--data-binary"),  # transformers serve, curl
}

each = pytest.mark.parametrize("text", TEXTS.values(), ids=NAMES)


def rows_under(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table with this first column."""
    lines = text.splitlines()
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
                links=[link for link in links if not link.startswith(("#", "README"))],
            )
        )
    return found


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


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


def test_both_have_the_same_code():
    english, chinese = (blocks(text) for text in TEXTS.values())
    assert len(english) > 10
    for ours, theirs in zip(english, chinese, strict=True):
        assert ours == theirs


def test_both_have_the_same_sections_tables_and_names():
    english, chinese = (sections(text) for text in TEXTS.values())
    assert len(english) > 10
    for ours, theirs in zip(english, chinese, strict=True):
        assert ours == theirs


def test_the_figures_of_the_benchmark_are_the_same():
    def figures(text: str) -> list[str]:
        return [line for line in text.splitlines() if re.search(r"\| \d+(\.\d+)? s \|", line)]

    def numbers(lines: list[str]) -> list[list[str]]:
        return [re.findall(r"[\d.]+ ?s?\b", line) for line in lines]

    english, chinese = (figures(text) for text in TEXTS.values())
    assert len(english) >= 6
    assert numbers(english) == numbers(chinese)


@each
def test_its_links_lead_somewhere(text):
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    for link in links:
        assert link[1:] in anchors(text) if link.startswith("#") else (ROOT / link).is_file(), link


# ---- The program


def flags_of(file: str) -> set[str]:
    if file == "api.py":
        names = {f"--{name.replace('_', '-')}" for name in api.Settings.model_fields}
        switches = [name for name, f in api.Settings.model_fields.items() if f.annotation is bool]
        return names | {f"--no-{name.replace('_', '-')}" for name in switches} | {"--help"}
    source = (ROOT / file).read_text(encoding="utf-8")
    return set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', source)) | {"--help"}


OURS = ("api.py", "model_download.py", "request.py", "tests/benchmark.py", "tests/soak.py")


@each
def test_every_flag_exists(text):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    assert len(named) > 15
    assert named <= FOREIGN.union(*map(flags_of, OURS))


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Each `python FILE …` and what follows it, up to the next command."""
    for code in [*blocks(text, "bash", "powershell"), *SPAN.findall(prose(text))]:
        yield from re.findall(r"\bpython (\S+\.py)([^&\n]*)", code)


@each
def test_every_program_exists_and_takes_its_flags(text):
    started = list(commands(text))
    assert {"api.py", "model_download.py", "request.py"} <= {file for file, _ in started}
    for file, rest in started:
        assert (ROOT / file).is_file(), file
        assert set(re.findall(r"--[a-z-]+", rest)) <= flags_of(file), (file, rest)
    for path in re.findall(r"\btests/\w+\.(?:py|txt)|\.ci/\w+", text):
        assert (ROOT / path).is_file(), path


@each
def test_every_variable_exists(text):
    fields = {f"CHAT_{name.upper()}" for name in api.Settings.model_fields}
    assert set(re.findall(r"\bCHAT_[A-Z_]+\b", text)) - fields == {"CHAT_TEST_DATA"}


@each
def test_the_setup_commands_are_there(text):
    assert "pip install -r requirements.txt && python api.py\n" in blocks(text, "bash")
    assert "pip install -r tests/requirements.txt && python -m pytest\n" in blocks(text, "bash")


def statuses(kind: type[api.ChatError]) -> set[int]:
    return {kind.status}.union(*map(statuses, kind.__subclasses__()))


@table("status", "状态码")
def test_the_table_of_statuses_is_what_may_be_sent(rows):
    told = {int(code) for row in rows for code in row[0].split(", ")}
    # FastAPI's refusal of a method is the one that has no class of ours.
    assert told == statuses(api.ChatError) | {405}


@table("field", "字段")
def test_the_table_of_fields_is_what_the_call_takes(rows):
    told = {field for row in rows for field in SPAN.findall(row[0])}
    taken = {"max_length" if f == "max_new_tokens" else f for f in api.ChatRequest.model_fields}
    assert told == taken
    (lengths,) = (set(SPAN.findall(row[1])) for row in rows if row[0] == "`max_length`")
    assert lengths | {"max_length"} == set(api.LENGTH_NAMES)
    defaults = {SPAN.findall(row[0])[0]: re.findall(r"[\d.]+$", row[2]) for row in rows}
    assert defaults["max_length"] == [str(api.Sampling().max_new_tokens)]
    assert defaults["temperature"] == [str(api.Sampling().temperature)]
    assert defaults["repetition_penalty"] == [str(api.Sampling().repetition_penalty)]


@table("name", "名称")
def test_the_table_of_models_is_what_can_be_fetched(rows):
    hubs = {"ModelScope": "modelscope", "Hugging Face": "huggingface"}
    told = {}
    for row in rows:
        named = [hubs[hub] for hub in re.split(", |、", row[-1]) if hub in hubs]
        told[row[0].strip("`")] = (row[2], named)
    known = {name: (m.size, list(m.repos)) for name, m in model_download.KNOWN.items()}
    assert told == known


@each
def test_what_it_says_is_refused_is_refused(text, server):
    start = re.search("`n`(, |、)`logprobs`", text).start()
    names = SPAN.findall(text[start : text.index("\n\n", start)])
    assert len(names) >= 5
    for name in names:
        answer = requests.post(server, json={"prompt": "x", name: 2})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


@each
def test_every_metric_exists(text, server):
    told = set(re.findall(r"\bchat_[a-z0-9_]+\b", text))
    assert len(told) >= 10
    known = set(re.findall(r"^# TYPE (\w+)", requests.get(f"{server}/metrics").text, re.M))
    assert told <= known
    assert {name for name in known if not name.endswith("_created")} <= told


@table("what you see", "现象")
def test_what_goes_wrong_is_said_in_these_words(rows):
    said = literals("api.py", "model_download.py", "request.py")
    # uvicorn's, by way of the operating system.
    quoted = {word for row in rows for word in SPAN.findall(row[0])}
    quoted -= {"address already in use", "ssh"}
    assert len(quoted) >= 8
    assert not [words for words in quoted if words not in said]


@each
def test_the_expected_error_is_the_real_one(text, server):
    (told,) = (code for code in blocks(text, "json") if '"error"' in code)
    answer = requests.post(server, json={"prompt": "x", "temperature": 3})
    time = re.compile(r'"time":"[^"]+"')
    assert time.sub("", answer.text) == time.sub("", told.strip())


# ---- Its examples


@pytest.fixture(scope="module")
def demo(demo_folder):
    with serve(api.load_chat_model, model=str(demo_folder)) as url:
        wait_for(lambda: requests.get(f"{url}/health").ok, seconds=180)
        yield url


def test_the_first_call_is_answered_as_expected(demo):
    english = TEXTS["README.md"]
    (told,) = (code for code in blocks(english, "json") if '"response"' in code)
    (call,) = (code for code in blocks(english, "bash") if "'Content-Type" in code)
    body = re.search(r"-d '(.+)'", call)[1]
    answer = requests.post(demo, data=body.encode())
    time = re.compile(r'"time":"[^"]+"')
    assert time.sub("", answer.text) == time.sub("", told.strip())


def test_the_python_examples_run(demo, capsys):
    names: dict[str, object] = {}
    for code in blocks(TEXTS["README.md"], "python"):
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


def test_the_langchain_setting_works(server, runner):
    from langchain_openai import ChatOpenAI

    (setting,) = (s for s in SPAN.findall(TEXTS["README.md"]) if s.startswith("ChatOpenAI("))
    setting = setting.replace("http://127.0.0.1:6006", server).replace('"demo"', '"test"')
    assert eval(setting, {"ChatOpenAI": ChatOpenAI}).invoke("hi").content == "hello"
