"""Imports from one file with all the bytecode of the guest; /init imports this first, as `kata_importer`.

Finding one file among hundreds, under an emulated processor, costs as much as running what is in it. The
bundle is python.bundle()'s: eight bytes with the length of the index, the index, the modules' code.

Only what the interpreter has loaded anyway can be imported here: all else is in the bundle.
"""

import marshal
import os
import sys
from _frozen_importlib import ModuleSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType, ModuleType

# Modules that others import at their top for functions that an agent hardly ever, or never, comes to call:
# the first attribute that is asked for runs them. (python_message is protobuf without its C part.)
LAZY = frozenset(
    {
        "asyncio.sslproto",
        "calendar",
        "google.protobuf.descriptor_database",
        "google.protobuf.internal.python_message",
        "inspect",
        "linecache",
        "locale",
        "textwrap",
    }
)

# Where tracebacks say that the modules are.
LIBRARY = os.path.dirname(os.__file__)  # noqa: PTH120


class BundleImporter:
    """Finder and loader as importlib.abc describes them, without the time it takes to import that."""

    def __init__(self, path: str) -> None:
        self.path = path
        with open(path, "rb") as file:  # noqa: PTH123 - pathlib is in the bundle
            length = int.from_bytes(file.read(8), "little")
            self.index: dict[str, tuple[int, int, bool]] = marshal.loads(file.read(length))
        self.start = 8 + length

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> ModuleSpec | None:
        found = self.index.get(name)
        if found is None:
            return None
        location = f"{LIBRARY}/{name.replace('.', '/')}"
        if not found[2]:
            return ModuleSpec(name, self, origin=f"{location}.py")  # type: ignore[arg-type]
        specification = ModuleSpec(name, self, origin=f"{location}/__init__.py", is_package=True)  # type: ignore[arg-type]
        # Extension modules are files.
        specification.submodule_search_locations = [location]
        return specification

    def create_module(self, spec: ModuleSpec) -> "ModuleType | None":
        return None

    def get_code(self, name: str) -> "CodeType":
        offset, length, _ = self.index[name]
        with open(self.path, "rb", buffering=0) as file:  # noqa: PTH123
            file.seek(self.start + offset)
            code: CodeType = marshal.loads(file.read(length))
        return code

    def exec_module(self, module: "ModuleType") -> None:
        if module.__name__ not in LAZY:
            exec(self.get_code(module.__name__), module.__dict__)
            return

        def load(name: str) -> object:
            del module.__dict__["__getattr__"]
            exec(self.get_code(module.__name__), module.__dict__)
            return getattr(module, name)

        module.__dict__["__getattr__"] = load


def install(path: str) -> None:
    """Before the search on sys.path, after what is built into the interpreter."""
    sys.meta_path.insert(2, BundleImporter(path))
