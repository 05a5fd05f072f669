"""From an OCI bundle and a configuration file to a sandbox."""

__version__ = "0.1.0"
