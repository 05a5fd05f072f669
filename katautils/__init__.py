"""From an OCI bundle and a configuration file to a sandbox."""
