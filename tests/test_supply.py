"""What a deployment installs: bounded in pyproject.toml, locked by hash, listed in the SBOM."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = ("requirements.lock", "requirements-test.lock")


def declared(extra: str | None) -> list[Requirement]:
    found = list(PROJECT["dependencies"])
    if extra:
        found += PROJECT["optional-dependencies"][extra]
    return [Requirement(text) for text in found]


def entries(lock: str) -> list[tuple[Requirement, list[str]]]:
    """Each pinned release of a lock, with its hashes."""
    text = (DEPLOY / lock).read_text().replace("\\\n", " ")
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        requirement, *hashes = re.split(r"\s+--hash=", line)
        found.append((Requirement(requirement), hashes))
    return found


def pinned(lock: str) -> dict[str, set[Version]]:
    found: dict[str, set[Version]] = {}
    for requirement, _ in entries(lock):
        version = Version(str(requirement.specifier).removeprefix("=="))
        found.setdefault(canonicalize_name(requirement.name), set()).add(version)
    return found


@pytest.mark.parametrize("extra", [None, *PROJECT["optional-dependencies"]])
def test_every_dependency_has_an_upper_bound(extra: str | None) -> None:
    for requirement in declared(extra):
        bounds = {spec.operator for spec in requirement.specifier}
        assert bounds & {"<", "<=", "=="}, f"{requirement} takes releases that nobody has tried"


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_release_is_one_version_with_a_sha256_of_each_file(lock: str) -> None:
    assert entries(lock)
    for requirement, hashes in entries(lock):
        assert [spec.operator for spec in requirement.specifier] == ["=="], requirement
        assert hashes, f"{requirement} could be replaced by another file"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes)


@pytest.mark.parametrize(("lock", "extra"), [(LOCKS[0], None), (LOCKS[1], "test")])
def test_locks_hold_what_is_declared(lock: str, extra: str | None) -> None:
    versions = pinned(lock)
    for requirement in declared(extra):
        found = versions.get(canonicalize_name(requirement.name))
        assert found, f"{requirement} is not in {lock}: run `make lock`"
        assert all(requirement.specifier.contains(v) for v in found), f"{lock} is stale"


def test_tests_run_on_the_releases_that_deployments_install() -> None:
    deployed, tested = pinned(LOCKS[0]), pinned(LOCKS[1])
    assert deployed.items() <= tested.items()


def test_the_bill_of_materials_lists_what_the_lock_installs() -> None:
    bom = json.loads((DEPLOY / "sbom.cdx.json").read_text())
    assert bom["bomFormat"] == "CycloneDX"
    listed: dict[str, set[Version]] = {}
    for component in bom["components"]:
        version = Version(component["version"])
        listed.setdefault(canonicalize_name(component["name"]), set()).add(version)
    assert listed == pinned(LOCKS[0])
    assert bom["metadata"]["component"]["version"] == PROJECT["version"]
