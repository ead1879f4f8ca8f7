"""``cytofed audit`` on runs as they are, and on summaries that claim what is not so."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
from rich.console import Console

from cytofed.errors import InputError, VerificationError
from cytofed.privacy import audit as one_run
from cytofed.privacy.accounting import epsilon_for
from cytofed.privacy.gradients import PatientOptimizer
from cytofed.simulations import audit as examination
from cytofed.simulations import planted
from cytofed.simulations.audit import audit, refuse_violation, render_audit
from cytofed.simulations.audit_report import PRIVATE_PAGE, without_pictures
from cytofed.simulations.report import write_report
from cytofed.simulations.simulate import Request

Small = Callable[..., Request]
PRIVATE = ("privacy.unit=patient", "simulation.pseudo_patient_cells=4", "simulation.labs=2")


class Simulate(Protocol):
    def __call__(self, request: Request, *, report: bool = False) -> dict[str, Any]: ...


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer canaries, and a report only where a test looks at it: it takes most of the time."""
    monkeypatch.setattr(one_run, "CANARIES", 400)
    monkeypatch.setattr(examination, "_CALIBRATION", 20)
    monkeypatch.setattr(examination, "write_report", lambda _: None)
    monkeypatch.setattr(examination, "REHEARSAL", ())
    rehearsed = examination.Finding("rehearsal", "", "not here: see test_planted", "PASS")
    monkeypatch.setattr(examination, "_rehearsal", lambda *_: rehearsed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module's one run is kept."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def private_run(small: Small, directly: Simulate, finished: Path, tmp_path: Path) -> Path:
    if not finished.exists():
        directly(small(*PRIVATE, "train.rounds=2", out=finished))
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def edit(run_dir: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = run_dir / "summary.json"
    summary = json.loads(path.read_text())
    change(summary)
    path.write_text(json.dumps(summary))


def lines(found: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    render_audit(found, console, run_dir=Path("run"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_an_honest_run_passes_and_says_no_more_than_that(private_run: Path) -> None:
    found = audit(private_run)
    refuse_violation(found)
    assert found["violations"] == 0
    assert {f["verdict"] for f in found["checks"]} == {"PASS"}
    assert json.loads((private_run / "audit.json").read_text()) == found
    text = lines(found)
    assert "[pseudo-patient, add-or-remove] | audited lower bound" in text
    assert "assumes a Gaussian mechanism" in text
    assert "PASS: no violation found" in text
    assert "private" not in text.replace("the private path", "")
    report = write_report(private_run).read_text()
    assert "No violation found. That is not a proof of privacy" in report
    assert found["per"] == "pseudo-patient"
    assert "per pseudo-patient" in found["claim"]
    assert "per patient" not in report + json.dumps(found) + text


def test_a_claim_that_was_reset_each_round_is_a_violation(private_run: Path) -> None:
    def one_round_only(summary: dict[str, Any]) -> None:
        privacy = summary["privacy"]
        privacy["epsilon"] = epsilon_for(privacy["sigma"], privacy["delta"], 0.25, 2)

    edit(private_run, one_round_only)
    found = audit(private_run)
    assert "composition: training, all rounds" in violated(found)
    with pytest.raises(VerificationError) as caught:
        refuse_violation(found)
    assert caught.value.exit_code == 5
    assert "do not rely on this run" in write_report(private_run).read_text()


def test_a_lab_whose_ledger_forgot_a_round_is_named(private_run: Path) -> None:
    edit(private_run, lambda s: s["privacy"]["labs"]["lab-2"].update(epsilon=1.0))
    assert violated(audit(private_run)) == ["composition: lab-2, 2 rounds"]


def test_exact_scores_of_a_private_deployment_are_a_violation(private_run: Path) -> None:
    def deployed(summary: dict[str, Any]) -> None:
        for key in ("partition", "confusion", "data_sha256"):
            del summary[key]
        summary["scores"] = {"noised": False}

    edit(private_run, deployed)
    assert violated(audit(private_run)) == ["scores of held-out images"]
    edit(private_run, lambda summary: summary.update(scores={"noised": True}))
    assert violated(audit(private_run)) == []


def test_faulty_code_is_a_violation_of_a_run(
    private_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PatientOptimizer, "add_noise", lambda _: None)
    assert len(violated(audit(private_run))) >= 3


@pytest.mark.faults
def test_every_control_is_caught_and_shown(private_run: Path) -> None:
    found = audit(private_run, controls=True, attacks=True)
    refuse_violation(found)
    assert found["controls"]["all_caught"]
    rows = {row["fault"]: row["checks"] for row in found["controls"]["faults"]}
    assert len(rows) == 8 + len(planted.FAULTS)
    assert all(rows[fault.name][planted.CHECK] for fault in planted.FAULTS)
    caught = f"{len(rows)} of {len(rows)} planted faults caught"
    assert caught in lines(found)
    assert "membership inference, pseudo-patients | AUC" in lines(found)
    report = write_report(private_run).read_text()
    assert caught in report
    for name in ("membership", "sums", "collusion"):
        for ending in ("svg", "pdf"):
            assert (private_run / "figures" / f"{name}.{ending}").stat().st_size > 1000


def test_an_audit_of_an_older_version_is_not_shown(private_run: Path) -> None:
    found = audit(private_run)
    (private_run / "audit.json").write_text(json.dumps({**found, "version": 1}))
    assert "<h2>Audit</h2>" not in write_report(private_run).read_text()


def test_a_control_that_is_missed_fails_the_audit() -> None:
    missed = {"fault": "noise off", "caught": False, "checks": {}}
    found = {"violations": 0, "controls": {"all_caught": False, "faults": [missed]}}
    with pytest.raises(VerificationError, match="noise off"):
        refuse_violation(found)


def test_a_run_without_privacy_says_so(small: Small, directly: Simulate) -> None:
    request = small("train.rounds=1")
    directly(request)
    found = audit(request.out)
    refuse_violation(found)
    assert "no differential privacy is claimed" in lines(found)
    assert found["claim"] is None


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run directory"):
        audit(tmp_path)


def violated(found: dict[str, Any]) -> list[str]:
    return [
        finding["what"]
        for finding in (*found["checks"], *found["leaves"])
        if finding["verdict"] == "VIOLATION"
    ]


@pytest.mark.faults  # twenty seconds, of attacks
def test_no_picture_of_a_patient_is_in_what_would_be_published(private_run: Path) -> None:
    """Images of the run, of the package and rebuilt ones: on a page of their own, for its owner."""
    figures = private_run / "figures"
    figures.mkdir(exist_ok=True)
    (figures / "round.svg").write_text("of an older version")
    found = audit(private_run, attacks=True)
    assert f"{PRIVATE_PAGE}: of patients; private" in lines(found)
    page = private_run / PRIVATE_PAGE
    assert page.stat().st_mode & 0o777 == 0o600
    assert page.read_text().count("data:image/png;base64,") >= 40
    assert "Do not publish it" in page.read_text()
    report = write_report(private_run).read_text()
    assert PRIVATE_PAGE in report
    published = [path for path in private_run.rglob("*") if path.is_file() and path != page]
    assert {"report.html", "audit.json", "summary.json"} <= {path.name for path in published}
    for path in published:
        if path.is_relative_to(private_run / "checkpoints"):
            continue  # the simulation's own, and no part of what is published
        raw = path.read_bytes()
        assert b"data:image" not in raw, path
        assert not (path.suffix in (".svg", ".pdf") and _has_raster(raw)), path
    audit(private_run)
    assert not page.exists()


def _has_raster(raw: bytes) -> bool:
    return b"<image" in raw or b"/Subtype /Image" in raw


def test_pictures_are_taken_out_wherever_they_are() -> None:
    uri = "data:image/png;base64,AAAA"
    found = {"images": 3, "rows": [{"likeness": 0.5, "pictures": [uri], "far": {"near": uri}}, uri]}
    assert without_pictures(found) == {"images": 3, "rows": [{"likeness": 0.5, "far": {}}]}
