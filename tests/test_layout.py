"""api.py reads downward, keeps its seam, and stays short: facts, not wishes."""

import ast
import re
from itertools import pairwise

from conftest import ROOT

SOURCE = (ROOT / "api.py").read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
ENGINE = ("Sequences", "Attention", "Runner", "Sampling", "Engine")
BANNER = re.compile(r"# ---- (.+?) -+$")


def sections() -> dict[str, range]:
    """Each section's name and its line numbers, in order."""
    starts = [(n, m[1]) for n, line in enumerate(LINES, 1) if (m := BANNER.match(line))]
    ends = [*starts[1:], (len(LINES) + 1, "")]
    return {name: range(n, end) for (n, name), (end, _) in zip(starts, ends, strict=True)}


def section_of(line: int) -> str:
    return next((name for name, lines in sections().items() if line in lines), "")


def defined() -> dict[str, int]:
    """Every name that the module's top level defines, and on which line."""
    found = {}
    for node in TREE.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = node.lineno
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        found.setdefault(name.id, node.lineno)
    return found


def used() -> list[ast.Name]:
    return [node for node in ast.walk(TREE) if isinstance(node, ast.Name)]


def imported_from(*packages: str) -> set[str]:
    """The names that the imports bring in from these packages."""
    names = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in packages:
            names |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {a.asname or a.name for a in node.names if a.name.split(".")[0] in packages}
    return names


def test_no_section_uses_a_name_from_a_later_one():
    order, where = list(sections()), defined()
    early = [
        f"line {name.lineno}: {name.id} belongs to {section_of(where[name.id])}"
        for name in used()
        if name.id in where
        and section_of(name.lineno)
        and section_of(where[name.id])
        and order.index(section_of(where[name.id])) > order.index(section_of(name.lineno))
    ]
    assert not early


def test_the_tensors_know_nothing_of_http_and_http_nothing_of_tensors():
    http = imported_from("fastapi", "starlette", "uvicorn", "pydantic")
    tensors = imported_from("torch", "transformers", "tokenizers")
    assert "FastAPI" in http
    assert "torch" in tensors
    forbidden = {
        **dict.fromkeys(("Model families", "Text", *ENGINE, "Model"), http),
        **dict.fromkeys(
            ("Errors", "Settings", "Schemas", "Replies", "Metrics", "Chat page", "Routes", "Main"),
            tensors,
        ),
    }
    assert set(sections()) == set(forbidden)
    wrong = [
        f"line {name.lineno}: {name.id}"
        for name in used()
        if name.id in forbidden.get(section_of(name.lineno), ())
    ]
    assert not wrong


def test_the_file_keeps_its_budget():
    assert len(LINES) <= 3965
    assert sum(len(sections()[name]) for name in ENGINE) <= 1290


def test_functions_are_short():
    functions = [
        (node.end_lineno - node.lineno + 1, node.name)
        for node in ast.walk(TREE)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = sorted(length for length, _ in functions)
    assert lengths[len(lengths) // 2] <= 8
    # A table of routes, which is as long as it has rows.
    assert [name for length, name in functions if length > 40 and name != "build_app"] == []


def test_banners_are_all_of_one_shape():
    banners = [line for line in LINES if line.startswith("# ----")]
    assert {len(line) for line in banners} == {79}
    assert all(a.stop == b.start for a, b in pairwise(sections().values()))


def test_nothing_is_printed_and_nothing_left_to_do():
    assert not re.search(r"\bTODO\b|\bFIXME\b|^\s*print\(", SOURCE, re.MULTILINE)
