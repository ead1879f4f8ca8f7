"""The systemd units keep what the guides promise: no privilege, and no listening lab."""

from __future__ import annotations

import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"


def unit(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for line in (DEPLOY / f"cytofed-{name}.service").read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found[key].append(value)
    return found


@pytest.mark.parametrize("name", ["client", "server"])
def test_a_unit_has_no_privilege_and_a_read_only_system(name: str) -> None:
    found = unit(name)
    assert found["NoNewPrivileges"] == ["yes"]
    assert found["ProtectSystem"] == ["strict"]
    assert found["CapabilityBoundingSet"] == [""]
    assert found["UMask"] == ["0077"]
    assert found["LimitCORE"] == ["0"]  # a core file would hold keys and weights
    assert found["User"]
    assert found["User"] != ["root"]


def test_the_lab_may_not_listen_and_the_coordinator_on_one_port_only() -> None:
    assert (unit("client")["SocketBindDeny"], unit("client")["SocketBindAllow"]) == (["any"], [])
    assert unit("server")["SocketBindDeny"] == ["any"]
    assert len(unit("server")["SocketBindAllow"]) == 1


@pytest.mark.parametrize("name", ["client", "server"])
def test_systemd_understands_every_line(name: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze not found")
    text = (DEPLOY / f"cytofed-{name}.service").read_text()
    lines = ["ExecStart=/bin/true" if x.startswith("ExecStart=") else x for x in text.splitlines()]
    path = tmp_path / f"cytofed-{name}.service"
    path.write_text("\n".join(lines))
    ran = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not [line for line in ran.stderr.splitlines() if path.name in line]
