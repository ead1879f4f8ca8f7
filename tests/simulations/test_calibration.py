"""The released model is at the temperature that labs found on images kept from training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from cytofed import models
from cytofed.client import training
from cytofed.metrics import summarise, tally
from cytofed.server.checkpoints import load_progress
from cytofed.simulations.simulate import Request
from cytofed.simulations.virtual import VirtualLabs

Small = Callable[..., Request]
KEPT = "evaluation.calibration=0.25"
LONGER = ("train.rounds=4", "train.steps_per_round=12", "train.lr=0.01")


class Simulate(Protocol):
    """The fixture ``directly``."""

    def __call__(self, request: Request, *, report: bool = False) -> dict[str, Any]: ...


def test_released_model_predicts_as_calibrated_as_the_summary_says(
    small: Small, directly: Simulate, tmp_path: Path
) -> None:
    summary = directly(small(KEPT, *LONGER))
    told = summary["global"]["calibration"]
    assert told["temperature"] > 0
    net, _ = models.load_model(tmp_path / "run" / "model.safetensors")
    labs = VirtualLabs.load(tmp_path / "run" / "checkpoints")
    test = labs.cells.take(np.flatnonzero(labs.side_N == 2))
    found = summarise(
        tally(training.predict(net, test, device="cpu"), test.targets_NC), labs.scheme
    )
    assert found["ece"] == pytest.approx(summary["global"]["ece"], abs=2e-3)
    assert found["macro_f1"] == summary["global"]["macro_f1"]


def test_a_temperature_changes_nothing_but_the_heads_scale(
    small: Small, directly: Simulate, tmp_path: Path
) -> None:
    request = small(KEPT, *LONGER)
    temperature = directly(request)["global"]["calibration"]["temperature"]
    folder = tmp_path / "run" / "checkpoints" / "federation"
    progress = load_progress(folder, plan_sha256=request.plan.sha256)
    assert progress is not None
    net, _ = models.load_model(tmp_path / "run" / "model.safetensors")
    manifest = models.manifest(net, "all")
    released_P, trained_P = models.flatten(net, manifest), progress.state["weights"]
    head_P = manifest.mask("head")
    assert temperature != 1
    assert (released_P[~head_P] == trained_P[~head_P]).all()
    moved_P = head_P & (trained_P != 0)  # rows of classes that nobody has are closed
    np.testing.assert_allclose(released_P[moved_P], trained_P[moved_P] / temperature, rtol=1e-6)


def test_a_run_that_is_resumed_after_its_last_round_has_the_same_temperature(
    small: Small, directly: Simulate, tmp_path: Path
) -> None:
    before = directly(small(KEPT, *LONGER))
    (tmp_path / "run" / "summary.json").unlink()
    after: dict[str, Any] = directly(small(KEPT, *LONGER, resume=True))
    assert after["weights_sha256"] == before["weights_sha256"]
    assert after["global"] == before["global"]
