"""Kata's configuration.toml: found, read with its drop-ins and annotations, checked, resolved."""

from katautils.config.files import CONF_FILE_VARIABLE, SEARCH_PATHS, find_configuration
from katautils.config.load import RuntimeConfig, load_configuration

__all__ = ["CONF_FILE_VARIABLE", "SEARCH_PATHS", "RuntimeConfig", "find_configuration", "load_configuration"]
