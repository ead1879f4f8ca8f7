"""The signed documents: each says what it was made to say, to the right reader, or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cytofed.documents import (
    COORDINATOR,
    Decision,
    Ended,
    Invite,
    LedgerHead,
    Member,
    Offer,
    Roster,
    Start,
    secure_cohort,
)
from cytofed.errors import InputError, VerificationError
from cytofed.plan import from_dict
from cytofed.privacy.identity import Identity

CHIEF = Identity.generate(COORDINATOR)
LABS = {name: Identity.generate(name) for name in ("basel", "bonn", "leeds")}
STRANGER = Identity.generate("leeds")
AT = datetime(2026, 5, 1, 12, tzinfo=UTC)


def roster_of(*names: str, epoch: int = 3) -> Roster:
    members = tuple(Member(LABS[name].public, f"{name}-key", 20) for name in names)
    return Roster("fed", epoch, members)


PLAN = from_dict({"cohort": {"min_labs": 2}, "secure_aggregation": {"enabled": True}}, source="x")
OFFER = Offer("run-1", PLAN, roster_of(*LABS))


def decision_of(lab: str, **changes: object) -> Decision:
    about = (OFFER.run, PLAN.sha256, OFFER.roster.sha256)
    made = Decision(lab, "approved", *about, max_weight=8, at=AT)
    return replace(made, **changes)  # type: ignore[arg-type]


def start_of(*labs: str, **changes: object) -> Start:
    approvals = {lab: decision_of(lab).signed(LABS[lab]) for lab in labs}
    made = Start(OFFER.run, PLAN.sha256, OFFER.roster.sha256, approvals)
    return replace(made, **changes)  # type: ignore[arg-type]


# --- invites


def invite() -> Invite:
    return Invite("fed", "host:1", "leeds", "token", "PEM", CHIEF.public.fingerprint, AT)


def test_invite_comes_back_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "leeds.invite"
    file.write_text(invite().to_text())
    assert Invite.load(file) == invite()


def test_invite_shows_no_token_by_accident() -> None:
    assert "token=" not in repr(invite())


@pytest.mark.parametrize(
    "change",
    [{"format": "cytofed-invite-2"}, {"expires": "soon"}, {"more": "x"}, {"lab": None}],
)
def test_what_is_no_invite_is_refused_by_name(tmp_path: Path, change: dict[str, object]) -> None:
    file = tmp_path / "leeds.invite"
    told = {**json.loads(invite().to_text()), **change}
    if change.get("lab", "") is None:
        del told["lab"]
    file.write_text(json.dumps(told))
    with pytest.raises(InputError, match=r"leeds\.invite is not an invite"):
        Invite.load(file)
    for text in ("", "[]", "\x00"):
        file.write_text(text)
        with pytest.raises(InputError, match="is not an invite"):
            Invite.load(file)
    with pytest.raises(InputError, match="cannot read invite"):
        Invite.load(tmp_path / "none")


# --- roster


def test_roster_comes_back_and_its_hash_covers_every_field() -> None:
    roster = roster_of(*LABS)
    assert Roster.from_bytes(roster.to_bytes()) == roster
    first = roster.members[0]
    others = [
        replace(roster, federation="other"),
        replace(roster, epoch=4),
        replace(roster, members=roster.members[:2]),
        replace(roster, members=(replace(first, declared_patients=21), *roster.members[1:])),
        replace(roster, members=(replace(first, node_key_sha256="x"), *roster.members[1:])),
        replace(roster, members=(*roster.members[:2], replace(first, identity=STRANGER.public))),
    ]
    assert len({roster.sha256, *(other.sha256 for other in others)}) == 1 + len(others)


@pytest.mark.parametrize("names", [("leeds", "bonn"), ("bonn", "bonn")])
def test_labs_out_of_order_or_twice_are_no_roster(names: tuple[str, ...]) -> None:
    with pytest.raises(VerificationError, match="each once"):
        roster_of(*names)


def test_no_lab_has_the_coordinators_name() -> None:
    with pytest.raises(VerificationError, match="expected labs"):
        Roster("fed", 1, (Member(CHIEF.public, "k"),))


def test_stranger_is_not_found() -> None:
    assert OFFER.roster.find("oslo") is None
    with pytest.raises(VerificationError, match="'oslo' is not in the roster"):
        OFFER.roster.member("oslo")


# --- offers, decisions, starts


def test_offer_comes_back_with_its_plan_and_roster() -> None:
    found = Offer.verified(OFFER.signed(CHIEF), CHIEF.public)
    assert (found.run, found.plan.sha256, found.roster) == (OFFER.run, PLAN.sha256, OFFER.roster)
    assert found.federation == "fed"


def test_an_offers_id_is_of_its_federation_run_plan_and_roster() -> None:
    again = Offer.verified(OFFER.signed(CHIEF), CHIEF.public)
    assert again.sha256 == OFFER.sha256
    faster = from_dict({"cohort": {"min_labs": 2}, "train": {"rounds": 2}}, source="x")
    others = (
        replace(OFFER, run="run-2"),
        replace(OFFER, plan=faster),
        replace(OFFER, roster=roster_of(*LABS, epoch=4)),
        replace(OFFER, roster=replace(OFFER.roster, federation="fed-2")),
    )
    assert len({OFFER.sha256, *(other.sha256 for other in others)}) == 5


def test_plan_that_another_version_reads_as_another_is_not_offered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = from_dict(
        {"model": {"arch": "encoder+head", "start": "blood"}, "cohort": {"min_labs": 2}},
        source="x",
    )
    document = Offer("run-1", plan, OFFER.roster).signed(CHIEF)
    assert Offer.verified(document, CHIEF.public).plan.sha256 == plan.sha256
    monkeypatch.setattr(
        "cytofed.plan.sha256_of", lambda _path: "0" * 64
    )  # another blood.safetensors
    with pytest.raises(InputError, match="blood is another encoder"):
        Offer.verified(document, CHIEF.public)


def test_decision_comes_back_as_the_lab_made_it() -> None:
    for verdict in ("approved", "rejected"):
        made = decision_of("leeds", verdict=verdict, reason="r" * 200)
        signed = made.signed(LABS["leeds"])
        assert Decision.verified(signed, LABS["leeds"].public, OFFER) == made


def test_start_names_the_labs_that_approved() -> None:
    found = Start.verified(start_of("leeds", "bonn").signed(CHIEF), CHIEF.public, OFFER)
    assert found.labs == ("bonn", "leeds")
    cohort = secure_cohort(start_of(*LABS), OFFER, CHIEF.public)
    assert [lab.name for lab in cohort.labs] == ["basel", "bonn", "leeds"]
    assert cohort.threshold == 3


SIGNED: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
    "offer": (OFFER.signed(CHIEF), lambda data: Offer.verified(data, CHIEF.public)),
    "decision": (
        decision_of("leeds").signed(LABS["leeds"]),
        lambda data: Decision.verified(data, LABS["leeds"].public, OFFER),
    ),
    "start": (
        start_of(*LABS).signed(CHIEF),
        lambda data: Start.verified(data, CHIEF.public, OFFER),
    ),
    "head": (
        LedgerHead("fed", "leeds", "a" * 64).signed(CHIEF),
        lambda data: LedgerHead.verified(data, CHIEF.public, federation="fed", lab="leeds"),
    ),
}


@pytest.mark.parametrize("name", SIGNED)
def test_a_document_holds_for_its_own_kind_only(name: str) -> None:
    read = SIGNED[name][1]
    read(SIGNED[name][0])
    for other, (data, _) in SIGNED.items():
        if other != name:
            with pytest.raises(VerificationError):
                read(data)


@pytest.mark.parametrize("name", SIGNED)
def test_no_byte_of_a_document_can_be_changed(name: str) -> None:
    data, read = SIGNED[name]
    step = max(1, len(data) // 40)
    for at in [*range(0, len(data), step), len(data) - 1]:
        altered = bytearray(data)
        altered[at] ^= 1
        with pytest.raises(VerificationError):
            read(bytes(altered))
    for cut in (b"", data[:-1], data + b"\x00"):
        with pytest.raises(VerificationError):
            read(cut)


def test_documents_of_another_signer_are_refused() -> None:
    with pytest.raises(VerificationError):
        Offer.verified(OFFER.signed(LABS["leeds"]), CHIEF.public)
    with pytest.raises(VerificationError):
        Decision.verified(decision_of("leeds").signed(STRANGER), LABS["leeds"].public, OFFER)
    with pytest.raises(VerificationError):
        Start.verified(start_of(*LABS).signed(LABS["leeds"]), CHIEF.public, OFFER)


@pytest.mark.parametrize("field", ["run", "plan_sha256", "roster_sha256"])
def test_decisions_and_starts_are_about_one_run_plan_and_roster(field: str) -> None:
    about = {field: "0" * 64}
    signed = decision_of("leeds", **about).signed(LABS["leeds"])
    with pytest.raises(VerificationError, match="another run, plan or roster"):
        Decision.verified(signed, LABS["leeds"].public, OFFER)
    with pytest.raises(VerificationError, match="another plan, run or roster"):
        Start.verified(start_of(*LABS, **about).signed(CHIEF), CHIEF.public, OFFER)
    carried = start_of("basel", "bonn", decisions={**start_of("basel").decisions, "leeds": signed})
    with pytest.raises(VerificationError, match="decision of leeds"):
        Start.verified(carried.signed(CHIEF), CHIEF.public, OFFER)


def test_nobody_is_in_a_cohort_without_an_approval_of_its_own() -> None:
    rejected = decision_of("leeds", verdict="rejected").signed(LABS["leeds"])
    borrowed = decision_of("leeds").signed(LABS["bonn"])
    for document in (rejected, borrowed):
        start = start_of("bonn", decisions={**start_of("bonn").decisions, "leeds": document})
        with pytest.raises(VerificationError):
            Start.verified(start.signed(CHIEF), CHIEF.public, OFFER)
    stranger = start_of(decisions={**start_of("bonn").decisions, "oslo": rejected})
    with pytest.raises(VerificationError, match="'oslo' is not in the roster"):
        Start.verified(stranger.signed(CHIEF), CHIEF.public, OFFER)


def test_cohort_smaller_than_the_plan_asks_for_does_not_start() -> None:
    with pytest.raises(VerificationError, match="a cohort of 1 labs, the plan asks for 2"):
        Start.verified(start_of("leeds").signed(CHIEF), CHIEF.public, OFFER)


def test_a_third_verdict_does_not_exist() -> None:
    signed = decision_of("leeds", verdict="perhaps").signed(LABS["leeds"])
    with pytest.raises(VerificationError, match="perhaps"):
        Decision.verified(signed, LABS["leeds"].public, OFFER)


@pytest.mark.parametrize(
    "head", [("other", "leeds", "a" * 64), ("fed", "bonn", "a" * 64), ("fed", "leeds", "A" * 64)]
)
def test_ledger_head_is_of_one_lab_and_a_hash(head: tuple[str, str, str]) -> None:
    signed = LedgerHead(*head).signed(CHIEF)
    with pytest.raises(VerificationError):
        LedgerHead.verified(signed, CHIEF.public, federation="fed", lab="leeds")


# --- ends


def test_end_of_a_run_is_the_coordinators_word_about_one_offer_of_this_federation() -> None:
    told = Ended("fed", OFFER.run, OFFER.sha256, "started without\nthis lab")
    read = Ended.verified(told.signed(CHIEF), CHIEF.public, federation="fed")
    assert read == replace(told, why="started without this lab")
    with pytest.raises(VerificationError):
        Ended.verified(told.signed(STRANGER), CHIEF.public, federation="fed")
    with pytest.raises(VerificationError, match="another federation"):
        Ended.verified(told.signed(CHIEF), CHIEF.public, federation="other")
    with pytest.raises(VerificationError):
        Ended.verified(OFFER.signed(CHIEF), CHIEF.public, federation="fed")
