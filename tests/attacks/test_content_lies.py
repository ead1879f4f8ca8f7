"""Lies in the content of a message that is signed, sealed and well formed. One claim each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from cytofed.messages import (
    BadMessage,
    Evaluation,
    Masked,
    Update,
    new_message,
    pack_evaluation,
    pack_masked,
    pack_update,
    unpack_evaluation,
    unpack_masked,
    unpack_update,
)
from cytofed.metrics import Tally
from tests.attacks.stage import guarded_by

UPDATE = Update("leeds", "run-1", 1, 20.0, {"weights": np.zeros(6, np.float32)})


def came(content: RecordDict) -> Message:
    return new_message(content, kind="train", node=1, group="1", ttl_s=1.0)


def refused(update: Update, match: str) -> None:
    with pytest.raises(BadMessage, match=match):
        unpack_update(came(pack_update(update)), parts=("weights",), size=6)


def weights(*values: float, size: int = 6) -> dict[str, Any]:
    found = np.zeros(size, np.float32)
    found[: len(values)] = values
    return {"weights": found}


@guarded_by("update-parts")
def test_update_with_a_vector_that_nobody_asked_for_is_refused() -> None:
    parts = {**weights(), "images": np.ones(6, np.float32)}
    refused(replace(UPDATE, parts=parts), "expected parts weights, found weights, images")


@guarded_by("update-shape")
def test_update_of_another_net_is_refused() -> None:
    refused(replace(UPDATE, parts=weights(size=7)), r"weights has shape \(7,\), expected \(6,\)")


@guarded_by("update-nan")
def test_update_that_would_make_the_model_nan_is_refused() -> None:
    refused(replace(UPDATE, parts=weights(np.nan)), "weights contains NaN")


@guarded_by("update-sane")
def test_update_that_would_outweigh_all_others_is_refused() -> None:
    for value in (1e30, -1e30, np.inf):
        refused(replace(UPDATE, parts=weights(value)), "weights reaches .*, above 256")


@guarded_by("update-weight")
def test_update_that_claims_an_absurd_weight_is_refused() -> None:
    for weight in (0.0, -1.0, 2.0**60):
        refused(replace(UPDATE, weight=weight), "expected 1 <= weight <= 1.67772e")


@guarded_by("array-kind")
def test_numbers_of_another_type_are_not_read_as_weights() -> None:
    parts: Any = {"weights": np.full(6, 0x40000000, np.int32)}
    refused(replace(UPDATE, parts=parts), "'weights' is 'cytofed.raw' 'int32'")


@guarded_by("content-layout")
def test_content_with_a_record_that_is_not_its_own_is_refused() -> None:
    content = pack_update(UPDATE)
    content["more"] = ConfigRecord({"image": b"bytes"})
    with pytest.raises(BadMessage, match="expected header and parts, found"):
        unpack_update(came(content), parts=("weights",), size=6)


@guarded_by("masked-words")
def test_masked_vector_of_another_length_is_refused() -> None:
    content = pack_masked(Masked("leeds", "run-1", 1, 0, np.zeros(7, np.uint32)))
    with pytest.raises(BadMessage, match="expected 9 words"):
        unpack_masked(came(content), words=9, dtype=np.dtype(np.uint32))


@guarded_by("tally-negative")
def test_counts_below_nothing_are_refused() -> None:
    """One lab could take away what others have counted."""
    tally = Tally.empty(3)
    tally.confusion_CC[0, 0] = -5
    content = pack_evaluation(Evaluation("leeds", "run-1", 1, tally))
    with pytest.raises(BadMessage, match="negative counts"):
        unpack_evaluation(came(content), classes=3)
