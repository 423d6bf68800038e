"""The decode loop: sequences, proposers, text; it knows of a backend only what `backends.base` says."""
