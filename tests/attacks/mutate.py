"""Proof that the attack tests need the guards, and that every guard has an attack test.

Guards are marked in the source by a trailing comment ``# guard: NAME`` on an ``if``, a ``raise`` or
a call. For each, this script loads the modules with that one guard taken out (the ``if`` never
true, the ``raise`` or call gone) and runs every attack test that names it: each must fail, and at
the edges (``ALONE``) because the attack went through. Run it as ``python tests/attacks/mutate.py``;
``make test-faults`` does so too.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, ModuleType

REPO = Path(__file__).resolve().parents[2]
# In the order in which they import each other.
MODULES = (
    "cytofed.privacy.wire",
    "cytofed.privacy.identity",
    "cytofed.privacy.sealing",
    "cytofed.privacy.masks",
    "cytofed.privacy.encoding",
    "cytofed.privacy.shares",
    "cytofed.privacy.secagg",
    "cytofed.privacy.secagg_lab",
    "cytofed.privacy.secagg_coordinator",
    "cytofed.secure_round",
    "cytofed.client.orders",
    "cytofed.client.secure",
)
ALONE = {
    "cytofed.messages": ("tests.attacks.test_content_lies",),
    "cytofed.objects": ("tests.attacks.test_object_lies",),
    "cytofed.server.fleet": ("tests.attacks.test_fleet_lies",),
    "cytofed.server.secure": ("tests.attacks.test_answer_lies",),
    "cytofed.server.sealed_grid": ("tests.attacks.boundary", "tests.attacks.test_answer_lies"),
    "cytofed.client.opening": ("tests.attacks.test_lab_lies",),
    "cytofed.client.daemon": ("tests.attacks.boundary", "tests.attacks.test_lab_lies"),
}
"""Modules at the edges, each loaded anew by itself, and who is loaded after it: its tests last."""

STAGE = "tests.attacks.stage"
TESTS = (
    "tests.attacks.test_setup_lies",
    "tests.attacks.test_round_lies",
    "tests.attacks.test_message_lies",
    "tests.attacks.test_order_lies",
)
_GUARD = re.compile(r"# guard: ([a-z0-9-]+)")


def source_of(name: str) -> Path:
    if name.startswith("tests."):
        return REPO / Path(*name.split(".")).with_suffix(".py")
    *room, leaf = name.split(".")[1:]
    return REPO.joinpath(*(room or ("src", "cytofed")), f"{leaf}.py")


def guards_of(name: str) -> dict[str, int]:
    """Guard names in a module and their lines."""
    found: dict[str, int] = {}
    for number, line in enumerate(source_of(name).read_text().splitlines(), start=1):
        for guard in _GUARD.findall(line):
            if guard in found:
                raise SystemExit(f"guard {guard} is marked twice in {name}")
            found[guard] = number
    return found


class Remover(ast.NodeTransformer):
    """Takes out the statement whose guard comment stands on ``line``."""

    def __init__(self, line: int) -> None:
        self.line = line
        self.removed = 0

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        if node.lineno <= self.line < node.body[0].lineno:
            self.removed += 1
            node.test = ast.copy_location(ast.Constant(False), node.test)
        return node

    def _drop(self, node: ast.stmt) -> ast.AST:
        if node.lineno <= self.line <= (node.end_lineno or node.lineno):
            self.removed += 1
            return ast.copy_location(ast.Pass(), node)
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return self._drop(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return self._drop(node)


def compiled(name: str, line: int | None = None) -> CodeType:
    """A module's code, with the guard on ``line`` taken out if one is given."""
    path = source_of(name)
    tree = ast.parse(path.read_text())
    if line is not None:
        remover = Remover(line)
        remover.generic_visit(tree)
        ast.fix_missing_locations(tree)
        if remover.removed != 1:
            raise SystemExit(f"{path.name}:{line}: {remover.removed} statements bear this guard")
    return compile(tree, str(path), "exec")


@contextmanager
def loaded(codes: dict[str, CodeType]) -> Iterator[list[ModuleType]]:
    """Fresh modules from ``codes`` in place of the real ones, in order."""
    before = {name: sys.modules.get(name) for name in codes}
    fresh = []
    try:
        for name, code in codes.items():
            module = ModuleType(name)
            module.__file__ = str(source_of(name))
            _install(name, module)
            exec(code, module.__dict__)
            fresh.append(module)
        yield fresh
    finally:
        for name, old in before.items():
            _install(name, old)


def _install(name: str, module: ModuleType | None) -> None:
    parent, _, leaf = name.rpartition(".")
    if module is None:
        sys.modules.pop(name, None)
        return
    sys.modules[name] = module
    if parent in sys.modules:  # "from package import module" looks at the package first
        setattr(sys.modules[parent], leaf, module)


def attacks_in(modules: list[ModuleType]) -> Iterator[tuple[Callable[[], None], tuple[str, ...]]]:
    """The tests of ``modules`` and the guards that each names."""
    tests = {*TESTS, *(names[-1] for names in ALONE.values())}
    for module in modules:
        for name, test in sorted(vars(module).items()):
            if name.startswith("test_") and module.__name__ in tests:
                yield test, getattr(test, "guards", ())


def fails(test: Callable[[], None]) -> str:
    """Why; empty where the test passes."""
    try:
        test()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # pytest.fail is no Exception
        return f"{type(error).__name__}: {error}"
    return ""


def succeeds(failure: str) -> bool:
    """Whether a test failed because nothing was refused, and not over something else."""
    other_refusal = "pattern did not match" in failure
    asserted = failure.startswith("AssertionError") and not other_refusal
    return asserted or "DID NOT RAISE" in failure


def survivors_alone() -> tuple[list[str], int, list[str]]:
    """As ``survivors``, of the modules at the edges: there the attack itself must go through."""
    wrong: list[str] = []
    guards: set[str] = set()
    tried: list[str] = []
    for name, after in ALONE.items():
        importlib.import_module(name)
        marked = guards_of(name)
        codes = {each: compiled(each) for each in (name, *after)}
        with loaded(codes) as modules:
            tests = list(attacks_in(modules))
            mine = [test for test, wanted in tests if set(wanted) & set(marked)]
            wrong += [
                f"{test.__name__} fails as it is: {why}" for test in mine if (why := fails(test))
            ]
        named = {guard for _, wanted in tests for guard in wanted}
        wrong += [f"guard {guard} has no attack test" for guard in sorted(set(marked) - named)]
        for guard, line in marked.items():
            if guard in guards:
                raise SystemExit(f"guard {guard} is marked twice")
            guards.add(guard)
            with loaded({**codes, name: compiled(name, line)}) as modules:
                for test, wanted in attacks_in(modules):
                    if guard in wanted:
                        why = fails(test)
                        tried.append(why)
                        if not succeeds(why):
                            told = why or "it passes"
                            wrong.append(f"{test.__name__} without the guard {guard}: {told}")
    return wrong, len(guards), tried


def survivors() -> tuple[list[str], int, list[str]]:
    """What disproves the suite, as lines; how many guards there are; why mutated tests failed."""
    for name in MODULES:
        importlib.import_module(name)
    names = [*MODULES, STAGE, *TESTS]
    codes = {name: compiled(name) for name in names}
    guards = {}
    for name in names[: len(MODULES)]:
        for guard, line in guards_of(name).items():
            if guard in guards:
                raise SystemExit(f"guard {guard} is marked twice")
            guards[guard] = (name, line)
    wrong = []
    with loaded(codes) as modules:
        tests = list(attacks_in(modules))
        wrong += [f"{test.__name__} fails as it is" for test, _ in tests if fails(test)]
    named = {guard for _, wanted in tests for guard in wanted}
    wrong += [f"guard {guard} has no attack test" for guard in sorted(set(guards) - named)]
    wrong += [f"guard {guard} is in no source" for guard in sorted(named - set(guards))]
    tried: list[str] = []
    for guard, (name, line) in guards.items():
        with loaded({**codes, name: compiled(name, line)}) as modules:
            for test, wanted in attacks_in(modules):
                if guard in wanted:
                    tried.append(fails(test))
                    if not tried[-1]:
                        wrong.append(f"{test.__name__} passes without the guard {guard}")
    return wrong, len(guards), tried


def main() -> int:
    sys.path.insert(0, str(REPO))
    edges, core = survivors_alone(), survivors()
    wrong, guards, tried = edges[0] + core[0], edges[1] + core[1], edges[2] + core[2]
    through = sum(map(succeeds, tried))
    told = f"{guards} guards removed one by one, {len(tried)} attack tests failed"
    told += f": {through} as the attack went through, the others over what it met next"
    print("\n".join(wrong) or told)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
