"""The audit's part of a run's report, and its figures as files of their own.

All text and pictures come from ``audit.json``, which others may have written: text is escaped, and
a picture is shown only where it is a PNG in the page itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cytofed import figures
from cytofed.page import page
from cytofed.simulations import membership
from cytofed.simulations.attacks import matches, recognised
from cytofed.simulations.attacks import verdict as attacks_verdict
from cytofed.simulations.parts import CSS, drawing, number, scroll, section, table_of, warning_box
from cytofed.whose import whose

Json = Mapping[str, Any]

VERSION = 5
"""of audit.json; an older one is not shown"""

PRIVATE_PAGE = "private-attacks.html"
"""beside the report: all pictures of an audit; for the lab's eyes"""

_OF_PICTURES = ("inversion", "round", "seat")

PictureRow = tuple[str, list[str], *tuple[Sequence[str], ...]]
"""name, figures, and lines of pictures"""

_DATA_URI = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]+")


def audit_section(found: Json | None) -> str:
    """The section of an audit; empty where there is none."""
    if not found:
        return ""
    violations = int(found.get("violations") or 0)
    if violations:
        lead = warning_box(f"{violations} violations: do not rely on this run's epsilon.")
    else:
        lead = (
            "<p>No violation found. That is not a proof of privacy: an audit can refute a claim, "
            "and each lower bound says how much it could have refuted.</p>"
        )
    parts = [lead, _checks(found), _leaves(found), _controls(found.get("controls"))]
    attacks = found.get("attacks")
    if attacks:
        drawn = figures_of(found)
        parts += [
            _membership(attacks["membership"], drawn, private=found.get("unit") != "none"),
            _inversion(attacks["inversion"], drawn),
            _round(attacks["round"]),
            _seat(attacks["seat"]),
            _collusion(attacks["collusion"], drawn),
            f"<p>The pictures, of patients' images and rebuilt ones, are not on this page: they "
            f"are in <code>{PRIVATE_PAGE}</code> beside it, which only its owner can read.</p>",
        ]
    return section("Audit", "".join(parts))


def figures_of(found: Json) -> dict[str, Figure]:
    """The figures of an audit by name; none without attacks."""
    attacks = found.get("attacks")
    if not attacks:
        return {}
    drawn = {}
    told = attacks["membership"]
    if "missing" not in told:
        levels = {"image": "images", "patient": _patients(told)}
        drawn["membership"] = figures.membership_figure(
            {
                f"{name}, AUC {told[level]['auc']:.2f}": told[level]["curve"]
                for level, name in levels.items()
            },
            mark=told["false_alarms"],
        )
    collusion = attacks["collusion"]
    drawn["collusion"] = figures.collusion_figure(
        {
            "one image" if curve["cells"] == 1 else f"{curve['cells']} images": [
                (row["colluding"], row["likeness"]) for row in curve["rows"]
            ]
            for curve in collusion["curves"]
        },
        labs=collusion["labs"],
        threshold=collusion["threshold"],
        lying_from=collusion["lying_from"],
    )
    inversion = attacks["inversion"]
    sums = inversion["sums"]
    curves = {"images in the sum": "likeness", "other images": "held_out", "noised": "noised"}
    drawn["sums"] = figures.sums_figure(
        [row["images"] for row in sums],
        {name: [row[key] for row in sums] for name, key in curves.items()},
        recognisable=inversion["recognisable"],
    )
    return drawn


def write_figures(found: Json, folder: Path) -> None:
    """Each figure of an audit as SVG and PDF in ``folder``; none shows an image."""
    for name in _OF_PICTURES:  # of an older version
        for ending in ("svg", "pdf"):
            (folder / f"{name}.{ending}").unlink(missing_ok=True)
    for name, figure in figures_of(found).items():
        folder.mkdir(exist_ok=True)
        for ending in ("svg", "pdf"):
            figures.save(figure, folder / f"{name}.{ending}")


def _checks(found: Json) -> str:
    columns = ("claimed", "found", "verdict", "remark")
    rows = [[str(f.get(key) or "") for key in ("what", *columns)] for f in found["checks"]]
    table = scroll(table_of(["check", *columns], rows, texts=5, wrap=True))
    alarms = found.get("false_alarms")
    if not alarms:
        return table
    told = (
        f"<p>Of {number(alarms['audits'])} audits of a correct mechanism, "
        f"{number(alarms['steinke'])} (Steinke) and {number(alarms['gaussian'])} (Gaussian) "
        f"found a violation; at most {1 - alarms['confidence']:.0%} are promised.</p>"
    )
    return table + told


def _leaves(found: Json) -> str:
    if not found.get("leaves"):
        return ""
    columns = ("what", "found", "verdict", "remark")
    rows = [[str(f[key]) for key in columns] for f in found["leaves"]]
    head = ["besides weights", "told", "verdict", "what a reader learns"]
    return scroll(table_of(head, rows, texts=4, wrap=True))


def _controls(controls: Json | None) -> str:
    """Planted faults by checks; the reason of each catch in words below."""
    if not controls:
        return ""
    checks = [str(check) for check in controls["checks"]]
    rows, reasons = [], []
    for row in (controls["shipped"], *controls["faults"]):
        said = {check: row["checks"].get(check) for check in checks}
        marks = ["" if s is None else "caught" if s else "–" for s in said.values()]
        rows.append([str(row["fault"]), *marks])
        first = next((text for text in said.values() if text), "")
        reasons.append([str(row["fault"]), first or "nothing found"])
    caught = sum(bool(row["caught"]) for row in controls["faults"])
    lead = f"Controls: {caught} of {len(controls['faults'])} planted faults caught."
    table = scroll(table_of(["planted fault", *checks], rows, texts=1 + len(checks)))
    why = scroll(table_of(["", "the first check that catches it"], reasons, texts=2, wrap=True))
    details = f"<details><summary>What the checks say</summary>{why}</details>"
    return f"<p>{escape(lead)}</p>{table}{details}"


# --- attacks


def _membership(found: Json, drawn: Mapping[str, Figure], *, private: bool) -> str:
    title = "<h3>Who was trained on?</h3>"
    if "missing" in found:
        return f"{title}<p>{escape(str(found['missing']))}</p>"
    lead = (
        f"{found['attack']} on the released model, with {found['shadows']} shadow models that are "
        f"cheaper than the run: {'; '.join(map(str, found['reduced']))}. Members are images that "
        "labs trained on, the others held-out images. A weak attack is no evidence of privacy."
    )
    rows = []
    for level, name in (("image", "images"), ("patient", _patients(found))):
        part = found[level]
        low, high = part["interval"]
        verdict = membership.verdict(part, private=private)
        figures_ = (f"{part['auc']:.3f}", f"{low:.2f} to {high:.2f}", f"{part['found']:.1%}")
        rows.append([name, verdict, *figures_, number(part["members"]), number(part["others"])])
    at = f"found at {found['false_alarms']:.0%} false alarms"
    head = ["", "verdict", "AUC", f"{found['confidence']:.0%}", at, "members", "others"]
    caption = "Share of members found against false alarms; on the diagonal there is nothing."
    curve = drawing(drawn["membership"], "membership", "ROC of membership inference", caption)
    return f"{title}<p>{escape(lead)}</p>{scroll(table_of(head, rows, texts=2, wrap=True))}{curve}"


def _patients(found: Json) -> str:
    return whose("patient", pseudo=found["pseudo_patients"]) + "s"


def _inversion(found: Json, drawn: Mapping[str, Figure]) -> str:
    """Images before and after, and how many images hide each other in a sum."""
    rows: list[PictureRow] = [("the image", ["", ""], found.get("images", ()))]
    for way in found["ways"]:
        values = [f"{way['likeness']:.2f}", f"{way['recognised']:.0%}"]
        rows.append((way["way"], values, way.get("pictures", ())))
    lead = (
        "What each protection is for: an update of one step on one image, of a small net whose "
        f"first layer sees pixels, at max_norm {number(found['max_norm'])} and sigma "
        f"{number(found['sigma'])}. Likeness is the correlation of what sets an image apart from "
        "the mean of all, of the best of 65 pictures that an attacker gets; from "
        f"{number(found['recognisable'])} on a cell is recognised. Clipping scales and hides "
        "nothing, noise hides."
    )
    table = _pictures(["", "likeness", "recognised", ""], rows)
    head = ["images in the sum", "likeness", "of other images", "recognised", "noised"]
    sums = table_of(
        head,
        [
            [
                number(row["images"]),
                f"{row['likeness']:.2f}",
                f"{row['held_out']:.2f}",
                f"{row['recognised']:.0%}",
                f"{row['noised']:.2f}",
            ]
            for row in found["sums"]
        ],
        texts=0,
    )
    caption = (
        "A sum of such updates: secure aggregation hides whose an image is. What it is, only other "
        "images hide, and noise."
    )
    curve = drawing(drawn["sums"], "sums", "likeness against images in a sum", caption)
    return (
        f"<h3>Images from updates</h3><p>{escape(lead)}</p>{table}"
        f'<div class="grid">{curve}<div>{scroll(sums)}</div></div>'
    )


def _round(found: Json) -> str:
    """What the run's own first round shows of its images."""
    title = "<h3>What round 1 shows of its images</h3>"
    if "missing" in found:
        return f"{title}<p>Not replayed: {escape(str(found['missing']))}.</p>"
    rows: list[list[str]] = []
    pictures: list[PictureRow] = []
    for row in found["rows"]:
        name = row["way"] + (" (this plan)" if row["of_plan"] else "")
        low, high = row["interval"]
        rows.append(
            [
                name,
                attacks_verdict(row),
                f"{row['likeness']:.2f}",
                f"{row['held_out']:.2f}",
                f"{number(row['recognised'])} of {number(row['images'])}",
                f"{number(row['recognised_held_out'])} of {number(row['images_held_out'])}",
                f"{row['auc']:.3f}",
                f"{low:.2f} to {high:.2f}",
            ]
        )
        pictures.append((name, [], row.get("pictures", ()), row.get("nearest", ())))
    changed = "".join(f"; {text}" for text in found["changed"])
    lead = (
        f"Round 1 of this run again: {found['labs']} labs, {number(found['images'])} images, "
        f"{number(round(found['steps']))} steps a lab, the plan's own batches, steps, optimizer, "
        "augmentation and fixed-point sum. Only the net is another: its first layer sees pixels, "
        f"so it hides less than convolutions do{changed}. Each of its pictures is held against "
        "every image as training saw it, and against held-out images of the same labs. "
        f"Recognised: a likeness of {number(found['recognisable'])} or more to a picture that "
        f"leaves at most {found['apart']:.0%} as much of the cell unexplained as of any held-out "
        "image. The same rule on held-out images tells what chance does. AUC: how well likeness "
        "tells the two apart; .5 is not at all."
    )
    head = ["what is sent", "what it shows", "best likeness", "of held-out", "recognised"]
    head += ["of held-out", "AUC"]
    head.append(f"{found['confidence']:.0%}")
    table = scroll(table_of(head, rows, texts=2, wrap=True))
    shown = ""
    if any(any(row[2:]) for row in pictures):
        shown = _pictures(["", "likest pictures, each above the image trained on"], pictures)
    return f"{title}<p>{escape(lead)}</p>{table}{shown}"


def _seat(found: Json) -> str:
    rows: list[PictureRow] = [("the image", ["", "", "", ""], found.get("images", ()))]
    for row in found["rows"]:
        shares = [f"{row[key]:.0%}" for key in ("recognised", "matched", "took_part")]
        rows.append((_place(row), [f"{row['likeness']:.2f}", *shares], row.get("pictures", ())))
    lead = (
        "The worst case for a lab: an update of one step on one image, sent by the code that "
        f"ships. Matched: how often the lab's image is first of {number(found['candidates'])} "
        "that the attacker has already; took part: how often the first is of any lab in what is "
        "held. Secure aggregation hides whose an image is, and a sum of few single images does not "
        "hide the images: that takes noise, or many images behind each update."
    )
    head = ["the coordinator holds", "likeness", "recognised", "matched", "took part", ""]
    table = _pictures(head, rows)
    return f"<h3>What the coordinator's seat shows</h3><p>{escape(lead)}</p>{table}"


def _place(row: Json) -> str:
    return f"{row['way']}: {row['holds']}"


def _collusion(found: Json, drawn: Mapping[str, Figure]) -> str:
    one, several = found["curves"]
    rows = []
    for row, other in zip(one["rows"], several["rows"], strict=True):
        left = "its own update" if row["opened"] else f"the sum of {row['left']} labs"
        likeness = [f"{row['likeness']:.2f}", f"{other['likeness']:.2f}"]
        told = [matches(row), recognised(row)]
        rows.append([str(row["colluding"]), left, *told, f"{row['cosine']:.2f}", *likeness])
    head = ["labs that collude", "left of a lab", "", "one image", "cosine", "likeness"]
    head.append(f"with {several['cells']} images")
    lead = (
        f"Of {found['labs']} labs some tell the coordinator their own updates and the shares that "
        f"they keep: what is left hides among the others until {found['threshold']} labs' shares "
        f"open a lab's upload. A coordinator that also lies about who is alive needs "
        f"{found['lying_from']}; that is not played here."
    )
    caption = "Likeness of the best picture of a lab's image against the labs that collude."
    curve = drawing(drawn["collusion"], "collusion", "likeness against colluding labs", caption)
    table = scroll(table_of(head, rows, texts=4, wrap=True))
    return f"<h3>Collusion</h3><p>{escape(lead)}</p>{curve}{table}"


def _pictures(head: Sequence[str], rows: Sequence[PictureRow]) -> str:
    """A table whose last column shows pictures, one line of them or several; without any, the
    table alone."""

    def line(pictures: Sequence[str]) -> str:
        return "".join(
            f'<img src="{uri}" alt="" width="72" height="72">'
            for uri in map(str, pictures)
            if _DATA_URI.fullmatch(uri)
        )

    told = [(name, values, "<br>".join(map(line, lines))) for name, values, *lines in rows]
    if not any(shown for _, _, shown in told):
        head = head[:-1]
        told = [(name, values, "") for name, values, _ in told if any(values)]
    top = "".join(f"<th scope=col>{escape(text)}</th>" for text in head)
    body = "".join(
        f"<tr><th scope=row>{escape(name)}</th>"
        + "".join(f"<td class=num>{escape(value)}</td>" for value in values)
        + (f"<td>{shown}</td>" if len(head) > 1 + len(values) else "")
        + "</tr>"
        for name, values, shown in told
    )
    return scroll(f'<table class="examples wrap"><thead><tr>{top}</tr></thead>{body}</table>')


# --- pictures of patients


def without_pictures(found: Any) -> Any:
    """The same without a single picture: what may be read by others."""
    if isinstance(found, Mapping):
        return {k: without_pictures(v) for k, v in found.items() if not _is_pictures(v)}
    if isinstance(found, list):
        return [without_pictures(item) for item in found if not _is_pictures(item)]
    return found


def _is_pictures(value: Any) -> bool:
    """A picture as data URI, or a list of them."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_pictures, value))
    return isinstance(value, str) and value.startswith("data:")


def private_page(attacks: Json) -> str:
    """Images of patients, and what the attacks made of them, as a page of its own."""
    drawn = figures_of({"attacks": attacks})
    parts = [
        warning_box(
            "This page shows images of patients, and pictures rebuilt from updates that show "
            "patients too. Do not publish it and do not pass it on."
        ),
        _inversion(attacks["inversion"], drawn),
        _round(attacks["round"]),
        _seat(attacks["seat"]),
    ]
    return page(
        title="private: images from attacks",
        heading="Images from attacks: private",
        headline="",
        sections=section("Attacks", "".join(parts)),
        css=CSS,
        footer="Made by cytofed. Not to be published.",
    )
