"""Patient-level differential privacy, sealing, secure aggregation. Pure, no I/O at the core."""
