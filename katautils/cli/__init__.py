"""The `kata-py` command line."""
