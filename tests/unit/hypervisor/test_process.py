import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import runs

from virtcontainers.hypervisor.base import HypervisorError
from virtcontainers.hypervisor.capabilities import Capability
from virtcontainers.hypervisor.process import MARK, MachineProcess, end_processes, find_processes

STUBBORN = "trap '' TERM; echo ready; while :; do sleep 0.1; done"


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("waited 20 s")


@pytest.mark.parametrize(
    ("script", "sentence"),
    [("echo why >&2; exit 3", "exited with status 3"), ("kill -9 $$", "was killed by SIGKILL")],
)
def test_it_is_told_how_a_process_ended(tmp_path: Path, script: str, sentence: str) -> None:
    async def body() -> str:
        process = MachineProcess.start("daemon", ["/bin/sh", "-c", script], directory=tmp_path)
        assert await process.wait() == f"daemon (pid {process.pid}) {sentence}"
        assert not process.running
        await process.terminate()
        return await process.wait_with_tail()

    told = asyncio.run(body())
    assert told.endswith("--- daemon.log:\nwhy" if "why" in script else sentence)


def test_a_program_that_cannot_be_started_is_named(tmp_path: Path) -> None:
    async def body() -> None:
        with pytest.raises(HypervisorError, match=r"/no/such does not start: .*No such file"):
            MachineProcess.start("daemon", ["/no/such"], directory=tmp_path)

    asyncio.run(body())


def test_it_gets_nothing_of_ours_but_the_given_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "proxy-password")

    async def body() -> None:
        given, other = (os.open("/dev/null", os.O_RDONLY) for _ in range(2))
        os.set_inheritable(other, True)
        script = "ls -l /proc/self/fd; env; pwd"
        process = MachineProcess.start(
            "daemon", ["/bin/sh", "-c", script], directory=tmp_path, pass_fds=[given]
        )
        await process.wait()
        shown = process.log.read_text()
        assert f" {given} -> /dev/null" in shown
        assert f" {other} -> " not in shown
        assert "proxy-password" not in shown
        assert shown.endswith("\n/\n")
        os.close(given)
        os.close(other)

    asyncio.run(body())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities")
def test_it_has_the_given_capabilities_only(tmp_path: Path) -> None:
    async def body() -> None:
        process = MachineProcess.start(
            "daemon",
            ["/bin/sh", "-c", "grep Cap /proc/self/status"],
            directory=tmp_path,
            capabilities={Capability.CHOWN, Capability.MKNOD},
        )
        await process.wait()
        sets = dict(line.split() for line in process.log.read_text().splitlines())
        given = f"{1 << Capability.CHOWN | 1 << Capability.MKNOD:016x}"
        assert sets == {
            **dict.fromkeys(("CapPrm:", "CapEff:", "CapBnd:"), given),
            **dict.fromkeys(("CapInh:", "CapAmb:"), f"{0:016x}"),
        }

    asyncio.run(body())


def test_one_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    async def body() -> None:
        process = MachineProcess.start("daemon", ["/bin/sh", "-c", STUBBORN], directory=tmp_path)
        await until(lambda: "ready" in process.log.read_text())
        await process.terminate(timeout_s=0.2)
        assert await process.wait() == f"daemon (pid {process.pid}) was killed by SIGKILL"

    asyncio.run(body())


def test_what_a_process_has_forked_goes_with_it(tmp_path: Path) -> None:
    async def body() -> None:
        process = MachineProcess.start(
            "daemon", ["/bin/sh", "-c", "sleep 600 & echo $!; wait"], directory=tmp_path
        )
        await until(lambda: process.log.read_text().strip().isdigit())
        forked = int(process.log.read_text())
        assert runs(forked)
        await process.terminate()
        await until(lambda: not runs(forked))

    asyncio.run(body())


OWNER = """
import asyncio, sys
from pathlib import Path
from virtcontainers.hypervisor.process import MachineProcess
async def body():
    print(MachineProcess.start("daemon", ["/bin/sleep", "600"], directory=Path(sys.argv[1])).pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(body())
"""


def test_processes_die_with_the_one_that_started_them(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert runs(pid)
        owner.kill()
    asyncio.run(until(lambda: not runs(pid)))


OUTLIVED = OWNER.replace("directory=Path(sys.argv[1])", "directory=Path(sys.argv[1]), outlives_us=True")


def test_a_process_that_outlives_its_starter_is_adopted(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OUTLIVED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        owner.kill()

    async def body() -> None:
        with pytest.raises(HypervisorError, match=rf"daemon \(pid {pid}\) is none of the machine in /other"):
            MachineProcess.adopt("daemon", pid, directory=Path("/other"))
        # The kernel shows a new program's environment a moment after it has begun.
        await until(lambda: find_processes(tmp_path) == [pid])
        process = MachineProcess.adopt("daemon", pid, directory=tmp_path)
        assert process.running and runs(pid)
        await process.terminate()
        assert await process.wait() == f"daemon (pid {pid}) ended"
        await until(lambda: not runs(pid))
        with pytest.raises(HypervisorError, match=rf"daemon \(pid {pid}\)"):
            MachineProcess.adopt("daemon", pid, directory=tmp_path)

    asyncio.run(body())


def test_one_that_is_adopted_and_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    async def body() -> None:
        child = MachineProcess.start("daemon", ["/bin/sh", "-c", STUBBORN], directory=tmp_path)
        await until(lambda: "ready" in child.log.read_text())
        process = MachineProcess.adopt("daemon", child.pid, directory=tmp_path)
        await process.terminate(timeout_s=0.2)
        assert await child.wait() == f"daemon (pid {child.pid}) was killed by SIGKILL"

    asyncio.run(body())


def test_one_that_is_adopted_may_have_been_waited_for_by_its_parent(tmp_path: Path) -> None:
    async def body() -> None:
        await until(lambda: find_processes(tmp_path) == [child.pid])
        process = MachineProcess.adopt("daemon", child.pid, directory=tmp_path)
        child.kill()
        child.wait()
        assert process.running, "its end is not seen yet"
        await process.terminate()
        assert await process.wait() == f"daemon (pid {child.pid}) ended"

    with subprocess.Popen(["/bin/sleep", "600"], env={MARK: str(tmp_path)}) as child:
        asyncio.run(body())


def test_another_process_finds_and_ends_them_and_nobody_else(tmp_path: Path) -> None:
    """Also one that ignores SIGTERM, its children, and none that only mentions the directory."""
    directory, other = tmp_path / "vm1", tmp_path / "vm10"
    directory.mkdir()
    other.mkdir()
    ender = (
        "import asyncio, sys; from pathlib import Path; from virtcontainers.hypervisor.process import *; "
        "asyncio.run(end_processes(Path(sys.argv[1]), timeout_s=0.3))"
    )

    async def body() -> None:
        mine = MachineProcess.start("a", ["/bin/sh", "-c", STUBBORN], directory=directory)
        parent = MachineProcess.start("b", ["/bin/sh", "-c", "sleep 600; true"], directory=directory)
        others = MachineProcess.start("a", ["/bin/sleep", "600"], directory=other)
        mentions = await asyncio.create_subprocess_exec("/bin/sh", "-c", f"sleep 600 # {directory}/qemu.log")
        try:
            await until(lambda: len(find_processes(directory)) >= 3 and "ready" in mine.log.read_text())
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", ender, str(directory))
            assert await process.wait() == 0
            assert find_processes(directory) == []
            assert not mine.running and not parent.running
            assert others.running and mentions.returncode is None
        finally:
            mentions.kill()
            await mentions.wait()
            for started in (mine, parent, others):
                await started.terminate(0.1)

    asyncio.run(body())


def test_nothing_to_end_is_no_error(tmp_path: Path) -> None:
    asyncio.run(end_processes(tmp_path))
