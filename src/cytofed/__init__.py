"""cytofed: labs train one cell-morphology classifier together; no image leaves a lab.

For notebooks: ``from cytofed import simulate, load_plan, Run``. They are imported when first asked
for, so that ``import cytofed`` stays light and no process gets what it does not use.
"""

import os as _os
import typing as _typing
from importlib import import_module as _import_module

if _typing.TYPE_CHECKING:
    from cytofed.plan import load_plan
    from cytofed.simulations.notebook import Run, simulate

__all__ = ["Run", "load_plan", "simulate"]

__version__ = "0.1.0"

# No telemetry and no update checks; these are read when the libraries are first imported.
_os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
_os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
_os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# OpenMP threads that spin while they wait cost a factor of ten on a machine that does anything
# else. Read when torch is first imported.
_os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_FOUND_IN = {
    "Run": "cytofed.simulations.notebook",
    "load_plan": "cytofed.plan",
    "simulate": "cytofed.simulations.notebook",
}


if not _typing.TYPE_CHECKING:  # type checkers know the names above, and no others

    def __getattr__(name: str) -> _typing.Any:
        if name not in _FOUND_IN:
            raise AttributeError(f"module 'cytofed' has no attribute {name!r}")
        found = getattr(_import_module(_FOUND_IN[name]), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
