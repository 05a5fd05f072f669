"""Finding configuration.toml and reading it with its drop-ins, every value checked where it stands."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from katautils.config.schema import FOREIGN_TABLES, TABLES_BY_NAME, Kind, Value
from virtcontainers.errors import InvalidArgumentError, NotFoundError

SEARCH_PATHS = (
    Path("/etc/kata-py/configuration.toml"),
    Path("/etc/kata-containers/configuration.toml"),
    Path("/usr/share/defaults/kata-containers/configuration.toml"),
)
CONF_FILE_VARIABLE = "KATA_CONF_FILE"
DROP_IN_DIRECTORY = "config.d"


@dataclass(frozen=True)
class Setting:
    """A value and where it was said: "FILE: [TABLE] KEY", or an annotation."""

    value: Value
    where: str


@dataclass
class ParsedConfig:
    """What the files say: tables of TABLES_BY_NAME, later files over earlier ones."""

    path: Path
    drop_ins: tuple[Path, ...] = ()
    tables: dict[str, dict[str, Setting]] = field(default_factory=lambda: {t: {} for t in TABLES_BY_NAME})
    unknown: list[tuple[str, str, Path]] = field(default_factory=list)
    """(table, key, file) that nobody knows; key "" for a whole table."""
    foreign: list[tuple[str, Path]] = field(default_factory=list)
    """(table, file) of Kata's that we do not read."""


def find_configuration(path: Path | None, environ: Mapping[str, str] | None = None) -> Path:
    """The file to read, resolved: `path`, else KATA_CONF_FILE, else the first of SEARCH_PATHS.

    Raises NotFoundError naming what was looked at.
    """
    environ = os.environ if environ is None else environ
    if path is None and environ.get(CONF_FILE_VARIABLE):
        path = Path(environ[CONF_FILE_VARIABLE])
        origin = f" ({CONF_FILE_VARIABLE})"
    else:
        origin = ""
    if path is not None:
        if not _is_there(path):
            raise NotFoundError(f"configuration file {path}{origin}: found nothing there, expected a file")
        return path.resolve()
    for candidate in SEARCH_PATHS:
        if _is_there(candidate):
            return candidate.resolve()
    looked_at = ", ".join(map(str, SEARCH_PATHS))
    raise NotFoundError(
        f"no configuration file: {CONF_FILE_VARIABLE} is not set and none of {looked_at} exists"
    )


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # somebody else may know; who reads it says why we do not
        return True


def read_configuration(path: Path) -> ParsedConfig:
    """Read a file and `config.d/*.toml` beside it, in the order of their names.

    Raises InvalidArgumentError: not TOML, or a value that is not of its key's kind.
    """
    parsed = ParsedConfig(path)
    _merge(parsed, path)
    drop_ins = (path.parent / DROP_IN_DIRECTORY).glob("*.toml")
    parsed.drop_ins = tuple(sorted(drop_ins, key=lambda p: p.name))
    for file in parsed.drop_ins:
        _merge(parsed, file)
    return parsed


def check_value(kind: Kind, value: Any, where: str) -> Value:
    """The value as we keep it. Raises InvalidArgumentError naming `where`, found and expected."""
    try:
        return kind.accept(value)
    except ValueError:
        raise InvalidArgumentError(f"{where}: found {as_toml(value)}, expected {kind.expected}") from None


def as_toml(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _merge(parsed: ParsedConfig, file: Path) -> None:
    for name, table in _tables(_read_toml(file)):
        schema = TABLES_BY_NAME.get(name)
        if schema is None:
            if name in FOREIGN_TABLES:
                parsed.foreign.append((name, file))
            else:
                parsed.unknown.append((name, "", file))
            continue
        if not isinstance(table, dict):
            raise InvalidArgumentError(f"{file}: {name}: found {as_toml(table)}, expected a table")
        for key, value in table.items():
            if f"{name}.{key}" in TABLES_BY_NAME:
                continue
            if key not in schema:
                parsed.unknown.append((name, key, file))
                continue
            where = f"{file}: [{name}] {key}"
            parsed.tables[name][key] = Setting(check_value(schema[key].kind, value, where), where)


def _read_toml(file: Path) -> dict[str, Any]:
    import tomllib

    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise InvalidArgumentError(f"{file}: {error.strerror}, expected a readable TOML file") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are
        raise InvalidArgumentError(f"{file}: not TOML: {error}") from None


def _tables(document: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The tables by their dotted names, and everything else that is where tables are expected."""
    for name, table in document.items():
        if name in ("hypervisor", "agent") and isinstance(table, dict):
            for kind, inner in table.items():
                yield f"{name}.{kind}", inner
        else:
            yield name, table
    for name in TABLES_BY_NAME:
        first, *rest = name.split(".")
        if len(rest) == 2:
            outer = document.get(first, {})
            inner = outer.get(rest[0], {}) if isinstance(outer, dict) else {}
            if isinstance(inner, dict) and rest[1] in inner:
                yield name, inner[rest[1]]
