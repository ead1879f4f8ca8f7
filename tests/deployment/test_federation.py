"""Real processes, real TLS: from an empty folder to the finished model at the labs."""

from __future__ import annotations

import hashlib
import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cytofed.model_file import read_model
from cytofed.plan import load_plan
from cytofed.start import START_FILE, write_start

from .conftest import PATIENCE_S, PLAN, PRIVATE, Federation, deal, free_port


def simulated_weights(federation: Federation, out: Path) -> str:
    """The weights of the same plan over the same folders, one virtual lab each."""
    data = [flag for lab in federation.labs for flag in ("--data", str(federation.data(lab)))]
    command = ["simulate", str(federation.root / "plan.yaml"), *data, "--partition", "sources"]
    done = subprocess.run(
        [sys.executable, "-m", "cytofed.cli", *command, "--out", str(out), "--json"],
        env=federation.environment("simulation"),
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    )
    return str(json.loads(done.stdout)["weights_sha256"])


def secrets_of(keys: list[Path]) -> list[bytes]:
    """What of each key file would give the key away: lines of a PEM, the last bytes of others."""
    found = []
    for file in keys:
        data = file.read_bytes()
        lines = data.splitlines()[1:-1] if data.startswith(b"-----") else [data[-32:]]
        found += [line for line in lines if len(line) >= 32]
    return found


def found_outside(root: Path, secrets: list[bytes], where: tuple[str, ...]) -> list[Path]:
    """Files below ``root``, but for those ``where`` they belong, that hold one of the secrets."""
    assert secrets
    home = {path for pattern in where for path in root.glob(pattern)}
    files = [path for path in root.rglob("*") if path.is_file()]
    others = [path for path in files if not home & {path, *path.parents}]
    assert others
    return [path for path in others if any(secret in path.read_bytes() for secret in secrets)]


def others_may_read(path: Path) -> bool:
    return bool(stat.S_IMODE(path.stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO))


def test_run_completes_and_every_lab_gets_the_model_that_a_simulation_gives(
    federation: Federation, tmp_path: Path
) -> None:
    for lab in federation.labs:
        federation.start(lab)
    # Two vectors a round: what a strategy sends besides the weights must be let out and averaged.
    shared = PLAN.replace("batch: 8}", "batch: 8, optimizer: sgd}\nstrategy: {name: fednag}")
    run, plan_sha256 = federation.queue(shared)
    federation.approve(plan_sha256)
    summary = federation.summary(run)

    assert summary["status"] == "completed"
    assert [r["received"] for r in summary["participation"]] == [list(federation.labs)] * 2
    assert set(summary["labs"]) == set(federation.labs)
    assert summary["weights_sha256"] == simulated_weights(federation, tmp_path / "simulated")

    pid = federation.running["coordinator"].pid
    assert "torch" not in Path(f"/proc/{pid}/maps").read_text()

    model = (federation.coordinator / "runs" / run / "model.safetensors").read_bytes()
    for lab in federation.labs:
        federation.wait_for_model(lab)
        out = tmp_path / f"{lab}.safetensors"
        federation.run(lab, "client", "model", federation.root / lab, "--out", out)
        assert out.read_bytes() == model
        federation.kill(lab, 15)
        federation.run(lab, "client", "egress", federation.root / lab, "--verify")

    assert (federation.coordinator / "runs" / run / "report.html").is_file()
    assert not others_may_read(federation.coordinator / "runs" / run)
    for owner in ("coordinator", *federation.labs):
        keys = list((federation.root / owner).glob("*.key"))
        assert keys
        assert not any(map(others_may_read, keys))
        assert not found_outside(federation.root / owner, secrets_of(keys), ("*.key",))
    weights = read_model(federation.coordinator / "runs" / run / "model.safetensors")[0]
    pieces = [array.tobytes()[:64] for array in weights.values() if array.any() and array.size > 15]
    assert not found_outside(federation.coordinator, pieces, (f"runs/{run}/*",))
    for lab in federation.labs:
        assert not found_outside(federation.root / lab, pieces, ("models/*", "runs/*/start*"))


@pytest.mark.faults  # with the other long runs of processes
@pytest.mark.timeout(1800)
def test_a_run_from_a_file_gives_the_weights_that_a_simulation_from_it_gives(
    federation: Federation, tmp_path: Path
) -> None:
    write_start(load_plan("demo", ["model.width=8"]), tmp_path)
    start = tmp_path / START_FILE
    model = f"model: {{arch: encoder+head, trainable: head, start: {start}}}"
    for lab in federation.labs:
        federation.start(lab)
    run, plan_sha256 = federation.queue(PLAN.replace("model: {width: 8}", model))
    federation.approve(plan_sha256)
    sha256 = hashlib.sha256(start.read_bytes()).hexdigest()
    shown = federation.run("lab-1", "client", "plans", federation.root / "lab-1")
    assert f"cytonet:8:sha256:{sha256}" in shown
    summary = federation.summary(run)

    assert summary["status"] == "completed"
    assert summary["weights_sha256"] == simulated_weights(federation, tmp_path / "simulated")
    for lab in federation.labs:
        [kept] = (federation.root / lab / "runs").glob("*/given.safetensors")
        assert kept.read_bytes() == start.read_bytes()
        assert not others_may_read(kept)


@pytest.mark.faults  # with the other long runs of processes
@pytest.mark.timeout(1800)
def test_patient_privacy_and_secure_aggregation_run_together(tmp_path: Path, sample: Path) -> None:
    labs = ("lab-1", "lab-2", "lab-3")
    deal(sample, tmp_path, labs)
    federation = Federation(tmp_path, (), free_port())
    try:
        federation.found()
        for lab in labs:
            federation.join(lab, "--patients", "name:_0*([0-9])", "--patients-declared",
                            "20")  # fmt: skip
            federation.start(lab)
        federation.labs = labs
        run, plan_sha256 = federation.queue(PRIVATE)
        federation.approve(plan_sha256)
        summary = federation.summary(run)
        assert summary["status"] == "completed"
        assert summary["labs"] is None
        assert summary["wire"]["secure_aggregation"]
        for lab in labs:
            federation.wait_for_model(lab)
            spent = json.loads(
                federation.run(lab, "client", "budget", federation.root / lab, "--json")
            )
            assert spent["spent"]["epsilon"] == summary["privacy"]["total"]["epsilon"]
            assert spent["held"]["epsilon"] == 0
            federation.kill(lab, 15)
            federation.run(lab, "client", "egress", federation.root / lab, "--verify")
    finally:
        federation.kill_all()
