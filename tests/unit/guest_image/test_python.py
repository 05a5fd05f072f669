"""The guest's Python, with the interpreter that runs the tests in the guest's place."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from guest.image import importer, python

INTERPRETER = [sys.executable]


@pytest.fixture
def sources(tmp_path: Path) -> list[python.Source]:
    files = {
        "pkg/__init__": "from pkg import lower",
        "pkg/lower": "import sys\nVALUE = 7\ndef fail():\n    raise RuntimeError('on purpose')\n",
        "pkg/sets": "WORDS = {'a', 'b', 'c', 'd', 'e'}\ndef member(x): return x in {'k', 'l', 'm', 'n'}\n",
        "textwrap": "import sys\nsys.stdout.write('textwrap ran\\n')\ndef shown(): return 'lazily'\n",
    }
    made = []
    for module, text in files.items():
        path = tmp_path / "sources" / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        made.append(python.Source(path, module))
    return made


def bundle_of(sources: list[python.Source], work: Path) -> bytes:
    return python.bundle(python.compile_sources(INTERPRETER, sources, "/usr/lib/python3.x", work))


def run_with(bundle: bytes, directory: Path, program: str) -> str:
    """Output and errors of the program, in an interpreter that has this bundle only, and builtins."""
    (directory / "bundle").write_bytes(bundle)
    path = Path(importer.__file__)
    (directory / "kata_importer.py").write_bytes(path.read_bytes())
    start = (
        f"import sys; sys.path[:] = [{str(directory)!r}]\n"
        f"import kata_importer; kata_importer.install({str(directory / 'bundle')!r})\n"
    )
    result = subprocess.run(
        [*INTERPRETER, "-ISB", "-c", start + program], capture_output=True, text=True, check=False
    )
    return result.stdout + result.stderr


def test_modules_are_imported_from_the_bundle(sources: list[python.Source], tmp_path: Path) -> None:
    bundle = bundle_of(sources, tmp_path / "work")
    output = run_with(bundle, tmp_path, "import pkg.sets\nprint(pkg.lower.VALUE, sorted(pkg.sets.WORDS)[0])")
    assert output == "7 a\n"


def test_a_traceback_names_the_guests_files(sources: list[python.Source], tmp_path: Path) -> None:
    output = run_with(bundle_of(sources, tmp_path / "work"), tmp_path, "import pkg\npkg.lower.fail()")
    assert 'File "/usr/lib/python3.x/pkg/lower.py", line 4, in fail' in output


def test_a_module_that_is_nowhere_is_not_found(sources: list[python.Source], tmp_path: Path) -> None:
    output = run_with(bundle_of(sources, tmp_path / "work"), tmp_path, "import pkg.upper")
    assert "ModuleNotFoundError: No module named 'pkg.upper'" in output


def test_a_lazy_module_runs_at_its_first_use(sources: list[python.Source], tmp_path: Path) -> None:
    program = (
        "import textwrap\nimport textwrap as again\n"
        "print('imported')\nprint(again.shown())\nprint(textwrap.shown())"
    )
    output = run_with(bundle_of(sources, tmp_path / "work"), tmp_path, program)
    assert output == "imported\ntextwrap ran\nlazily\nlazily\n"


def test_a_name_taken_from_a_lazy_module_is_a_first_use(sources: list[python.Source], tmp_path: Path) -> None:
    program = "from textwrap import shown\nprint(shown())"
    assert run_with(bundle_of(sources, tmp_path / "work"), tmp_path, program) == "textwrap ran\nlazily\n"


def test_the_same_sources_make_the_same_bundle(sources: list[python.Source], tmp_path: Path) -> None:
    assert bundle_of(sources, tmp_path / "one") == bundle_of(sources, tmp_path / "two")


def test_a_source_that_does_not_compile_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("def (:\n")
    with pytest.raises(python.PythonError, match=r"bad\.py does not compile for the guest: .*invalid syntax"):
        python.compile_sources(INTERPRETER, [python.Source(path, "bad")], "/lib", tmp_path / "work")


def imported_by(path: Path) -> set[str]:
    """First names of the modules that are imported anywhere in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_everything_that_the_agent_imports_is_in_the_image() -> None:
    library = {
        source.module.partition("/")[0] for source in python.standard_library(Path(ast.__file__).parent)
    }
    built_in = {*sys.builtin_module_names, "__future__"}
    ours = {"agent_client", "google", "guest", "ttrpc"}
    missing = {
        (source.module, name)
        for source in python.own_sources()
        for name in imported_by(source.path) - library - built_in - ours - python.EXTENSIONS
    }
    assert missing == set()


def test_the_image_has_our_packages_and_protobufs_c_part() -> None:
    modules = {source.module for source in python.own_sources()}
    assert {
        "guest/__init__",
        "guest/agent/main",
        "ttrpc/__init__",
        "agent_client/protocols/agent_pb2",
    } <= modules
    assert not any(module.startswith("guest/image") for module in modules)
    assert python.protobuf()[1].read_bytes().startswith(b"\x7fELF")
