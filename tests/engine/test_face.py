"""What the package shows of itself can be used alone."""

import subprocess
import sys
import textwrap

import pytest

import engine
from tests.conftest import ROOT


def shown() -> str:
    """The program in the package's docstring."""
    assert engine.__doc__
    _, program, *_ = engine.__doc__.split("\n\n    ", 1)
    program = "    " + program.rpartition("\n\nIn a notebook")[0]
    return textwrap.dedent(program)


@pytest.mark.slow
def test_the_program_in_the_docstring_streams_an_answer(demo_folder):
    done = subprocess.run(
        [sys.executable, "-c", shown()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_the_face_is_all_that_is_listed():
    assert set(engine.__all__) <= {*dir(engine), "load"}
    assert callable(engine.load)
