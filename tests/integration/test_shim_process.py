"""The process that serves a pod, seen from outside: what it loads, and how it came to be."""

from pathlib import Path

from harness import Ctr, processes_of
from private_containerd import REPO, Containerd


def test_it_loads_neither_grpc_nor_pyroute2_and_is_forked_from_start(
    containerd: Containerd, tmp_path: Path, container_id: str
) -> None:
    # The launcher as it is; its interpreter writes down what it imports and which processes it makes.
    program = "containerd-shim-kata-py-v2"
    first, rest = (REPO / ".venv/bin" / program).read_text().split("\n", 1)
    record = tmp_path / "record"
    (tmp_path / "bin").mkdir()
    launcher = tmp_path / "bin" / program
    launcher.write_text(
        f"""{first}
import sys, os
def record(event, arguments):
    if event in ("import", "os.fork", "os.exec", "os.posix_spawn", "subprocess.Popen"):
        file = os.open({str(record)!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, f"{{os.getpid()}} {{sys.argv[-1]}} {{event}} {{arguments[:1]}}\\n".encode())
        os.close(file)
sys.addaudithook(record)
{rest}"""
    )
    launcher.chmod(0o755)
    observed = Containerd(
        root=tmp_path / "root", run=tmp_path / "run", binaries=containerd.binaries, programs=tmp_path / "bin"
    )
    observed.start()
    ctr = Ctr(observed)
    try:
        with ctr.detached(container_id, "sleep", "1000"):
            assert ctr.exec(container_id, "echo", "busy").stdout == b"busy\n"
            (server,) = processes_of(container_id, program)
            lines = record.read_text().splitlines()
            imported = {line.split("'")[1] for line in lines if " import " in line}
            assert "asyncio" in imported
            assert not {name for name in imported if name.split(".")[0] in ("grpc", "pyroute2")}
            assert "cygrpc" not in Path(f"/proc/{server}/maps").read_text()
            starts = [line for line in lines if line.split()[1] == "start"]
            assert any(" os.fork " in line for line in starts)
            assert not [line for line in starts if " os.exec " in line and "python" in line]
    finally:
        observed.destroy()
