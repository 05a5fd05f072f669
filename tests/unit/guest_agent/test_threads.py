"""Work in a thread, where there is one to be had."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from guest.agent.threads import in_thread

# With a limit of processes as small as that, a user who is not root starts no thread.
WITHOUT_THREADS = """
import asyncio, os, resource, threading
from guest.agent.threads import in_thread

async def main():
    calls = []
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
    try:
        threading.Thread(target=print).start()
    except RuntimeError:
        print("no thread")
    print(await in_thread(lambda *args: calls.append(args) or threading.current_thread().name, 1, 2))
    resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
    print(await in_thread(threading.get_ident) != threading.get_ident(), calls)

if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
asyncio.run(main())
"""


def test_without_a_thread_it_is_done_at_once_and_not_again_when_there_is_one() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_THREADS], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("no thread\nMainThread\nTrue [(1, 2)]\n", "")


def test_others_are_served_meanwhile() -> None:
    goes_on = threading.Event()

    def fail() -> None:
        goes_on.wait()
        raise OSError("after all")

    async def body() -> None:
        both = [asyncio.ensure_future(in_thread(work)) for work in (goes_on.wait, fail)]
        await asyncio.sleep(0)
        goes_on.set()
        assert await both[0]
        with pytest.raises(OSError, match="after all"):
            await both[1]

    asyncio.run(body())


def test_nobody_need_wait_for_the_end() -> None:
    goes_on, ended = threading.Event(), threading.Event()

    def work() -> None:
        goes_on.wait()
        ended.set()

    async def body() -> None:
        waiting = asyncio.ensure_future(in_thread(work))
        await asyncio.sleep(0)
        waiting.cancel()

    asyncio.run(body())
    goes_on.set()
    assert ended.wait(60)
