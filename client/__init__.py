"""The lab: reading its data, training on it, answering orders."""
