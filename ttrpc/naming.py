"""From the names of protobuf's methods to Python's."""

import re
from functools import cache

_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


@cache
def snake_case(method_name: str) -> str:
    """`CreateContainer` -> `create_container`, `GetOOMEvent` -> `get_oom_event`, `CloseIO` -> `close_io`."""
    return _WORDS.sub("_", method_name).lower()
