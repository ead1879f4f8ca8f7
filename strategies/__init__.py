"""One method family a file, both halves, paper on top."""
