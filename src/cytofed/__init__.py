"""cytofed: labs train one cell-morphology classifier together; no image leaves a lab."""

import os as _os

__version__ = "0.1.0"

# No telemetry and no update checks; these are read when the libraries are first imported.
_os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
_os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
_os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# OpenMP threads that spin while they wait cost a factor of ten on a machine that does anything
# else. Read when torch is first imported.
_os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
