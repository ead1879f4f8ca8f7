"""Flower's Ray runtime: the same labs, the same loop, the same weights."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.serverapp import Grid

from cytofed.console import RunProgress
from cytofed.errors import InputError
from cytofed.simulations import ray_backend
from cytofed.simulations.ray_backend import RayBackend, run_on_ray
from cytofed.simulations.simulate import Request, simulate

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray not installed: cytofed[ray]")


@needs_ray
def test_ray_gives_the_weights_of_the_inprocess_backend_and_prints_nothing(
    small: Callable[..., Request], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found: dict[str, dict[str, Any]] = {}
    for backend in ("inprocess", "ray"):
        request = small("simulation.labs=2", out=tmp_path / backend, backend=backend, jobs=1)
        found[backend] = simulate(request, RunProgress(quiet=True))
    printed = capfd.readouterr()
    ours, rays = found["inprocess"], found["ray"]
    assert rays["weights_sha256"] == ours["weights_sha256"]
    for key in ("status", "plan_sha256", "global", "labs", "participation"):
        assert rays[key] == ours[key]
    assert printed.out == ""
    assert printed.err == ""


def _never_asked(_message: Message, _context: Context) -> Message:
    raise AssertionError


@needs_ray
def test_what_the_round_loop_raises_arrives_unchanged() -> None:
    error = InputError("the cohort is too small", hint="enrol a lab")

    def main(_grid: Grid) -> None:
        raise error

    with pytest.raises(InputError) as caught:
        run_on_ray(_never_asked, 1, main, workers=1)
    assert caught.value is error


def test_without_ray_the_way_out_is_named(
    small: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_backend, "find_spec", lambda _: None)
    with pytest.raises(InputError) as caught:
        RayBackend(small(), tmp_path, RunProgress(quiet=True))
    assert caught.value.hint == 'pip install "cytofed[ray]"'
