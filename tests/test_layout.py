"""The layout: packages, layers and what a process may not import."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cytofed.files import write_atomically

REPO = Path(__file__).resolve().parent.parent
ROOMS = ("server", "client", "strategies", "privacy", "simulations")
SETTINGS = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, **environment},
    )
    return done.stdout.strip()


def test_packages_of_pyproject_are_the_folders_on_disk() -> None:
    found = {"cytofed"}
    for name, folder in SETTINGS["package-dir"].items():
        root = REPO / folder
        for init in root.rglob("__init__.py"):
            inner = init.parent.relative_to(root).parts
            if name != "cytofed" or not (inner and (root / inner[0]).is_symlink()):
                found.add(".".join([name, *inner]))
    assert set(SETTINGS["packages"]) == found


def test_every_folder_with_python_files_is_a_package() -> None:
    for room in ROOMS:
        for file in (REPO / room).rglob("*.py"):
            assert (file.parent / "__init__.py").is_file(), file


def test_rooms_are_seen_by_type_checkers_through_relative_links() -> None:
    for room in ROOMS:
        link = REPO / "src" / "cytofed" / room
        assert link.is_symlink()
        assert os.readlink(link) == f"../../{room}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_importable_under_one_name_only(room: str) -> None:
    assert python(f"import cytofed.{room} as room; print(room.__name__)") == f"cytofed.{room}"
    code = f"import importlib.util as u; s = u.find_spec({room!r}); print(s.origin if s else None)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    assert not done.stdout.startswith(str(REPO)), "no top-level package of this name"


def test_coordinator_never_imports_torch() -> None:
    modules = (
        "cytofed.server.rounds, cytofed.server.checkpoints, cytofed.server.aggregate, "
        "cytofed.strategies, cytofed.plan_check, cytofed.simulations.simulate, "
        "cytofed.simulations.inprocess, cytofed.client.app, cytofed.cli"
    )
    heavy = (
        "[m for m in ('torch', 'torchvision', 'opacus', 'ray', 'matplotlib') if m in sys.modules]"
    )
    assert python(f"import sys, {modules}; print({heavy})") == "[]"


def test_help_needs_neither_flower_nor_numpy() -> None:
    code = "import sys, cytofed.cli; print([m for m in ('flwr', 'numpy') if m in sys.modules])"
    assert python(code) == "[]"


@pytest.mark.parametrize("first", ["cytofed.cli", "cytofed.messages", "cytofed.simulations"])
def test_telemetry_is_off_before_flower_or_ray_is_imported(first: str) -> None:
    names = ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "RAY_USAGE_STATS_ENABLED")
    code = f"""
import os, sys
seen = []
class Watcher:
    def find_spec(self, name, path=None, target=None):
        if name in ("flwr", "ray"):
            seen.append([os.environ.get(n) for n in {names!r}])
sys.meta_path.insert(0, Watcher())
import {first}
import flwr.app
import flwr.supercore.telemetry as telemetry
print(seen[0], telemetry.FLWR_TELEMETRY_ENABLED)
"""
    switched_on = dict.fromkeys(names, "1") | {"FLWR_DISABLE_UPDATE_CHECK": "0"}
    assert python(code, **switched_on) == "['0', '1', '0'] 0"


def test_waiting_threads_do_not_spin_unless_the_user_wants_it() -> None:
    code = "import os, cytofed; print(os.environ['OMP_WAIT_POLICY'])"
    assert python(code, OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "PASSIVE"


def test_file_is_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f"
    write_atomically(file, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, "new" * 1000)
    monkeypatch.undo()
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    write_atomically(file, b"new", mode=0o600)
    assert file.read_text() == "new"
    assert file.stat().st_mode & 0o777 == 0o600
