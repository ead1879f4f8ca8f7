"""cytofed: labs train one cell-morphology classifier together; no image leaves a lab."""

__version__ = "0.1.0"
