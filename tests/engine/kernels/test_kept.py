"""What measuring found, kept from one start to the next."""

import errno
from unittest.mock import Mock

import pytest
import torch

from engine.kernels.kept import kept


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    place = tmp_path / "chat-api"
    monkeypatch.setattr("engine.kernels.kept.cache_folder", lambda: place)
    monkeypatch.setattr("engine.kernels.kept.outcome", lambda: "no kernels")
    return place


class Machine:
    """Counts how often it is measured."""

    def __init__(self) -> None:
        self.times = 0

    def measure(self) -> dict[str, float]:
        self.times += 1
        return {"1": float(self.times)}


def test_measured_once_for_what_it_depends_on():
    machine = Machine()
    assert kept("steps", ("a", 1), machine.measure) == {"1": 1.0}
    assert kept("steps", ("a", 1), machine.measure) == {"1": 1.0}
    assert kept("steps", ("a", 2), machine.measure) == {"1": 2.0}
    assert kept("forms", ("a", 1), machine.measure) == {"1": 3.0}


def test_other_threads_are_measured_apart():
    machine, before = Machine(), torch.get_num_threads()
    kept("steps", (), machine.measure)
    try:
        torch.set_num_threads(before + 1)
        assert kept("steps", (), machine.measure) == {"1": 2.0}
    finally:
        torch.set_num_threads(before)


def test_measured_anew_if_asked_and_kept_again():
    machine = Machine()
    kept("steps", (), machine.measure)
    assert kept("steps", (), machine.measure, anew=True) == {"1": 2.0}
    assert kept("steps", (), machine.measure) == {"1": 2.0}


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_broken_file_is_measured_again(folder, content):
    machine = Machine()
    kept("steps", (), machine.measure)
    (file,) = folder.iterdir()
    file.write_bytes(content)
    assert kept("steps", (), machine.measure) == {"1": 2.0}
    assert kept("steps", (), machine.measure) == {"1": 2.0}


def test_file_that_others_may_write_is_not_read(folder):
    machine = Machine()
    kept("steps", (), machine.measure)
    folder.chmod(0o777)
    assert kept("steps", (), machine.measure) == {"1": 2.0}


def test_without_a_place_it_is_measured_each_time(folder):
    folder.write_text("no folder")
    machine = Machine()
    kept("steps", (), machine.measure)
    assert kept("steps", (), machine.measure) == {"1": 2.0}


def test_nothing_found_is_not_kept(folder):
    assert kept("forms", (), dict) == {}
    assert not folder.exists()


def test_full_disk_is_no_reason_not_to_start(folder, monkeypatch):
    """Whether a file cannot be made there, or not be written to its end."""
    full = OSError(errno.ENOSPC, "No space left on device")
    machine = Machine()
    for name in ("tempfile.mkdtemp", "pathlib.Path.write_text"):
        with monkeypatch.context() as patched:
            patched.setattr(name, Mock(side_effect=full))
            assert kept("steps", name, machine.measure)
    assert [*folder.iterdir()] == []


def test_file_is_for_its_user_alone(folder):
    kept("steps", (), Machine().measure)
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
