"""Patient-level differential privacy, sealing, secure aggregation. Pure, without I/O at the core."""
