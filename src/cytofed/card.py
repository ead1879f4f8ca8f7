"""The model card that goes with a model file. After Mitchell et al., FAT* 2019, arXiv:1810.03993.

It is written from the run's summary and plan, for whoever gets the model without the run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from cytofed.errors import InputError
from cytofed.labels import load_scheme
from cytofed.plan import Plan
from cytofed.whose import made_up, whose_of
from cytofed.words import markdown

_MATEK = (
    "Matek, Krappe, Münzenmayer, Haferlach, Marr: Highly accurate differentiation of bone marrow "
    "cell morphologies using deep neural networks on a large image data set. Blood 2021, "
    "doi:10.1182/blood.2020010568"
)

_MOST_CHARS = 1000
"""of one name, code or attribution"""


def model_card(summary: Mapping[str, Any], plan: Plan) -> str:
    """The card as Markdown, from ``summary.json`` and the plan of a run.

    Text from elsewhere (names of labs and of the plan) is escaped, so that it shows as it is.

    Errors: InputError for the summary of a run that left no model.
    """
    if not summary.get("weights_sha256"):
        raise InputError(
            f"a run that {summary.get('status', 'failed')} without a model has no card"
        )
    sections = [
        _what(summary, plan),
        _use(),
        _data(summary, plan),
        _training(summary, plan),
        _results(summary),
        _privacy(summary, plan),
        _limits(summary, plan),
        _identity(summary, plan),
    ]
    return "\n\n".join(sections) + "\n"


def _what(summary: Mapping[str, Any], plan: Plan) -> str:
    name = _text(summary.get("plan_name") or plan.name)
    trained = "trained" if plan.model.trainable == "all" else f"trained ({plan.model.trainable})"
    text = (
        f"# Model card: {name}\n\n"
        f"A classifier of single-cell images from bone marrow or blood, architecture "
        f"{_text(plan.model.arch)}, {trained} by {_labs_text(summary)} with federated learning "
        f"({_text(plan.strategy.name)}) by cytofed. No image left a lab."
    )
    if summary.get("partition"):
        text += " The labs are virtual: a simulation cut them from one collection of images."
    if summary["status"] != "completed":
        text += f"\n\n**The run is {_text(summary['status'])}**: not all labs or rounds are in it."
    return text


def _use() -> str:
    return (
        "## Intended use\n\n"
        "Research on the morphology of blood cells and on federated learning. **Not a medical "
        "device**: not for diagnosis, nor for any decision about a patient. Use inside a health "
        "institution falls under Regulation (EU) 2017/746 (IVDR), Article 5(5), and needs "
        "validation on that institution's own slides, stains and scanners."
    )


def _data(summary: Mapping[str, Any], plan: Plan) -> str:
    scale = plan.labels.scale
    lines = [
        "## Data",
        "",
        f"- Label scheme: {_text(plan.labels.scheme)}{_codes(plan)}",
        f"- Scale: {scale.size_px} x {scale.size_px} pixels showing {scale.field_um:g} um; other "
        "images must be brought to this scale first",
    ]
    partition = summary.get("partition") or {}
    if partition.get("train_counts_KC") and partition.get("labs"):
        counts = partition["train_counts_KC"]
        held = [sum(row[c] for row in counts) for c in range(len(partition["codes"]))]
        totals = dict(zip(partition["labs"], (sum(row) for row in counts), strict=True))
        lines.append(f"- Training images: {sum(held):,}")
        if len(totals) <= 30:
            each = ", ".join(f"{_text(lab)} {total:,}" for lab, total in totals.items())
            lines.append(f"- Per lab: {each}")
        pairs = sorted(zip(held, partition["codes"], strict=True), key=lambda p: (-p[0], p[1]))
        present = ", ".join(f"{_text(code)} {count:,}" for count, code in pairs if count)
        lines.append(f"- Per class: {present}")
        missing = ", ".join(_text(code) for count, code in pairs if not count)
        if missing:
            lines.append(f"- Never trained on, and not to be trusted: {missing}")
    if made_up(summary):
        lines.append("- The data names no patients; the simulation made pseudo-patients")
    return "\n".join(lines)


def _codes(plan: Plan) -> str:
    try:
        scheme = load_scheme(plan.labels.scheme)
    except InputError:  # a file of the machine that ran it
        return ""
    names = ", ".join(f"{_text(c)} {_text(scheme.names.get(c, ''))}".strip() for c in scheme.codes)
    return f" ({len(scheme.codes)} classes: {names})"


def _training(summary: Mapping[str, Any], plan: Plan) -> str:
    train = plan.train
    per_round = (
        f"local steps {train.steps_per_round}"
        if train.steps_per_round is not None
        else f"local epochs {train.local_epochs:g}"
    )
    batch = (
        f"batch {train.batch}"
        if train.steps_per_epoch is None
        else f"{train.steps_per_epoch} batches an epoch"
    )
    start = "random weights" if plan.model.start == "random" else _text(plan.model.start)
    seed = summary.get("seed", train.seed)
    drift = plan.privacy.noise_drift if plan.privacy.unit != "none" else None
    rate = f"learning rate {train.lr:g}"
    if drift is not None:
        rate = f"learning rate set by the noise (drift {drift:g})"
    absent = {
        "missing": "classes it has no image of",
        "declared": "classes its label map declares absent",
        "none": "no class",
    }[train.mask_absent]
    line = (summary.get("lineage") or {}).get("described")
    before = f"\n- Trained from: {_text(line)}" if line else ""
    return (
        "## Training\n\n"
        f"- {summary.get('rounds', 0)} of {train.rounds} rounds, {per_round}, "
        f"{batch}, {train.optimizer}, {rate}, seed {seed}\n"
        f"- Start: {start}; trained part: {plan.model.trainable}\n"
        f"- Class imbalance: {train.balance}; left out of a lab's loss: {absent}{before}"
    )


def _results(summary: Mapping[str, Any]) -> str:
    scores = summary.get("global")
    if not scores:
        return "## Results\n\nThis model was not evaluated."
    tolerant = scores.get("tolerant") or {}
    rows = [
        ("macro F1", scores.get("macro_f1")),
        ("macro F1, classes of fewer than 10 images left out", scores.get("macro_f1_without_tiny")),
        ("macro F1, tolerant", tolerant.get("macro_f1")),
        ("balanced accuracy", scores.get("balanced_accuracy")),
        ("accuracy", scores.get("accuracy")),
        ("weighted F1", scores.get("weighted_f1")),
        ("expected calibration error", scores.get("ece")),
        ("the same before the temperature", (scores.get("calibration") or {}).get("ece_before")),
        ("recall of blasts", (scores.get("blasts") or {}).get("recall")),
    ]
    baselines = summary.get("baselines") or {}
    if baselines.get("central"):
        central = baselines["central"]["macro_f1"]
        rows.append(("macro F1 of central training on all images, to compare", central))
    if baselines.get("local"):
        own = [s["macro_f1"] for s in baselines["local"].values()]
        rows.append(("macro F1 of labs' own models, mean, to compare", sum(own) / len(own)))
    if summary.get("labs"):
        worst = min(s["macro_f1"] for s in summary["labs"].values())
        rows.append(("macro F1 at the worst lab", worst))
    lines = ["## Results", ""]
    images = f" ({scores['images']:,})" if scores.get("images") else ""
    lines += [
        f"{_told(summary)}On held-out images{images} of the same labs. Macro: mean over classes "
        "with test images. Tolerant: a confusion of neighbouring maturation stages counts as right "
        "(Matek et al. 2021).",
        "",
        "| score | value |",
        "|---|---:|",
        *(f"| {name} | {value:.3f} |" for name, value in rows if value is not None),
    ]
    per_class = {c: s for c, s in (scores.get("per_class") or {}).items() if s["support"] > 0}
    if per_class:
        loose = tolerant.get("per_class") or {}
        lines += [
            "",
            "| class | images | precision | recall | F1 | tolerant precision | tolerant recall |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for code, s in sorted(per_class.items(), key=lambda item: (-item[1]["support"], item[0])):
            easy = loose.get(code)
            last = f"{easy['precision']:.2f} | {easy['recall']:.2f}" if easy else "– | –"
            lines.append(
                f"| {_text(code)} | {s['support']:,} | {s['precision']:.2f} | {s['recall']:.2f} "
                f"| {s['f1']:.2f} | {last} |"
            )
    return "\n".join(lines)


def _told(summary: Mapping[str, Any]) -> str:
    """Whether scores are exact or released, where a plan is private."""
    if (summary.get("privacy") or {}).get("unit", "none") == "none":
        return ""
    if (summary.get("scores") or {}).get("noised"):
        return "Released scores: computed from counts with noise, which chance moves. "
    text = "Exact scores, which a simulation may tell and a deployment does not. "
    released = summary.get("released") or {}
    if released.get("macro_f1") is not None:
        text += f"Released scores, with noise, give macro F1 {released['macro_f1']:.3f}. "
    return text


def _privacy(summary: Mapping[str, Any], plan: Plan) -> str:
    privacy = summary.get("privacy") or {}
    unit = privacy.get("unit", "none")
    anonymous = (
        "A trained model is not anonymous by itself (EDPB Opinion 28/2024): whether it is must be "
        "shown for each model, with attack tests among the evidence."
    )
    if unit == "none":
        return (
            "## Privacy\n\n"
            "**No privacy guarantee: this model is not differentially private.** Nothing bounds "
            f"what it says about a single patient of the training data. {anonymous}"
        )
    pseudo, who = made_up(summary), _text(whose_of(summary))
    sums = (
        "The coordinator saw sums of updates only; the guarantee does not rest on that."
        if (summary.get("wire") or {}).get("secure_aggregation")
        else "The coordinator saw each lab's update, after its noise."
    )
    overlap = (
        "Labs may know the same patient: for such a patient the epsilons of the labs add up"
        + (f", to {_epsilon(privacy['federation'])}." if privacy.get("federation") else ".")
        if plan.patients == "may_overlap"
        else "This assumes that no two labs hold images of the same patient."
    )
    evaluation = privacy.get("evaluation")
    whole = privacy.get("total") or privacy
    lines = [
        "## Privacy",
        "",
        f"**Differentially private: epsilon {_epsilon(whole)} at delta "
        f"{delta_told(summary)}, per {who}, add-or-remove.** {_text(holds_against(summary))} It "
        "bounds how much better they can tell whether one "
        f"{who} was in the training data; it does not hide what holds for many.",
        "",
        f"- Noise at each lab: {_number(privacy.get('sigma'))} times the clipping norm, "
        f"{_number(privacy.get('steps'))} steps, sampling rate "
        f"{_number(privacy.get('sampling_rate'))}",
        f"- {overlap}",
        f"- {sums}",
    ]
    if evaluation:
        lines.append(
            f"- That is for training and for {_number(evaluation.get('releases'))} releases of "
            f"noised scores; training alone: epsilon {_epsilon(privacy)}"
        )
    if str(privacy.get("noise", "")).startswith("seeded"):
        lines.append(
            "- The noise of this simulation is seeded: whoever knows the seed can take it off, so "
            "this very model protects nobody. The epsilon is that of the same plan in a deployment"
        )
    if unit == "image":
        lines.append("- The unit is one image: a patient with many images is protected far less")
    if pseudo:
        lines.append("- Pseudo-patients are made-up groups of images: no real person is protected")
    return "\n".join([*lines, "", anonymous])


def holds_against(summary: Mapping[str, Any]) -> str:
    """Against whom the run's guarantee holds, which depends on what the model was trained from."""
    updates = "It holds against whoever sees a lab's updates"
    line = summary.get("lineage") or {"sole": True}
    if line["sole"]:
        return f"{updates} or this model: the coordinator, other labs, users of the model."
    return (
        f"{updates} of this run: the coordinator, other labs. The model was trained before: "
        f"against its users, for a {whose_of(summary)} of all its trainings: "
        f"{line['whole']['statement']}."
    )


def delta_told(summary: Mapping[str, Any]) -> str:
    """Delta of a run, and what it comes to over all patients."""
    privacy = summary.get("privacy") or {}
    delta, patients = privacy.get("delta"), privacy.get("patients")
    if not delta or not patients:
        return _number(delta)
    return f"{_number(delta)} (x {patients:,} {whose_of(summary)}s: {delta * patients:.2g})"


def _limits(summary: Mapping[str, Any], plan: Plan) -> str:
    lines = [
        "Other stains, scanners or scales lower the scores, often by much; test on own slides "
        "first.",
        "Any image gets one of the classes, also one that shows none of them.",
        "Confidence is not calibrated for other labs than those it was tested at.",
        "Age, sex, ancestry and disease of the patients are not known to this card: no claim is "
        "made for any group.",
    ]
    per_class = (summary.get("global") or {}).get("per_class") or {}
    tiny = sorted(c for c, s in per_class.items() if 0 < s["support"] < 10)
    if tiny:
        classes = ", ".join(_text(c) for c in tiny)
        lines.append(f"Scores of {classes} rest on fewer than 10 test images each.")
    untested = sorted(c for c, s in per_class.items() if s["support"] == 0)
    if untested:
        lines.append(f"Not tested at all: {', '.join(_text(c) for c in untested)}.")
    if made_up(summary) or (summary.get("partition") and plan.privacy.unit == "none"):
        lines.append(
            "Where the data names no patients, images of one patient can be on both sides of the "
            "test split: scores on new patients are lower."
        )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _identity(summary: Mapping[str, Any], plan: Plan) -> str:
    lines = [
        f"- Weights, SHA-256: `{_code(summary['weights_sha256'])}`",
        f"- Plan, SHA-256: `{_code(summary.get('plan_sha256') or plan.sha256)}`",
    ]
    lines += [
        f"- {_text(name)}: {_text(version)}"
        for name, version in (summary.get("versions") or {}).items()
    ]
    lines += ["", "## Licence and attribution", ""]
    lines.append(
        "The terms of the training images bind the use of this model. cytofed itself is under "
        "Apache-2.0."
    )
    lines.append("")
    sources = [_text(source) for source in summary.get("attribution") or []]
    if plan.labels.scheme == "bone-marrow-21":
        sources.append(
            f"Classes and tolerated pairs: {_MATEK}. Its images (TCIA, doi:10.7937/TCIA.AXH3-T579) "
            "are under CC BY 4.0: a model trained on them is to name them"
        )
    lines += [f"- {source}" for source in sources]
    return "## Identity\n\n" + "\n".join(lines).rstrip()


def _labs_text(summary: Mapping[str, Any]) -> str:
    labs = set((summary.get("partition") or {}).get("labs") or [])
    for entry in summary.get("participation") or []:
        labs.update(entry.get("expected") or [])
    labs = labs or set(summary.get("labs") or [])
    return f"{len(labs):,} lab{'s' if len(labs) != 1 else ''}" if labs else "labs"


def _epsilon(guarantee: Mapping[str, Any]) -> str:
    """Two decimals, rounded up: a printed epsilon must not be below the true one."""
    epsilon = guarantee.get("epsilon")
    return "–" if epsilon is None else f"{math.ceil(epsilon * 100 - 1e-9) / 100:.2f}"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–"


def _text(value: object) -> str:
    """Text as Markdown that shows it unchanged, on one line."""
    return markdown(value, most=_MOST_CHARS)


def _code(value: object) -> str:
    return re.sub(r"[^0-9A-Za-z]", "", str(value))
