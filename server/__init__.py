"""The coordinator: rounds, cohort, aggregation, checkpoints. Never imports torch."""
