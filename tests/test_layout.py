"""Where a line may stand: what imports what, and how long a file and a function may become."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from itertools import pairwise
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Outside the engine, whose rooms have theirs in pyproject.toml: each imports only from those before
# it. A new module is given its place here.
ORDER = [
    "hubs.errors",
    "hubs.environment",
    "hubs.clients",
    "hubs.reference",
    "hubs.layouts",
    "hubs.contents",
    "hubs.repository",
    "hubs.demo",
    "hubs",
    "model_download",
    "chat_page.markdown",
    "chat_page.renderer",
    "chat_page.dashboard",
    "chat_page",
    "serving",
    "serving.body_limits",
    "serving.request_parser",
    "serving.origins",
    "serving.command_line",
    "serving.settings",
    "serving.connection_limits",
    "serving.connection",
    "serving.standard_streams",
    "serving.log_queue",
    "serving.workers",
    "serving.unknown_fields",
    "serving.dialects",
    "serving.reasoning",
    "serving.parts",
    "serving.live",
    "serving.counters",
    "serving.fields",
    "serving.tool_fields",
    "serving.inner_request",
    "serving.kept",
    "serving.request_model",
    "serving.lenient",
    "serving.classic",
    "serving.conversation",
    "serving.openai_shared",
    "serving.thought_code",
    "serving.message_blocks",
    "serving.messages",
    "serving.messages_reply",
    "serving.responses_tools",
    "serving.responses_items",
    "serving.responses",
    "serving.responses_reply",
    "serving.chat",
    "serving.completions",
    "serving.tokens",
    "api",
    "deploy.cluster",
    "client_settings",
    "request",
    "bundle",
]
HTTP = {"aiohttp", "fastapi", "httpx", "pydantic", "requests", "starlette", "uvicorn"}
TENSORS = {"accelerate", "safetensors", "tokenizers", "torch", "transformers"}
CEILING = 320
CEILINGS = {"api": 1500}
# A table of routes is as long as its rows; a kernel is not divided without being measured again.
LONG = {"build_app", "_latent_kernel"}
BANNER = re.compile(r"# ---- (.+?) -+$")


def name_of(path: Path) -> str:
    """As an import statement spells it."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def program_files() -> list[Path]:
    folders = (ROOT / name for name in ("engine", "hubs", "serving", "chat_page", "deploy"))
    inner = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return [*sorted(ROOT.glob("*.py")), *inner]


SOURCES = {name_of(path): path.read_text(encoding="utf-8") for path in program_files()}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
ENGINE = [name for name in SOURCES if name.split(".")[0] == "engine"]
OUTSIDE = [name for name in SOURCES if name not in ENGINE]


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def statements(tree: ast.AST, into_functions: bool = True) -> Iterator[ast.AST]:
    """All nodes that run; those inside functions only where they are asked for."""
    for node in ast.iter_child_nodes(tree):
        if is_for_types_only(node):
            continue
        yield node
        if into_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from statements(node, into_functions)


def imported(name: str, into_functions: bool = True) -> set[str]:
    """The modules that a module imports; of `from a import b` also `a.b` where that is a module."""
    found = set()
    for node in statements(TREES[name], into_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports by a relative name"
            assert node.module
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & SOURCES.keys()
            found |= inner or {node.module}
    return found


def packages(name: str, into_functions: bool = True) -> set[str]:
    return {module.split(".")[0] for module in imported(name, into_functions)}


# ---- What imports what


def test_every_module_has_its_place_in_the_order():
    assert [name for name in OUTSIDE if name not in ORDER] == []


@pytest.mark.parametrize("name", OUTSIDE)
def test_imports_go_downward(name):
    below = ORDER[: ORDER.index(name)]
    ours = imported(name) & SOURCES.keys()
    assert [other for other in ours if other not in below and not other.startswith("engine")] == []


def test_rooms_of_the_engine_import_downward():
    done = subprocess.run(["lint-imports"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_imports_are_acyclic():
    """Of those for types alone nothing is asked: they are never run."""
    done: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join([*path, name])
        if name not in done:
            for other in sorted(imported(name) & SOURCES.keys()):
                visit(other, (*path, name))
            done.append(name)

    for name in SOURCES:
        visit(name, ())


@pytest.mark.parametrize("name", OUTSIDE)
def test_only_the_face_of_the_engine_is_imported_from_outside(name):
    assert [other for other in imported(name) if other.startswith("engine.")] == []


@pytest.mark.parametrize("name", ENGINE)
def test_the_engine_knows_nothing_of_http(name):
    assert packages(name) & HTTP == set()


def test_what_speaks_http_knows_nothing_of_tensors():
    assert "fastapi" in packages("api")
    assert "torch" in packages("engine.attention.groups")
    for name in ("api", "chat_page", "model_download", "hubs.demo"):
        assert packages(name) & TENSORS == set(), name


@pytest.mark.parametrize("name", ["engine", "api", "model_download"])
def test_an_import_loads_no_torch(name):
    """So that flags, folders and /health are answered before a model can be."""
    code = f"import sys, {name}; print(sorted({{'torch', 'transformers'}} & sys.modules.keys()))"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout == "[]\n"


def test_what_is_imported_is_required_by_its_name():
    """It may else be gone, or another version, when what brought it changes."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    required = {name.lower().replace("_", "-") for name in re.findall(r"^[\w-]+", text, re.M)}
    # What comes with torch for a card; and what --quantize 4bit asks for by itself.
    optional = {"triton", "bitsandbytes"}
    own = {name.split(".")[0] for name in SOURCES}
    known = sys.stdlib_module_names | own | optional
    programs = [name for name in SOURCES if name != "deploy.cluster"]
    found = {package for name in programs for package in packages(name)} - known
    brought_by = packages_distributions()
    without = {
        package
        for package in found
        if required.isdisjoint(d.lower().replace("_", "-") for d in brought_by[package])
    }
    assert not without


# ---- How long things may become


@pytest.mark.parametrize("name", SOURCES)
def test_no_module_is_longer_than_its_ceiling(name):
    """If this pinches, a module is missing: name it."""
    assert len(SOURCES[name].splitlines()) <= CEILINGS.get(name, CEILING)


def test_no_file_of_the_kernels_is_longer():
    files = sorted((ROOT / "engine" / "kernels" / "cpp").iterdir())
    assert [x.name for x in files if len(x.read_text("utf-8").splitlines()) > CEILING] == []
    assert "cpu.cpp" in {x.name for x in files}


def functions() -> Iterator[tuple[str, int]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno
                yield f"{name}.{node.name}", node.end_lineno - node.lineno + 1


def test_functions_are_short():
    lengths = sorted(length for _, length in functions())
    assert lengths[len(lengths) // 2] <= 8
    longer = [name for name, length in functions() if length > 40]
    assert [name for name in longer if name.split(".")[-1] not in LONG] == []


# ---- How a file reads


def test_no_module_is_a_drawer_for_everything():
    folders = (ROOT / "tests", ROOT / "benchmarks")
    files = [*program_files(), *(path for folder in folders for path in folder.rglob("*.py"))]
    names = {path.stem for path in files}
    assert "test_layout" in names
    assert names & {"common", "core", "helper", "helpers", "misc", "util", "utils"} == set()


@pytest.mark.parametrize("name", [*ENGINE, "api", "chat_page"])
def test_nothing_is_printed(name):
    calls = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if ast.unparse(call.func) == "print"] == []


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_left_to_do(name):
    assert re.findall(r"\bTODO\b|\bFIXME\b|\bXXX\b", SOURCES[name]) == []


# ---- api.py, in sections


def sections() -> dict[str, range]:
    """Each section's name and its line numbers, in order."""
    lines = SOURCES["api"].splitlines()
    starts = [(n, m[1]) for n, line in enumerate(lines, 1) if (m := BANNER.match(line))]
    ends = [*starts[1:], (len(lines) + 1, "")]
    return {name: range(n, end) for (n, name), (end, _) in zip(starts, ends, strict=True)}


def section_of(line: int) -> str:
    return next((name for name, lines in sections().items() if line in lines), "")


def defined() -> dict[str, int]:
    """Every name that the top level of api.py defines, and on which line."""
    found = {}
    for node in TREES["api"].body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = node.lineno
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        found.setdefault(name.id, node.lineno)
    return found


def test_no_section_of_api_uses_a_name_from_a_later_one():
    order = ["", *sections()]
    assert len(order) > 5
    where = {name: section_of(line) for name, line in defined().items()}
    early = [
        f"line {node.lineno}: {node.id} belongs to {where[node.id]}"
        for node in ast.walk(TREES["api"])
        if isinstance(node, ast.Name)
        and node.id in where
        and section_of(node.lineno)
        and order.index(where[node.id]) > order.index(section_of(node.lineno))
    ]
    assert early == []


def test_banners_of_api_are_all_of_one_shape():
    banners = [line for line in SOURCES["api"].splitlines() if line.startswith("# ----")]
    assert {len(line) for line in banners} == {79}
    assert all(a.stop == b.start for a, b in pairwise(sections().values()))
