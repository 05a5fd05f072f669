"""The one warning about keys: those that nobody knows, and those that we do not implement."""

from __future__ import annotations

from collections.abc import Iterator

from katautils.config.files import ParsedConfig, Setting, as_toml
from katautils.config.schema import TABLES_BY_NAME, Table


def unknown_keys(parsed: ParsedConfig) -> list[str]:
    """Keys and tables that nobody knows, each with the nearest known one where there is one."""
    found = []
    for table, key, file in parsed.unknown:
        name = f"[{table}] {key}" if key else f"[{table}]"
        if file != parsed.path:
            name += f" of {file}"
        nearest = _nearest_key(table, key) if key else _nearest_table(table)
        found.append(f"{name} (nearest: {nearest})" if nearest else name)
    return found


def unimplemented_keys(parsed: ParsedConfig) -> list[str]:
    """Known keys that ask for what we do not do, with what they ask for."""
    found = [f"[{table}]" for table, _ in parsed.foreign]
    for table, key, value in _unimplemented(parsed):
        found.append(f"[{table}] {key} = {value}")
    return found


def key_warning(parsed: ParsedConfig) -> str:
    """The warning, or "" when there is nothing to warn of."""
    parts = []
    if unknown := unknown_keys(parsed):
        parts.append("unknown keys: " + ", ".join(unknown))
    if unimplemented := unimplemented_keys(parsed):
        parts.append("keys without effect, for kata-py does not implement them: " + ", ".join(unimplemented))
    return f"{parsed.path}: {'; '.join(parts)}" if parts else ""


def nearest(word: str, known: list[str]) -> str:
    """The known word that `word` was most probably meant to be, or ""."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, known, 1)), "")


def _unimplemented(parsed: ParsedConfig) -> Iterator[tuple[str, str, str]]:
    for table, settings in parsed.tables.items():
        schema = TABLES_BY_NAME[table]
        for name, setting in settings.items():
            key = schema[name]
            if key.is_implemented or key.is_idle(setting.value):
                continue
            if key.part_of and not _is_on(key.part_of, schema, settings):
                continue
            yield table, name, as_toml(setting.value)


def _is_on(name: str, schema: Table, settings: dict[str, Setting]) -> bool:
    return schema[name].is_implemented and name in settings and bool(settings[name].value)


def _nearest_key(table: str, key: str) -> str:
    here = TABLES_BY_NAME[table]
    if match := nearest(key, list(here)):
        return match
    elsewhere = {k: t for t, schema in reversed(TABLES_BY_NAME.items()) for k in schema if t != table}
    match = nearest(key, list(elsewhere))
    return f"[{elsewhere[match]}] {match}" if match else ""


def _nearest_table(table: str) -> str:
    match = nearest(table, list(TABLES_BY_NAME))
    return f"[{match}]" if match else ""
