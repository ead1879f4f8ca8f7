"""What a lab knows of the model that a plan starts from.

The plan names the file by its hash. A lab knows again what came to it as a result, and from its own
approved plan, not from what the file says, what its patients paid for it. The rest of a model's
line is of other labs' patients. (Its ledger counts every use of its own patients in any case.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cytofed.documents import Offer
from cytofed.encoder import Given, sha256_of
from cytofed.errors import VerificationError
from cytofed.lineage import Lineage, Link, lineage_of, lineage_of_start, link_of
from cytofed.model_file import read_model
from cytofed.plan import Plan

MODEL_FILE = "model.safetensors"


@dataclass(frozen=True)
class Known:
    """The results that came to a lab. ``models``: their folder; ``offers``: by their id."""

    models: Path
    offers: Mapping[str, Offer]

    def files(self) -> dict[str, Offer]:
        """Model file -> the offer of the run that it came from."""
        found = {}
        for offer_sha256, offer in self.offers.items():
            file = self.models / offer_sha256 / MODEL_FILE
            if file.is_file():
                found[str(file)] = offer
        return found

    def own_links(self, plan: Plan) -> tuple[Link, ...]:
        """Runs in the line of a plan's start model that this lab took part in, oldest first."""
        given, links, files = Given.named(plan.model.start), list[Link](), self.files()
        by_hash = {sha256_of(Path(file)): offer for file, offer in files.items()} if given else {}
        while given is not None and (offer := by_hash.pop(given.sha256, None)) is not None:
            labs = len(offer.roster.members)
            earlier = link_of(offer.plan, run=offer.run, federation=offer.federation, labs=labs)
            links.insert(0, earlier)
            given = Given.named(offer.plan.model.start)
        return tuple(links)


def origin_told(plan: Plan, known: Known) -> str:
    """What a plan's price is not the whole of, for this lab's patients; empty where it is."""
    start = plan.model.start
    if Given.named(start) is None:
        line = lineage_of_start(start)
        return "" if line.begins != "unknown" else f"nobody knows what {start} was trained from"
    links = known.own_links(plan)
    if not links:
        return (
            "model.start is a model that never came here as a result: the price is of this plan's "
            "training alone, and says nothing of those whose images were in an earlier one"
        )
    line = Lineage("random", links=(*links, link_of(plan, run="of this plan", federation="-")))
    reasons = line.unbounded()
    whole = f"unbounded: {'; '.join(reasons)}" if reasons else str(line.whole())
    runs = ", ".join(link.run for link in links)
    return (
        f"model.start is the model of run {runs}, in which this lab took part: against who has the "
        f"model, its patients' privacy over all of them is {whole}"
    )


def refuse_disguised(plan: Plan, file: Path, known: Known) -> None:
    """Raises VerificationError for a start model of this lab's own patients that was not priced so.

    The same weights under another file's hash, or a file that names a plan which this lab approved.
    """
    counted = {link.plan_sha256 for link in known.own_links(plan)}
    own = {offer.plan.sha256 for offer in known.offers.values()}
    named = {link.plan_sha256 for link in lineage_of(file).links}
    found = (named & own) - counted
    tensors = _tensors_sha256(file)
    for other, offer in known.files().items():
        if offer.plan.sha256 not in counted and _tensors_sha256(Path(other)) == tensors:
            found.add(offer.plan.sha256)
    if found:
        raise VerificationError(
            f"the start model was trained by plan {min(found)[:12]}, in which this lab took part, "
            "and its file is not the one that came here: the price that was approved left it out",
            hint="ask for a plan that starts from the very file that this lab has as a result",
        )


def _tensors_sha256(file: Path) -> str:
    """Of names and values, whatever the metadata says."""
    arrays, _ = read_model(file)
    digest = hashlib.sha256()
    for name in sorted(arrays):
        data = np.ascontiguousarray(arrays[name]).tobytes()
        digest.update(f"{len(name)}:{name}:{len(data)}:".encode() + data)
    return digest.hexdigest()


def known_of(models: Path, offers: Iterable[Offer]) -> Known:
    """Errors: none; a folder that is not there holds nothing."""
    return Known(models, {offer.sha256: offer for offer in offers})
