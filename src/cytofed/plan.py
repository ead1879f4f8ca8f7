"""The plan: what a federation trains, with whom, and at what price in privacy.

One YAML file serves simulation and deployment (design: one way for data). Every key has a
default; an unknown key is an error that names the nearest one. A plan is a value: sections are
frozen dataclasses, ``sha256`` identifies it, and any change is another plan.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from cytofed.encoder import is_shipped, sha256_of, start_file
from cytofed.errors import InputError
from cytofed.sections import build, check_words, convert, read_tree, shown
from cytofed.strict import NotYaml, read_yaml

Unit = Literal["patient", "image", "none"]
SMALLEST_DELTA = 1e-12
"""of a plan: far below one over all patients there are"""

MOST_WIDTH = 1024
"""of a net whose width a plan chooses"""

PROTECTING = ("privacy", "secure_aggregation")
"""sections that are never empty: a person who wrote their names meant them to protect"""


@dataclass(frozen=True)
class Scale:
    """Pixels of an input image and the field of view that they show."""

    size_px: int = 64
    field_um: float = 21.6


@dataclass(frozen=True)
class Labels:
    """The label scheme that all labs' labels are mapped to."""

    scheme: str = "bone-marrow-21"
    scale: Scale = field(default_factory=Scale)


@dataclass(frozen=True)
class Model:
    """Architecture, start (``random``, an encoder that ships, or a file) and what is trained."""

    arch: Literal[
        "cytonet", "stagenet", "resnet18", "resnet50", "resnext50_32x4d", "encoder+head"
    ] = "cytonet"
    start: str = "random"
    trainable: Literal["all", "head", "norms"] = "all"
    width: int = 32
    views: Literal[1, 4, 8] = 1
    """forms of an image that predictions of the final model are means over: 4, turned by quarters,
    or 8, mirrored too. Earlier rounds are scored on the image as it is. A frozen encoder always
    sees all 8"""


@dataclass(frozen=True)
class Augment:
    """Random changes of a training image; each strength 0 switches its part off."""

    flip: bool = True
    rotate: bool = True
    shift: float = 0.1
    """largest shift, as a fraction of the frame"""
    scale: float = 0.1
    """largest relative change of size"""
    stain: float = 0.1
    """standard deviation of the gain per stain channel in optical density"""


@dataclass(frozen=True)
class Train:
    """Local training. ``steps_per_round`` replaces ``local_epochs`` where it is given, and
    ``steps_per_epoch`` replaces ``batch``."""

    rounds: int = 10
    local_epochs: float = 1.0
    steps_per_round: int | None = None
    batch: int = 32
    steps_per_epoch: int | None = None
    """every lab cuts its images into so many batches: labs of any size make as many steps, and a
    step of the cohort sees the same share of all images however many labs hold them"""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float = 2e-3
    momentum: float = 0.9
    """SGD's momentum, AdamW's first decay rate"""
    weight_decay: float = 0.01
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: float = 0.05
    """fraction of all training during which the rate rises from 0"""
    balance: Literal["none", "sampler", "weights", "logits"] = "none"
    """against class imbalance: balanced draws, loss weights, or logits adjusted by the prior"""
    class_prior: Mapping[str, float] | None = None
    """public frequency of classes by code, in any unit, for ``balance: logits``; left out: each
    lab's own counts, which differential privacy forbids"""
    mask_absent: Literal["missing", "declared", "none"] = "missing"
    """what takes no part in a lab's loss: classes it has no training image of, or those that its
    label map declares absent (under differential privacy never more), or none"""
    label_smoothing: float = 0.0
    ema: float = 0.0
    """decay per step of an average of the local weights; 0 sends the last weights"""
    augment: Augment = field(default_factory=Augment)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    threads: int = 1
    seed: int = 0


@dataclass(frozen=True)
class StrategySpec:
    """A strategy by name; ``options`` are the arguments of its function in cytofed.strategies."""

    name: str = "fedavg"
    options: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Privacy:
    """Differential privacy of training. Of ``epsilon`` and ``sigma`` one is given."""

    unit: Unit = "none"
    epsilon: float | None = None
    sigma: float | None = None
    delta: float | None = None
    """left out: min(1e-5, 1/(10 N)) of the N patients whom all labs together declare; a run's plan
    has it as a number"""
    max_norm: float = 1.0
    sampling_rate: float = 0.25
    cells_per_patient: int = 16
    declared_patients: int | Mapping[str, int] | None = None
    multiplicity: int = 1
    """augmented copies of each cell inside one patient's gradient (De et al. 2022)"""
    noise_drift: float | None = None
    """standard deviation of what all the noise of a lab adds to a weight over the plan. Given, it
    sets the learning rate in place of ``train.lr``: one rate can't suit every epsilon and number
    of patients, and trying rates on private images has a price"""


@dataclass(frozen=True)
class SecureAggregation:
    """The coordinator sees sums only. ``threshold`` left out: floor(2n/3)+1."""

    enabled: bool = False
    threshold: int | None = None
    min_cohort: int = 3
    bits: Literal[32, 16] = 32
    range: float = 1.0
    """largest absolute value of an update's coordinate; larger ones are clamped"""
    control_range: float = 16.0
    """the same for parts that are gradients (control variates)"""


@dataclass(frozen=True)
class Cohort:
    """How many labs a round needs and how long anything waits."""

    min_labs: int = 1
    approval_days: float = 14.0
    wait_s: float = 600.0
    round_timeout_s: float = 3600.0


@dataclass(frozen=True)
class Evaluation:
    """Held-out evaluation.

    ``per_lab`` left out: on, but for differential privacy and secure aggregation. ``sigma`` is
    the noise on scores under differential privacy; without it a deployment tells none.
    """

    fraction: float = 0.2
    fold: int = 0
    """which of the 1/fraction disjoint parts is held out, from 0: for cross-validation"""
    calibration: float = 0.0
    """fraction of what is not held out that is kept for the temperature of the released model"""
    every: int | None = None
    """rounds from one evaluation to the next; left out: so many that a run has some 20"""
    per_lab: bool | None = None
    sigma: float | None = None


@dataclass(frozen=True)
class Population:
    """Failures that a simulation plays, per round and seed."""

    dropout: float = 0.0
    stragglers: float = 0.0
    nan_labs: int = 0


@dataclass(frozen=True)
class Simulation:
    """Read by ``cytofed simulate`` only; no part of the plan's hash."""

    labs: int | None = None
    """left out: one per folder or value for ``sources`` and ``column``, else 4"""
    partition: str = "iid"
    baselines: bool | Literal["central"] = False
    """whether training in one place and each lab alone run too, or the first only"""
    baseline_train: Mapping[str, bool | int | float | str | None] | None = None
    """keys of ``train`` by which the baselines train instead: what suits a federation best is not
    what suits one place best, and a federation is as good as its strongest rival"""
    population: Population = field(default_factory=Population)
    pseudo_patient_cells: int = 20


@dataclass(frozen=True)
class Plan:
    """See the module. ``patients`` says whether one patient may be known to two labs."""

    name: str = "plan"
    patients: Literal["disjoint", "may_overlap"] = "disjoint"
    labels: Labels = field(default_factory=Labels)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    strategy: StrategySpec = field(default_factory=StrategySpec)
    privacy: Privacy = field(default_factory=Privacy)
    secure_aggregation: SecureAggregation = field(default_factory=SecureAggregation)
    cohort: Cohort = field(default_factory=Cohort)
    evaluation: Evaluation = field(default_factory=Evaluation)
    simulation: Simulation = field(default_factory=Simulation)

    @property
    def evaluated_every(self) -> int:
        """Rounds from one evaluation to the next; the last round has one in any case."""
        return self.evaluation.every or max(1, round(self.train.rounds / 20))

    def scores_after(self, round_: int) -> bool:
        """Whether the model of a round is evaluated."""
        return round_ % self.evaluated_every == 0 or round_ == self.train.rounds

    @property
    def reports_per_lab(self) -> bool:
        """Whether scores of single labs are told: by default where nothing protects them."""
        told = self.evaluation.per_lab
        if told is None:
            return self.privacy.unit == "none" and not self.secure_aggregation.enabled
        return told

    @property
    def releases_scores(self) -> bool:
        """Whether labs answer orders to evaluate: under differential privacy for a price only."""
        return self.privacy.unit == "none" or self.evaluation.sigma is not None

    @cached_property
    def sha256(self) -> str:
        """Hex SHA-256 of the canonical JSON of all but ``simulation``, defaults included.

        Of a start encoder that ships it has the content too: a name says not which version.
        """
        shared = {k: v for k, v in to_dict(self).items() if k != "simulation"}
        if is_shipped(self.model.start):
            shared["start_sha256"] = sha256_of(start_file(self.model.start))
        canonical = json.dumps(shared, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


PRIVATE_DEFAULTS: Mapping[str, Any] = {
    "train": {"rounds": 10, "local_epochs": 0.5, "optimizer": "sgd", "lr": 0.3, "warmup": 0.0},
    "evaluation": {"calibration": 0.0},
}
"""what ``load_plan`` takes under differential privacy where the user names nothing else: few
steps, since each costs noise on all, SGD, since Adam scales noise up to full steps, and no
temperature, which would be fitted to private images"""

PRIVATE_HEAD: Mapping[str, Any] = {
    "labels": {"scale": {"size_px": 64, "field_um": 21.6}},
    "model": {"arch": "encoder+head", "start": "blood-head", "trainable": "all"},
    "train": {"rounds": 20, "local_epochs": 2.0, "optimizer": "sgd", "lr": 0.3, "momentum": 0.0},
    "strategy": {"name": "fedavg"},
    "privacy": {"noise_drift": 0.09},
}
"""the same where no key of the model is named: a last layer on frozen features of public images
(Mehta et al. 2022, arXiv:2205.02973), which starts from what these images teach. A hundredth of
the weights get noise, so more steps pay. FedAvg: SCAFFOLD's control variates would carry the noise
of a round into the next, and a head hardly drifts"""

_RATE = frozenset({"lr", "optimizer", "momentum"})
"""keys of ``train``: who names one of them chooses the rate, so no ``noise_drift`` does"""


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as nested dicts of YAML's own types; ``from_dict`` takes it back."""
    tree = dataclasses.asdict(plan)
    tree["strategy"] = {"name": plan.strategy.name, **plan.strategy.options}
    return tree


def from_dict(tree: Mapping[str, Any], *, source: str = "plan") -> Plan:
    """A checked plan from nested dicts.

    Errors: InputError for an unknown key, a wrong type or a value out of bounds.
    """
    plan = build(Plan, tree, source, special={StrategySpec: _build_strategy})
    check_words(to_dict(plan), source)
    _check_values(plan)
    return plan


def load_plan(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """The plan of a YAML file or of a built-in name, with ``KEY=VALUE`` overrides applied.

    Under differential privacy, what neither the user's file nor an override names is as in
    ``PRIVATE_DEFAULTS``, and where no key of the model is named, ``PRIVATE_HEAD``: a built-in
    plan was tuned without noise. The start of a built-in plan belongs to its architecture: with
    another architecture or width it is random unless an override names it too.

    Errors: InputError when the file is missing, is no YAML, or does not make a plan.
    """
    text, source = _read(name_or_path)
    tree = read_tree(
        text,
        source,
        hint="see `cytofed plan show demo` for a plan with all its keys",
        never_empty=PROTECTING,
    )
    builtin = source.startswith(_BUILTIN)
    named = {text.partition("=")[0].strip() for text in overrides}
    if builtin and named & {"model.arch", "model.width"} and "model.start" not in named:
        tree = _merged(tree, {"model": {"start": "random"}})
    plan = _from_layers(tree, overrides, source)
    if plan.privacy.unit == "none":
        return plan
    own_model = (tree.get("model") and not builtin) or any(k.startswith("model.") for k in named)
    defaults = PRIVATE_DEFAULTS if own_model else _merged(PRIVATE_DEFAULTS, PRIVATE_HEAD)
    own_train = {} if builtin else tree.get("train") or {}
    if named & {f"train.{key}" for key in _RATE} or _RATE & set(own_train):
        defaults = _merged(defaults, {"privacy": {"noise_drift": None}})
    layers = (tree, defaults) if builtin else (defaults, tree)
    return _from_layers(_merged(*layers), overrides, source)


def with_baseline_train(plan: Plan) -> Plan:
    """The plan by which baselines train: ``simulation.baseline_train`` over its ``train``.

    Errors: InputError for what is no value of ``train``, or with differential privacy, whose
    price is that of the plan's own steps.
    """
    changed = plan.simulation.baseline_train
    if not changed:
        return plan
    if plan.privacy.unit != "none":
        raise InputError(
            "simulation.baseline_train is for plans without differential privacy, found "
            f"privacy.unit={plan.privacy.unit}",
            hint="leave it out: private baselines train as the plan does",
        )
    tree = to_dict(replace(plan, simulation=replace(plan.simulation, baseline_train=None)))
    tree["train"] |= changed
    try:
        return from_dict(tree)
    except InputError as error:
        raise InputError(f"simulation.baseline_train: {error.message}", hint=error.hint) from None


def with_overrides(plan: Plan, overrides: Sequence[str]) -> Plan:
    """The plan with ``KEY=VALUE`` overrides applied. Errors: InputError."""
    return _from_layers(to_dict(plan), overrides, f"plan {plan.name}")


def _from_layers(tree: Mapping[str, Any], overrides: Sequence[str], source: str) -> Plan:
    _refuse_twice(overrides)
    changed = copy.deepcopy(dict(tree))
    for override in overrides:
        _override(changed, override)
    for section in PROTECTING:
        if section in changed and not changed[section]:  # which would protect nobody
            raise InputError(
                f"{source}: {section} is empty", hint="write its keys under it, or leave it out"
            )
    return from_dict(changed, source=source)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, key by key; an empty section is no section."""
    merged = dict(below)
    for key, value in above.items():
        known = merged.get(key)
        if isinstance(known, Mapping) and (value is None or isinstance(value, Mapping)):
            value = _merged(known, value or {})
        merged[key] = value
    return merged


_BUILTIN = "built-in plan"


def builtin_plans() -> list[str]:
    """Names of the plans that ship in the package."""
    folder = resources.files("cytofed") / "plans"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name[0] != ".")


def dump_plan(plan: Plan) -> str:
    """The plan as YAML, all keys written out."""
    return yaml.safe_dump(to_dict(plan), sort_keys=False, allow_unicode=True)


def _read(name_or_path: str | Path) -> tuple[str, str]:
    path = Path(name_or_path)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read plan {path}: {error}") from None
    if str(name_or_path) in builtin_plans():
        text = (resources.files("cytofed") / "plans" / f"{name_or_path}.yaml").read_text("utf-8")
        return text, f"{_BUILTIN} {name_or_path}"
    raise InputError(
        f"no plan file {str(name_or_path)!r}",
        hint=f"give a YAML file or a built-in plan: {', '.join(builtin_plans())}",
    )


def _refuse_twice(overrides: Sequence[str]) -> None:
    """Each key is set once, and none together with its section, which would be set anew."""
    keys = [override.partition("=")[0].strip() for override in overrides]
    for number, key in enumerate(keys):
        for other in keys[:number]:
            if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
                raise InputError(
                    f"{key} is given twice" if key == other else f"{other} is set, and {key} too",
                    hint="by --set, or by a flag of the same meaning: leave one of them out",
                )


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(
            f"--set {override!r} is not KEY=VALUE", hint="for example --set train.rounds=20"
        )
    try:
        value = read_yaml(text, f"--set {override!r}")
    except NotYaml:
        value = text
    if value is None and text.strip().lower() not in ("null", "~"):
        raise InputError(
            f"--set {override!r} has no value", hint=f"for none at all: --set {key.strip()}=null"
        )
    node = tree
    *parents, last = key.strip().split(".")
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise InputError(f"--set {override!r}: {parent!r} has no keys below it")
    node[last] = value


def _build_strategy(tree: Mapping[str, Any], source: str) -> StrategySpec:
    options = {str(k): v for k, v in tree.items() if k != "name"}
    for key, value in options.items():
        if isinstance(value, Mapping):
            raise InputError(
                f"{source}: strategy.{key} is {shown(value)}, expected a number",
                hint="options stand beside the name: strategy.momentum=0.5",
            )
        options[key] = convert(float, value, f"strategy.{key}", source)
    name = convert(str, tree.get("name", "fedavg"), "strategy.name", source)
    return StrategySpec(name=name, options=options)


_MOST_DAYS, _MOST_WAIT_S = 366.0, 30 * 86400.0
"""that a run waits for approval, and for labs in one step of a round"""


def _bound(where: str, value: float | None, low: float, high: float = math.inf) -> None:
    if value is not None and not low <= value <= high:
        limit = f">= {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise InputError(f"Expected {where}={value:g} {limit}")


def _above_zero(where: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise InputError(f"Expected {where}={value:g} > 0")


def _check_values(plan: Plan) -> None:
    """Bounds of single values; what depends on the data is checked where the data is known."""
    train, privacy, simulation = plan.train, plan.privacy, plan.simulation
    if not re.fullmatch(r"\w[\w .-]{0,63}", plan.name):  # it names folders and is shown to people
        raise InputError(
            f"name is {shown(plan.name)}, expected up to 64 letters, digits, spaces, . _ or -"
        )
    _bound("labels.scale.size_px", plan.labels.scale.size_px, 16, 1024)
    _above_zero("labels.scale.field_um", plan.labels.scale.field_um)
    _bound("model.width", plan.model.width, 8, MOST_WIDTH)
    _bound("train.rounds", train.rounds, 1)
    _above_zero("train.local_epochs", train.local_epochs)
    _bound("train.local_epochs", train.local_epochs, 0, 1e5)
    _bound("train.steps_per_round", train.steps_per_round, 1)
    _bound("train.batch", train.batch, 1, 65_536)
    _bound("train.steps_per_epoch", train.steps_per_epoch, 1, 10_000_000)
    _above_zero("train.lr", train.lr)
    _bound("train.momentum", train.momentum, 0, 0.9999)
    _bound("train.weight_decay", train.weight_decay, 0)
    _bound("train.warmup", train.warmup, 0, 1)
    for code, share in (train.class_prior or {}).items():
        _above_zero(f"train.class_prior.{code}", share)
    _bound("train.label_smoothing", train.label_smoothing, 0, 0.9)
    _bound("train.ema", train.ema, 0, 0.99999)
    _bound("train.augment.shift", train.augment.shift, 0, 0.5)
    _bound("train.augment.scale", train.augment.scale, 0, 0.5)
    _bound("train.augment.stain", train.augment.stain, 0, 1)
    _bound("train.threads", train.threads, 1, 256)
    _bound("train.seed", train.seed, 0, 2**63 - 1)
    _check_device(train.device)
    _check_privacy(privacy)
    if privacy.unit != "none" and privacy.noise_drift is not None:
        _check_drift(train)
    _bound("secure_aggregation.threshold", plan.secure_aggregation.threshold, 2)
    _bound("secure_aggregation.min_cohort", plan.secure_aggregation.min_cohort, 3)
    _above_zero("secure_aggregation.range", plan.secure_aggregation.range)
    _above_zero("secure_aggregation.control_range", plan.secure_aggregation.control_range)
    _bound("cohort.min_labs", plan.cohort.min_labs, 1)
    _above_zero("cohort.approval_days", plan.cohort.approval_days)
    _bound("cohort.approval_days", plan.cohort.approval_days, 0, _MOST_DAYS)
    _above_zero("cohort.wait_s", plan.cohort.wait_s)
    _bound("cohort.wait_s", plan.cohort.wait_s, 0, _MOST_WAIT_S)
    _above_zero("cohort.round_timeout_s", plan.cohort.round_timeout_s)
    _bound("cohort.round_timeout_s", plan.cohort.round_timeout_s, 0, _MOST_WAIT_S)
    _bound("evaluation.fraction", plan.evaluation.fraction, 0, 0.9)
    _bound("evaluation.calibration", plan.evaluation.calibration, 0, 0.5)
    folds = int(1 / plan.evaluation.fraction + 1e-9) if plan.evaluation.fraction else 1
    _bound("evaluation.fold", plan.evaluation.fold, 0, folds - 1)
    _bound("evaluation.every", plan.evaluation.every, 1)
    _above_zero("evaluation.sigma", plan.evaluation.sigma)
    _bound("simulation.labs", simulation.labs, 1)
    _bound("simulation.population.dropout", simulation.population.dropout, 0, 1)
    _bound("simulation.population.stragglers", simulation.population.stragglers, 0, 1)
    _bound("simulation.population.nan_labs", simulation.population.nan_labs, 0)
    _bound("simulation.pseudo_patient_cells", simulation.pseudo_patient_cells, 1)
    with_baseline_train(plan)


def _check_device(device: str) -> None:
    kind, _, index = device.partition(":")
    if kind in ("auto", "cpu", "cuda", "mps") and (not index or index.isdigit()):
        return
    raise InputError(
        f"train.device is {device!r}, expected auto, cpu, cuda, cuda:N or mps",
        hint="auto takes a GPU where there is one",
    )


def _check_drift(train: Train) -> None:
    """``noise_drift`` is a sum over steps that are plain: each adds its rate times its noise."""
    if train.optimizer != "sgd" or train.momentum:
        raise InputError(
            f"privacy.noise_drift is for train.optimizer=sgd with train.momentum=0, found "
            f"{train.optimizer} with momentum {train.momentum:g}",
            hint="set train.momentum=0, or privacy.noise_drift=null to use train.lr",
        )


def _check_privacy(privacy: Privacy) -> None:
    _above_zero("privacy.epsilon", privacy.epsilon)
    _above_zero("privacy.sigma", privacy.sigma)
    _above_zero("privacy.max_norm", privacy.max_norm)
    _above_zero("privacy.sampling_rate", privacy.sampling_rate)
    _bound("privacy.sampling_rate", privacy.sampling_rate, 1e-6, 1)
    _bound("privacy.cells_per_patient", privacy.cells_per_patient, 1, 65_536)
    _bound("privacy.multiplicity", privacy.multiplicity, 1, 1024)
    _above_zero("privacy.noise_drift", privacy.noise_drift)
    # The smallest of any plan is the one at which a lab's ledger states everything.
    if privacy.delta is not None and not SMALLEST_DELTA <= privacy.delta < 1:
        raise InputError(f"Expected {SMALLEST_DELTA:g} <= privacy.delta={privacy.delta:g} < 1")
    if privacy.epsilon is not None and privacy.sigma is not None:
        raise InputError(
            f"privacy.epsilon={privacy.epsilon:g} and privacy.sigma={privacy.sigma:g} are both "
            "given; one follows from the other",
            hint="leave one of them out",
        )
    declared = privacy.declared_patients
    counts = list(declared.values()) if isinstance(declared, Mapping) else [declared]
    for count in counts:
        _bound("privacy.declared_patients", count, 1)


def with_seed(plan: Plan, seed: int) -> Plan:
    """The plan with another ``train.seed``."""
    return replace(plan, train=replace(plan.train, seed=seed))
