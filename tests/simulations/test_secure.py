"""A federation under secure aggregation: the same model, and the coordinator sees sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cytofed.client.secure import SecureLab
from cytofed.errors import InputError, RefusedError
from cytofed.messages import Order
from cytofed.model_file import read_model
from cytofed.privacy import sealing, secagg_lab
from cytofed.privacy import secagg_coordinator as protocol
from cytofed.privacy.secagg import WrongShares
from cytofed.secure_round import at_most_half
from cytofed.server.secure import SecureRun
from cytofed.simulations.simulate import Request
from tests.attacks import evil

Small = Callable[..., Request]
Simulate = Callable[[Request], dict[str, Any]]
SECURE = ("secure_aggregation.enabled=true", "simulation.labs=4")


def weights(out: Path) -> npt.NDArray[np.float32]:
    arrays, _ = read_model(out / "model.safetensors")
    return np.concatenate([arrays[name].reshape(-1) for name in sorted(arrays)])


def test_one_round_gives_the_same_model_up_to_the_quantisation_step(
    small: Small, directly: Simulate, tmp_path: Path
) -> None:
    plain = small("train.rounds=1", "simulation.labs=4", out=tmp_path / "plain")
    secure = small("train.rounds=1", *SECURE, out=tmp_path / "secure")
    directly(plain)
    summary = directly(secure)
    assert summary["status"] == "completed"
    assert summary["wire"]["secure_aggregation"] is True
    # step * max_weight * labs / sum of weights (privacy.encoding), max_weight at most twice the
    # largest weight; and the rounding of float32 weights.
    step = 1.0 / ((1 << (32 - 2 - 1)) - 1)
    bound = step * 4 + 2e-7
    assert np.abs(weights(plain.out) - weights(secure.out)).max() <= bound


def test_dropouts_down_to_the_threshold_do_not_change_what_is_averaged(
    small: Small, directly: Simulate, tmp_path: Path
) -> None:
    drops = ("simulation.population.dropout=0.25", "train.rounds=1")
    directly(small("simulation.labs=4", *drops, out=tmp_path / "plain"))
    summary = directly(small(*SECURE, *drops, out=tmp_path / "secure"))
    (record,) = summary["participation"]
    assert len(record["received"]) == 3
    assert list(record["absent"].values()) == ["dropped out (simulated)"]
    assert np.abs(weights(tmp_path / "plain") - weights(tmp_path / "secure")).max() < 1e-6


def test_below_the_threshold_the_model_does_not_move_and_the_run_says_so(
    small: Small, directly: Simulate
) -> None:
    request = small(*SECURE, "simulation.population.dropout=0.5", "train.rounds=1")
    summary = directly(request)
    assert summary["status"] == "failed"
    assert len(summary["participation"][0]["absent"]) == 2


def test_a_lab_whose_slot_is_lost_is_asked_again_in_the_next(
    small: Small, directly: Simulate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a crash between its mask and its outbox: the slot is used, the vector is gone."""
    directly(small("simulation.labs=4", "train.rounds=1", out=tmp_path / "plain"))
    mask, asked = SecureLab.mask, []

    def lost_once(self: SecureLab, order: Order, *arguments: Any) -> Any:
        asked.append((self.identity.name, order.slot))
        found = mask(self, order, *arguments)
        if asked[-1] == ("lab-2", 0):
            raise RefusedError("the slot was answered")
        return found

    monkeypatch.setattr(SecureLab, "mask", lost_once)
    needed = ("cohort.min_labs=4", "train.rounds=1")
    summary = directly(small(*SECURE, *needed, out=tmp_path / "secure"))
    assert summary["status"] == "completed"
    assert summary["participation"][0]["absent"] == {}
    assert sorted(asked) == [(f"lab-{lab}", slot) for lab in range(1, 5) for slot in (0, 1)]
    assert np.abs(weights(tmp_path / "plain") - weights(tmp_path / "secure")).max() < 1e-6


@pytest.mark.parametrize("strategy", ["scaffold", "fednag"])
def test_control_variates_and_momentum_travel_in_the_same_masked_vector(
    strategy: str, small: Small, directly: Simulate, tmp_path: Path
) -> None:
    settings = (f"strategy.name={strategy}", "train.optimizer=sgd", "train.lr=0.01")
    directly(small("simulation.labs=4", *settings, out=tmp_path / "plain"))
    summary = directly(small(*SECURE, *settings, out=tmp_path / "secure"))
    assert summary["status"] == "completed"
    assert np.abs(weights(tmp_path / "plain") - weights(tmp_path / "secure")).max() < 1e-3


def test_sixteen_bits_halve_the_bytes(small: Small, directly: Simulate, tmp_path: Path) -> None:
    sent = {}
    for bits in (32, 16):
        request = small(
            *SECURE, "train.rounds=1", f"secure_aggregation.bits={bits}", out=tmp_path / str(bits)
        )
        sent[bits] = directly(request)["wire"]["up_bytes_per_lab_round"]
    assert sent[16] == pytest.approx(sent[32] / 2, rel=0.02)


def test_more_rounds_than_slots_make_a_new_set_up(
    small: Small, directly: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cytofed.server.secure.SLOTS", 2)
    summary = directly(small(*SECURE, "train.rounds=5", "train.steps_per_round=1"))
    assert summary["status"] == "completed"


def test_two_labs_are_refused_before_anything_runs(small: Small, directly: Simulate) -> None:
    request = small("secure_aggregation.enabled=true", "simulation.labs=2")
    with pytest.raises(InputError, match="2 labs"):
        directly(request)
    assert not request.out.exists()


def test_a_lab_sends_no_loss_and_no_weight_of_its_own(small: Small, directly: Simulate) -> None:
    request = small(*SECURE, "train.rounds=1")
    directly(request)
    line = (request.out / "metrics.jsonl").read_text()
    assert '"loss": {}' in line


# --- a coordinator that lies, at the boundary where its messages reach the labs


def test_labs_that_are_told_other_weight_bounds_open_no_sum(
    small: Small, directly: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a bound of 2^60 a lab's own update is nothing: the sum would be one lab's."""
    monkeypatch.setattr(SecureRun, "_sent", evil.tells(evil.one_lab_alone("lab-1")))
    summary = directly(small(*SECURE, "train.rounds=1"))
    assert summary["status"] == "failed"
    [told] = summary["participation"]
    assert set(told["absent"]) == {"lab-2", "lab-3", "lab-4"}
    assert all("order with a weight bound of 1.15292e+18" in why for why in told["absent"].values())


def test_labs_that_do_not_look_at_their_bound_open_no_sum_all_the_same(
    small: Small, directly: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound is in the masks and in what labs sign, as all else of an order."""
    monkeypatch.setattr(SecureRun, "_sent", evil.tells(evil.one_lab_alone("lab-1")))
    monkeypatch.setattr(SecureLab, "_check_order", lambda _self, _order: None)
    summary = directly(small(*SECURE, "train.rounds=1"))
    assert summary["status"] == "failed"
    [told] = summary["participation"]
    assert set(told["absent"]) == {"lab-2", "lab-3", "lab-4"}
    assert all("labs were told different things" in why for why in told["absent"].values())


def test_labs_that_are_told_other_weights_open_no_sum(
    small: Small, directly: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SecureRun, "_sent", evil.tells(evil.other_weights("lab-1")))
    summary = directly(small(*SECURE, "train.rounds=2"))
    first, second = summary["participation"]
    assert first["absent"] == {}
    assert set(second["absent"]) == {"lab-2", "lab-3", "lab-4"}
    assert all("labs were told different things" in why for why in second["absent"].values())


def test_same_model_is_summed_over_the_same_labs_only(
    small: Small, directly: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator forgets the first sum and calls a lab absent: the difference of the two sums
    would be that lab's update."""
    collect, sums = SecureRun.collect, []

    def forgetful(self: SecureRun, *arguments: Any, **named: Any) -> Any:
        found = collect(self, *arguments, **named)
        sums.append(found.survivors)
        return replace(found, mean={"weights": np.zeros_like(found.mean["weights"])})

    monkeypatch.setattr(SecureRun, "collect", forgetful)
    monkeypatch.setattr(SecureRun, "_sent", evil.tells(evil.called_absent("lab-4", from_round=2)))
    summary = directly(small(*SECURE, "train.rounds=2", "evaluation.every=9"))
    assert sums == [("lab-1", "lab-2", "lab-3", "lab-4")]
    refused = summary["participation"][1]["absent"]
    assert all("would show the difference" in refused[lab] for lab in ("lab-1", "lab-2", "lab-3"))


def test_a_sum_over_too_few_labs_for_the_plan_is_not_opened(
    small: Small, directly: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be thrown away, and bind the next round to the same labs."""
    asked = []
    agree = SecureLab.answer

    def noted(self: SecureLab, request: Any) -> Any:
        asked.append(request.step)
        return agree(self, request)

    monkeypatch.setattr(SecureLab, "answer", noted)
    lie = evil.called_absent("lab-4", from_round=1)
    monkeypatch.setattr(SecureRun, "_sent", evil.tells(lie))
    summary = directly(small(*SECURE, "train.rounds=1", "cohort.min_labs=4"))
    assert summary["status"] == "failed"
    assert asked.count("agree") == 3, "of the evaluation, which three labs are enough for"


def deals_zeros(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One lab signs the hashes of good shares and seals zeros in their place."""
    seal = sealing.seal

    def sealed(payload: Any, context: Any, **named: Any) -> Any:
        return seal(bytes(len(payload)) if context.sender == name else payload, context, **named)

    monkeypatch.setattr("cytofed.privacy.secagg_lab.seal", sealed)


def test_a_dealer_of_bad_shares_that_shows_the_good_ones_takes_part_with_those_it_cheated(
    small: Small, directly: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    deals_zeros(monkeypatch, "lab-2")
    summary = directly(small(*SECURE, "train.rounds=1"))
    assert summary["status"] == "completed"
    assert summary["participation"][0]["absent"] == {}


def test_a_dealer_of_bad_shares_is_named_and_left_out_and_the_run_goes_on(
    small: Small, directly: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    deals_zeros(monkeypatch, "lab-2")
    show = secagg_lab.open_dealt

    def zeros(state: secagg_lab.LabState, *arguments: Any) -> Any:
        rows = {peer: bytes(len(held)) for peer, held in state.dealt.items()}
        return show(replace(state, dealt=rows) if state.lab == "lab-2" else state, *arguments)

    monkeypatch.setattr(secagg_lab, "open_dealt", zeros)
    summary = directly(small(*SECURE, "train.rounds=2"))
    assert summary["status"] == "incomplete"  # one lab never contributed
    for told in summary["participation"]:
        assert told["received"] == ["lab-1", "lab-3", "lab-4"]
    first = summary["participation"][0]["absent"]
    assert list(first) == ["lab-2"]
    assert "other shares than those that it signed" in first["lab-2"]


def deals_another_secret(monkeypatch: pytest.MonkeyPatch, *liars: str) -> None:
    deal = secagg_lab._deal
    lie = evil.of_another_seed(deal)

    def dealt(state: secagg_lab.LabState, *arguments: Any) -> Any:
        return (lie if state.lab in liars else deal)(state, *arguments)

    monkeypatch.setattr(secagg_lab, "_deal", dealt)


def test_a_dealer_of_another_secret_is_proven_to_lie_and_the_same_round_goes_on_without_it(
    small: Small, directly: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    deals_another_secret(monkeypatch, "lab-2")
    summary = directly(small(*SECURE, "train.rounds=2", "cohort.min_labs=3"))
    assert summary["status"] == "incomplete"  # one lab never contributed
    for told in summary["participation"]:
        assert told["received"] == ["lab-1", "lab-3", "lab-4"]
    first = summary["participation"][0]["absent"]
    assert list(first) == ["lab-2"]
    assert "the seed of lab-2 is not the one it committed to" in first["lab-2"]


def test_who_was_proven_to_lie_is_out_after_a_restart_of_the_coordinator_too(
    small: Small, directly: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = SecureRun.collect

    def afresh(self: SecureRun, *arguments: Any, **named: Any) -> Any:
        return collect(replace(self, _setup=None, _liars={}, _next_slot=0), *arguments, **named)

    monkeypatch.setattr(SecureRun, "collect", afresh)
    deals_another_secret(monkeypatch, "lab-2")
    first, second = directly(small(*SECURE, "train.rounds=2", "cohort.min_labs=3"))["participation"]
    assert list(first["absent"]) == ["lab-2"]
    assert second["received"] == ["lab-1", "lab-3", "lab-4"]
    assert second["absent"] == {}, "it is not asked any more"


def test_two_dealers_of_other_secrets_are_left_out_one_after_the_other(
    small: Small, directly: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    deals_another_secret(monkeypatch, "lab-2", "lab-5")
    labs = ("secure_aggregation.enabled=true", "simulation.labs=5")
    rules = ("secure_aggregation.threshold=3", "cohort.min_labs=3", "train.rounds=1")
    [told] = directly(small(*labs, *rules))["participation"]
    assert told["received"] == ["lab-1", "lab-3", "lab-4"]
    assert set(told["absent"]) == {"lab-2", "lab-5"}


def test_a_coordinator_that_accuses_an_honest_lab_is_believed_by_nobody(
    small: Small, directly: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a proof of its own making it would open the same sum without that lab."""
    unmask = protocol.unmask

    def accusing(poll: Any, total_W: Any, revealed: Any) -> None:
        unmask(poll, total_W, revealed)
        raise WrongShares("lab-4 is said to lie", lab="lab-4")

    monkeypatch.setattr(protocol, "unmask", accusing)
    monkeypatch.setattr("cytofed.privacy.secagg_coordinator.check_fraud", lambda *_: None)
    summary = directly(small(*SECURE, "train.rounds=1", "cohort.min_labs=3"))
    assert summary["status"] == "failed"
    [told] = summary["participation"]
    for lab in ("lab-1", "lab-2", "lab-3"):
        assert (
            "the shares of lab-4 are those of the seed that it committed to" in told["absent"][lab]
        )


def test_nobody_weighs_more_than_all_others_together() -> None:
    assert at_most_half({"a": 64.0, "b": 64.0, "c": 1024.0}) == {"a": 64.0, "b": 64.0, "c": 128.0}
    assert at_most_half({"a": 64.0, "b": 64.0, "c": 128.0}) == {"a": 64.0, "b": 64.0, "c": 128.0}
