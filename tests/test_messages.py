"""Messages: what is sent comes back to the bit; what does not fit is its sender's failure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cytofed.messages import (
    MAX_UPDATE,
    MAX_WEIGHT,
    RAW,
    BadMessage,
    Evaluation,
    Hello,
    Order,
    Update,
    content_bytes,
    new_message,
    pack_evaluation,
    pack_hello,
    pack_order,
    pack_update,
    unpack_evaluation,
    unpack_hello,
    unpack_order,
    unpack_update,
)
from cytofed.metrics import BINS, Tally

SIZE, CLASSES = 4, 3
READERS: list[Callable[[Message], Any]] = [
    lambda message: unpack_update(message, parts=("weights",), size=SIZE),
    lambda message: unpack_evaluation(message, classes=CLASSES),
    unpack_order,
    unpack_hello,
]


def message(content: RecordDict, kind: str = "train") -> Message:
    return new_message(content, kind=kind, node=1, group="1", ttl_s=60)


def over_the_wire(content: RecordDict) -> RecordDict:
    """Through Flower's own serialisation, as between two machines."""
    return RecordDict.inflate(content.deflate(), children=_children(content))


def _children(content: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for child in (content.children or {}).values():
        found |= {child.object_id: child}
    return found


def update(**changes: Any) -> Update:
    values: dict[str, Any] = {
        "lab": "leeds",
        "run": "federation",
        "round": 3,
        "weight": 120.0,
        "parts": {"weights": np.array([0.5, -1, 0, 2], np.float32)},
        "loss": 1.25,
        "train_s": 0.5,
    }
    return Update(**{**values, **changes})


def read_update(content: RecordDict) -> Update:
    return unpack_update(message(content), parts=("weights",), size=SIZE)


def tally() -> Tally:
    return Tally(
        np.arange(9, dtype=np.int64).reshape(3, 3), np.arange(BINS * 3).reshape(-1, 3) * 10**6
    )


def raw(data: bytes, shape: tuple[int, ...], dtype: str = "float32", stype: str = RAW) -> Array:
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


def with_array(content: RecordDict, name: str, array: Array) -> RecordDict:
    content["parts"] = ArrayRecord({name: array})
    return content


def with_header(content: RecordDict, **changes: Any) -> RecordDict:
    header = content["header"]
    assert isinstance(header, ConfigRecord)
    kept = {key: value for key, value in header.items() if key not in changes}
    new = {key: value for key, value in changes.items() if value is not None}
    content["header"] = ConfigRecord({**kept, **new})
    return content


# --- round trips


@settings(max_examples=50, deadline=None)
@given(
    st.text(max_size=256),
    st.integers(0, 2**31),
    st.floats(1, MAX_WEIGHT),
    arrays(np.float32, SIZE, elements=st.floats(-MAX_UPDATE, MAX_UPDATE, width=32)),
)
def test_update_comes_back_to_the_bit(
    lab: str, round_: int, weight: float, values_P: np.ndarray[Any, np.dtype[np.float32]]
) -> None:
    sent = update(lab=lab, round=round_, weight=weight, parts={"weights": values_P})
    found = read_update(over_the_wire(pack_update(sent)))
    assert found.parts["weights"].tobytes() == values_P.tobytes()
    assert (found.lab, found.run, found.round, found.weight, found.loss, found.train_s) == (
        (lab, "federation", round_, weight, 1.25, 0.5)
    )


def test_several_parts_keep_their_order_and_values() -> None:
    parts = {"weights": np.zeros(SIZE, np.float32), "control": np.ones(SIZE, np.float32)}
    content = pack_update(update(parts=parts))
    found = unpack_update(message(content), parts=("weights", "control"), size=SIZE)
    assert [*found.parts] == ["weights", "control"]
    assert found.parts["control"].tolist() == [1.0] * SIZE


def test_loss_may_stay_at_the_lab() -> None:
    assert math.isnan(read_update(pack_update(update(loss=math.nan))).loss)


@pytest.mark.parametrize("kind", ["train", "evaluate", "query", "train.own_app"])
def test_order_comes_back(kind: str) -> None:
    sent = Order("train", "federation", 2, "f" * 64, {"weights": np.ones(7, np.float32)})
    found = unpack_order(message(over_the_wire(pack_order(sent)), kind))
    assert (found.kind, found.run, found.round) == (kind.partition(".")[0], "federation", 2)
    assert found.plan_sha256 == "f" * 64
    assert found.parts["weights"].tolist() == [1.0] * 7


def test_evaluation_and_hello_come_back() -> None:
    sent = Evaluation("leeds", "federation", 2, tally())
    content = over_the_wire(pack_evaluation(sent))
    found = unpack_evaluation(message(content), classes=CLASSES)
    assert (found.lab, found.run, found.round) == ("leeds", "federation", 2)
    assert (found.tally.vector_D == tally().vector_D).all()
    assert unpack_hello(message(pack_hello(Hello("leeds", 99)), "query")) == Hello("leeds", 99)


def test_values_travel_little_endian_whatever_the_sender_holds() -> None:
    big = np.array([1.5, -2, 0, 3], ">f4")
    content = pack_update(update(parts={"weights": big}))
    array = content.array_records["parts"]["weights"]
    assert bytes(array.data) == big.astype("<f4").tobytes()
    assert read_update(content).parts["weights"].tolist() == big.tolist()


def test_weights_cost_four_bytes_each_and_the_rest_is_small() -> None:
    content = pack_update(update(parts={"weights": np.zeros(100_000, np.float32)}))
    assert 400_000 <= content_bytes(content) <= 400_000 + 500


def test_bytes_do_not_depend_on_how_long_training_took() -> None:
    sizes = {content_bytes(pack_update(update(train_s=s))) for s in (1.0, 0.1234567, 1e-9)}
    assert len(sizes) == 1


# --- an update that does not fit


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([0, math.nan, 0, 0], "NaN"),
        ([0, math.inf, 0, 0], "inf"),
        ([0, -math.inf, 0, 0], "inf"),
        ([math.inf, math.nan, 0, 0], "NaN"),
        ([0, 0, 0, MAX_UPDATE * 1.01], "above"),
        ([-1e30, 0, 0, 0], "above"),
        ([0, 0, 0], r"\(3,\)"),
        ([0, 0, 0, 0, 0], r"\(5,\)"),
        ([[0, 0], [0, 0]], r"\(2, 2\)"),
        ([[0, 0, 0, 0]], r"\(1, 4\)"),
        ([], r"\(0,\)"),
    ],
)
def test_bad_values_and_shapes_are_named(values: Any, reason: str) -> None:
    with pytest.raises(BadMessage, match=reason):
        read_update(pack_update(update(parts={"weights": np.array(values, np.float32)})))


@pytest.mark.parametrize(
    "weight", [0.0, -0.0, -1.0, 5e-324, 0.5, math.nan, math.inf, -math.inf, 1e300, MAX_WEIGHT * 2]
)
def test_weights_that_are_no_count_of_images_are_refused(weight: float) -> None:
    with pytest.raises(BadMessage, match="weight"):
        read_update(pack_update(update(weight=weight)))


@pytest.mark.parametrize(
    "names", [(), ("control",), ("weights", "control"), ("Weights",), ("weights", "weights2")]
)
def test_missing_extra_and_misnamed_parts_are_refused(names: tuple[str, ...]) -> None:
    parts = {name: np.zeros(SIZE, np.float32) for name in names}
    with pytest.raises(BadMessage, match="expected parts weights"):
        read_update(pack_update(update(parts=parts)))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, np.int64, np.uint8])
def test_other_number_types_are_refused(dtype: type[np.generic]) -> None:
    parts: Any = {"weights": np.zeros(SIZE, dtype)}
    with pytest.raises(BadMessage, match=np.dtype(dtype).name):
        read_update(pack_update(update(parts=parts)))


@pytest.mark.parametrize(
    "array",
    [
        raw(b"\0" * 15, (4,)),
        raw(b"\0" * 17, (4,)),
        raw(b"", (4,)),
        raw(b"\0" * 16, (4,), stype="numpy.ndarray"),
        raw(b"\0" * 16, (4,), dtype="<f4"),
        raw(b"\0" * 16, (-4,)),
        raw(b"\0" * 16, (-2, -2)),
        raw(b"", (0, 2**31 - 1, 2**31 - 1, 2**31 - 1)),
        raw(b"\0" * 16, (4,) + (1,) * 80),
        raw(b"", (2**31 - 1,) * 5),
        raw(b"\0\0\0\0", ()),
    ],
    ids=str,
)
def test_truncated_bytes_and_absurd_shapes_are_refused(array: Array) -> None:
    with pytest.raises(BadMessage):
        read_update(with_array(pack_update(update()), "weights", array))


@pytest.mark.parametrize(
    "change",
    [
        {"lab": None},
        {"lab": 7},
        {"lab": "x" * 257},
        {"lab": b"leeds"},
        {"run": None},
        {"round": None},
        {"round": -1},
        {"round": 1.0},
        {"round": "1"},
        {"round": True},
        {"weight": None},
        {"weight": "12"},
        {"weight": [12.0]},
        {"weight": True},
        {"loss": None},
        {"loss": "small"},
        {"train_s": None},
    ],
    ids=str,
)
def test_headers_of_another_form_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadMessage, match=next(iter(change))):
        read_update(with_header(pack_update(update()), **change))


@pytest.mark.parametrize("count", [-1, 2**40 + 1, -(2**62), 2**62])
def test_evaluations_with_impossible_counts_are_refused(count: int) -> None:
    found = tally()
    found.confusion_CC[0, 0] = count
    with pytest.raises(BadMessage, match="counts"):
        unpack_evaluation(
            message(pack_evaluation(Evaluation("leeds", "f", 1, found))), classes=CLASSES
        )


def test_evaluation_over_other_classes_is_refused() -> None:
    content = pack_evaluation(Evaluation("leeds", "f", 1, Tally.empty(CLASSES + 1)))
    with pytest.raises(BadMessage, match="expected arrays"):
        unpack_evaluation(message(content), classes=CLASSES)


def test_unknown_kind_of_order_is_refused() -> None:
    content = pack_order(Order("train", "f", 1, "0" * 64))
    with pytest.raises(BadMessage, match="unknown order 'system'"):
        unpack_order(message(content, "system"))


@pytest.mark.parametrize("reader", READERS)
def test_an_error_reply_has_no_content_to_read(reader: Callable[[Message], Any]) -> None:
    asked = message(RecordDict())
    with pytest.raises(BadMessage, match="no content"):
        reader(Message(Error(1, "out of memory"), reply_to=asked))


# --- anything at all

texts = st.text(max_size=300)
config = st.dictionaries(
    st.sampled_from(["lab", "run", "round", "weight", "loss", "train_s", "plan_sha256", "images"])
    | st.text(max_size=5),
    st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | texts
    | st.booleans()
    | st.binary(max_size=8)
    | st.lists(st.integers(0, 9), max_size=3),
    max_size=8,
)
array = st.builds(
    Array,
    dtype=st.sampled_from(["float32", "int64", "float64", "object", "", "<f4", "V8"]),
    shape=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(0, 4), max_size=5).map(tuple),
    stype=st.sampled_from([RAW, "numpy.ndarray", ""]),
    data=st.binary(max_size=40),
)
right_array = st.builds(
    Array,
    dtype=st.just("float32"),
    shape=st.just((SIZE,)),
    stype=st.just(RAW),
    data=st.binary(min_size=4 * SIZE, max_size=4 * SIZE),
)
array_record = st.dictionaries(
    st.sampled_from(["weights", "confusion", "bins"]) | st.text(max_size=4),
    array | right_array,
    max_size=3,
).map(ArrayRecord)
record = (
    config.map(lambda values: ConfigRecord(dict(values)))
    | array_record
    | st.dictionaries(st.text(max_size=4), st.floats(), max_size=2).map(
        lambda v: MetricRecord(dict(v))
    )
)
header = st.just(dict(pack_update(update())["header"])) | config
contents = st.builds(
    lambda header, parts: RecordDict({"header": ConfigRecord(header), "parts": parts}),
    header,
    array_record,
) | st.dictionaries(
    st.sampled_from(["header", "parts"]) | st.text(max_size=4), record, max_size=3
).map(RecordDict)


@settings(max_examples=200, deadline=None)
@given(contents, st.sampled_from(["train", "evaluate", "query", "train.x", "system"]))
def test_any_content_is_read_or_refused_and_never_an_insane_update(
    content: RecordDict, kind: str
) -> None:
    for reader in READERS:
        try:
            found = reader(message(content, kind))
        except BadMessage:
            continue
        if isinstance(found, Update):
            assert found.parts["weights"].shape == (SIZE,)
            assert (np.abs(found.parts["weights"]) <= MAX_UPDATE).all()
            assert 1 <= found.weight <= MAX_WEIGHT
