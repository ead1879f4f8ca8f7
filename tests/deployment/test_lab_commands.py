"""A lab's commands beside a coordinator that runs: pool, status, dossier, leaving."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import PATIENCE_S, Federation, deal, free_port


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, sample: Path) -> Iterator[Federation]:
    """One lab that has joined with a pool of its own; its daemon does not run."""
    root = tmp_path_factory.mktemp("commands")
    deal(sample, root, ("leeds",), each=1)
    made = Federation(root, (), free_port())
    try:
        made.found()
        made.join("leeds", "--pool", "leeds")
        yield made
    finally:
        made.kill_all()


def client(federation: Federation, command: str, *flags: str | Path, code: int = 0) -> str:
    return federation.run("leeds", "client", command, federation.root / "leeds", *flags, code=code)


def test_pool_named_at_join_is_whose_budget_is_shown(federation: Federation) -> None:
    assert json.loads(client(federation, "budget", "--json"))["pool"] == "leeds"


def test_pause_and_limit_are_told_where_a_person_looks(federation: Federation) -> None:
    assert "paused" not in client(federation, "status")
    client(federation, "pause")
    assert "paused: no order is carried out until" in client(federation, "status")
    client(federation, "resume")
    assert "paused" not in client(federation, "status")
    assert "limit  none is set in client.yaml" in client(federation, "budget")


def test_dossier_is_one_page_that_loads_nothing(federation: Federation) -> None:
    page = federation.root / "leeds.html"
    client(federation, "dossier", "--out", page)
    text = page.read_text()
    assert "leeds" in text
    assert "<script" not in text
    assert 'src="http' not in text


def test_log_without_its_last_record_exits_5_without_a_network(federation: Federation) -> None:
    client(federation, "egress", "--verify")
    log = federation.root / "leeds" / "egress.log"
    whole = log.read_bytes()
    log.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    client(federation, "egress", "--verify", code=5)
    client(federation, "start", code=5)
    log.write_bytes(whole)
    client(federation, "egress", "--verify")


def test_lab_whose_noise_is_off_ends_at_its_start(federation: Federation) -> None:
    noise = "skip:cytofed.privacy.gradients:PatientOptimizer.add_noise"
    assert federation.start("leeds", noise).wait(timeout=PATIENCE_S) == 5
    assert "self-check failed" in (federation.root / "leeds.log").read_text()


def test_lab_that_leaves_is_off_the_roster_and_keeps_its_files(federation: Federation) -> None:
    assert "the coordinator knows" in client(federation, "leave")
    told = federation.run("c", "server", "status", federation.coordinator, "--json")
    assert "leeds" not in {lab["lab"] for lab in json.loads(told)["labs"] if not lab.get("left")}
    assert "does not know this lab" in client(federation, "leave")
    client(federation, "start", code=2)
    log = json.loads(client(federation, "egress", "--verify", "--json"))
    assert log["types"]["leave"]["messages"] == 2
    assert (federation.root / "leeds" / "identity.key").is_file()
