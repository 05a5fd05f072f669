"""Machines that are copies of one that was booted and saved, after Kata's `factory/template`.

`template_path` is a tmpfs of its own:

    builds/<id>/{memory,state,template.json}    one template, whole
    current -> builds/<id>                      the one that counts, exchanged by a rename
    memory, state, template.json                links through `current`, for people

Who builds holds a lock on `.<name>.lock` beside it; `.<name>.failed` there is the last that could not be made
or used, and why. Both are gone when the template is destroyed. Who starts a clone holds a shared lock on the
build's folder, so that nobody removes it before QEMU has opened its files.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import secrets
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from virtcontainers import mount
from virtcontainers.config import RUN_VC, SharedFS
from virtcontainers.errors import DeadlineExceededError, FailedPreconditionError, KataError, NotFoundError
from virtcontainers.factory.base import FactoryBase, OnPlanned
from virtcontainers.factory.fingerprint import Difference, differences, made_of, template_hypervisor
from virtcontainers.hypervisor.balloon import squeeze
from virtcontainers.hypervisor.base import vm_dir
from virtcontainers.hypervisor.memory_file import allocated_bytes, punch_zeros
from virtcontainers.hypervisor.process import end_processes
from virtcontainers.hypervisor.qemu import remove_directory
from virtcontainers.vm import VM, VMConfig

log = logging.getLogger(__name__)

_LOCK_POLL_S = 0.02
_LOCK_TIMEOUT_S = 60.0
_OTHERS_SAVE_S = 15.0
"""For what another builder does when its machine has booted. The kubelet gives a pod 120 s, and one that has
waited in vain is still to be booted."""
_FAILURE_KEPT_S = 60.0
"""For so long nobody tries again what has failed: each of many pods would wait for it to fail once more."""
_SQUEEZE_TIMEOUT_S = 30.0
"""At least: where a guest is given longer to boot, it is slow at this, too."""
_STATE_LIMIT_BYTES = 64 << 20
_ROOM_BYTES = 64 << 20
"""On the tmpfs, beside the memory."""
_MOUNT_FLAGS = mount.MS_NOSUID | mount.MS_NODEV | mount.MS_NOEXEC
_LINKS = ("memory", "state", "template.json")
_OURS = ("builds", "current", ".current", *_LINKS)

OnProgress = Callable[[str], None]


class TemplateMissing(NotFoundError):
    """There is no template."""


class TemplateMisfit(FailedPreconditionError):
    """There is one, of another machine."""

    def __init__(self, path: Path, found: tuple[Difference, ...]) -> None:
        self.differences = found
        super().__init__(f"the template in {path} does not fit: " + "; ".join(map(str, found)))


@dataclass(frozen=True, kw_only=True)
class TemplateInfo:
    """What template.json says, checked against the files beside it. Sizes in bytes."""

    directory: Path
    """builds/<id>."""
    created: float
    """Seconds since the epoch."""
    made_of: dict[str, str]
    memory_bytes: int
    """As the guest sees it."""
    memory_allocated_bytes: int
    """As the host has it."""
    memory_mtime_ns: int
    state_bytes: int
    state_crc32: int
    booted_bytes: int
    """Allocated when the agent had answered."""
    given_back_bytes: int
    """Of those, what the guest could do without."""
    zero_bytes: int
    """Of the rest, zero pages."""

    @property
    def memory(self) -> Path:
        return self.directory / "memory"

    @property
    def state(self) -> Path:
        return self.directory / "state"


def read_template(path: Path) -> TemplateInfo:
    """The template of `template_path`. Raises TemplateMissing; KataError with what is broken about one."""
    while True:
        directory = _current(path)
        try:
            return _read_build(path, directory)
        except KataError:
            # Another builder may have exchanged it meanwhile, and have removed this one.
            if _current(path) == directory:
                raise


def _current(path: Path) -> Path:
    try:
        return path / (path / "current").readlink()
    except PermissionError as error:
        raise KataError(f"the template in {path}: {error.strerror}") from None
    except OSError as error:
        raise TemplateMissing(f"there is no template in {path}: {error.strerror}") from None


def _read_build(path: Path, directory: Path) -> TemplateInfo:
    try:
        _check_folder(path)
        info = _parse_info(directory, (directory / "template.json").read_text())
    except OSError as error:
        raise KataError(f"the template {directory}: {error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise KataError(f"the template {directory}: template.json is not readable: {error}") from error
    try:
        _check_files(info)
    except OSError as error:
        raise KataError(f"the template {directory}: {error}") from error
    return info


def _parse_info(directory: Path, text: str) -> TemplateInfo:
    """Raises ValueError or TypeError for what `_build` has not written."""
    info = TemplateInfo(directory=directory, **json.loads(text))
    expected = dict.fromkeys(asdict(info), int) | {"directory": Path, "created": float, "made_of": dict}
    for name, kind in expected.items():
        if not isinstance(value := getattr(info, name), kind):
            raise TypeError(f"{name}: found {value!r}, expected {kind.__name__}")
    for part, value in info.made_of.items():
        if not isinstance(value, str):
            raise TypeError(f"made_of {part}: found {value!r}, expected str")
    return info


def _check_folder(path: Path) -> None:
    """Whoever may write there decides what runs in our machines."""
    found = path.stat()
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
        raise FailedPreconditionError(
            f"template_path {path}: found owner {found.st_uid} and mode {found.st_mode & 0o7777:04o}, "
            "expected a folder that root alone may write to (0700)"
        )


def _check_files(info: TemplateInfo) -> None:
    memory = info.memory.stat()
    found = (memory.st_size, memory.st_mtime_ns)
    if found != (info.memory_bytes, info.memory_mtime_ns):
        raise KataError(
            f"{info.memory}: found {found[0]} bytes written at {found[1]} ns, expected {info.memory_bytes} "
            f"bytes written at {info.memory_mtime_ns} ns"
        )
    state = info.state.read_bytes() if info.state.stat().st_size <= _STATE_LIMIT_BYTES else b""
    if (len(state), zlib.crc32(state)) != (info.state_bytes, info.state_crc32):
        raise KataError(
            f"{info.state}: found {len(state)} bytes, CRC-32 {zlib.crc32(state):08x}, expected "
            f"{info.state_bytes} bytes, CRC-32 {info.state_crc32:08x}"
        )


class Template(FactoryBase):
    """Clones of the template in `path`."""

    def __init__(self, path: Path, config: VMConfig, info: TemplateInfo) -> None:
        """Use `fetch` or `new`."""
        self.path = path
        self.config = config
        self.info = info

    @classmethod
    def fetch(cls, path: Path, config: VMConfig) -> Template:
        """The template that is there. Raises TemplateMissing, TemplateMisfit, KataError for a broken one."""
        info = read_template(path)
        if found := differences(info.made_of, made_of(config)):
            raise TemplateMisfit(path, found)
        return cls(path, config, info)

    @classmethod
    async def new(
        cls,
        path: Path,
        config: VMConfig,
        *,
        force: bool = False,
        retry: bool = False,
        on_progress: OnProgress = lambda step: None,
    ) -> Template:
        """Make it, in the place of one that does not fit.

        Of many that ask at a time one builds and the others wait for it; unless `force`d, they take what it
        has made, and fail as it failed, for a minute, unless they `retry`. `on_progress` is told of each
        step. Raises KataError's classes.
        """
        asked_at = time.time()
        parts = made_of(config)
        async with _builders_lock(path, config.agent.dial_timeout_s + _OTHERS_SAVE_S, on_progress):
            if not force:
                with suppress(KataError, OSError):
                    taken = cls.fetch(path, config)
                    # Its builder, or a later one, may have been killed before it could.
                    await sweep(path)
                    return taken
                if not retry:
                    _check_failure(path, parts, asked_at)
            try:
                info = await _build(path, config, parts, on_progress)
            except KataError as error:
                _note_failure(path, parts, str(error))
                raise
            _note_failure(path, parts, None)
        return cls(path, config, info)

    async def get_base_vm(
        self, vm_id: str, config: VMConfig, *, shared_path: Path | None, on_planned: OnPlanned
    ) -> VM:
        """A paused clone."""
        with self._lease() as info:
            saved = self.config.hypervisor
            hypervisor = replace(
                # What is no part of the template is the pod's: how virtiofsd shares its files.
                template_hypervisor(config.hypervisor, info.directory),
                default_vcpus=saved.default_vcpus,
                default_memory_mib=saved.default_memory_mib,
                boot_to_be_template=False,
                boot_from_template=True,
            )
            vm = VM.new(
                vm_id,
                VMConfig(hypervisor, config.agent),
                shared_path=shared_path,
                outlives_us=self.outlives_us,
            )
            try:
                on_planned(vm.hypervisor.save())
                await vm.start(config.agent.dial_timeout_s)
            except BaseException:
                await asyncio.shield(vm.stop())
                raise
        return vm

    def reject(self, reason: str) -> None:
        log.error("the template %s is not used any more: %s", self.info.directory, reason)
        _note_failure(self.path, self.info.made_of, reason, of=self.info)

    @contextmanager
    def _lease(self) -> Iterator[TemplateInfo]:
        """The template, which nobody removes meanwhile. It may be a newer one than was fetched."""
        while True:
            try:
                fd = os.open(self.info.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                self.info = Template.fetch(self.path, self.config).info
                continue
            except OSError as error:
                raise KataError(f"the template {self.info.directory}: {error.strerror}") from error
            try:
                fcntl.flock(fd, fcntl.LOCK_SH)
                # Between the look and the lock it may have been removed.
                if self.info.memory.exists():
                    yield self.info
                    return
            finally:
                os.close(fd)
            self.info = Template.fetch(self.path, self.config).info

    async def close_factory(self) -> None:
        await destroy(self.path)


async def destroy(path: Path) -> bool:
    """Remove the template, its tmpfs and its folder; False: there was nothing. Idempotent.

    Clones go on: they hold what they need. Raises KataError.
    """
    if not path.parent.exists():
        return False
    async with _builders_lock(path, _LOCK_TIMEOUT_S):
        try:
            return await _destroy(path)
        finally:
            _failed_file(path).unlink(missing_ok=True)
            _lock_file(path).unlink(missing_ok=True)


async def _destroy(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        others = sorted(entry.name for entry in path.iterdir() if entry.name not in _OURS)
    except OSError as error:
        raise KataError(f"template_path {path}: {error}") from error
    if others:
        # A slip in the configuration must not cost anybody his files.
        raise FailedPreconditionError(f"template_path {path}: found {others[0]}, expected a template alone")
    try:
        (path / "current").unlink(missing_ok=True)
        await sweep(path)
        for entry in list(path.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                _remove_build_folders(entry)
            else:
                entry.unlink()
        # Below a link, /var/run for one, the kernel has the mount under another name.
        mount.unmount_below(path.resolve())
        path.rmdir()
    except OSError as error:
        raise KataError(f"{path}: {error}") from error
    return True


def _remove_build_folders(builds: Path) -> None:
    # All that is left are those of clones that are just starting; they have opened what they need, or fail.
    for build in list(builds.iterdir()):
        _remove_build(build)
    builds.rmdir()


async def sweep(path: Path) -> None:
    """Remove what is left of builds that do not count: their files, and the machine of one that died.

    Raises KataError, OSError.
    """
    try:
        current: str | None = (path / "current").readlink().name
    except OSError:
        current = None
    builds = list((path / "builds").iterdir()) if (path / "builds").is_dir() else []
    for build in builds:
        if build.name == current:
            continue
        directory = vm_dir(RUN_VC, _vm_id(build))
        await end_processes(directory)
        remove_directory(directory)
        fd = os.open(build, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Not when a clone of it is just starting: it is for the next one who looks.
            with suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_build(build)
        finally:
            os.close(fd)


def _remove_build(build: Path) -> None:
    for entry in list(build.iterdir()):
        if entry.is_dir():
            entry.rmdir()
        else:
            entry.unlink(missing_ok=True)
    build.rmdir()


def _vm_id(build: Path) -> str:
    return f"template-{build.name}"


async def _build(
    path: Path, config: VMConfig, parts: dict[str, str], on_progress: OnProgress
) -> TemplateInfo:
    try:
        on_progress("making room")
        _mount_tmpfs(path, config.hypervisor.default_memory_mib << 20)
        await sweep(path)
        build = path / "builds" / secrets.token_hex(6)
        try:
            build.parent.mkdir(exist_ok=True, mode=0o700)
            build.mkdir(mode=0o700)
            info = await _create_template_vm(build, config, parts, on_progress)
            written = {key: value for key, value in asdict(info).items() if key != "directory"}
            _write(build / "template.json", json.dumps(written, indent=1))
            for name in _LINKS:
                with suppress(FileExistsError):
                    (path / name).symlink_to(f"current/{name}")
            link = path / ".current"
            link.unlink(missing_ok=True)
            link.symlink_to(f"builds/{build.name}")
            link.rename(path / "current")
        finally:
            # The one before, or this one when it has not become one.
            await asyncio.shield(sweep(path))
    except OSError as error:
        raise KataError(f"the template in {path}: {error}") from error
    log.info("the template in %s is ready, with %d MiB", path, info.memory_allocated_bytes >> 20)
    return info


async def _create_template_vm(
    build: Path, config: VMConfig, parts: dict[str, str], on_progress: OnProgress
) -> TemplateInfo:
    """Boot, wait for the agent, and save. Memory and devices' state are in `build` then, and QEMU is gone."""
    hypervisor = template_hypervisor(config.hypervisor, build)
    memory = os.open(build / "memory", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(memory, hypervisor.default_memory_mib << 20)
        shared_path = None
        if hypervisor.shared_fs is SharedFS.VIRTIO_9P:
            # Its device is in the template, and exports each clone's own directory there. This one is empty.
            shared_path = build / "share"
            shared_path.mkdir(mode=0o700)
        vm = VM.new(_vm_id(build), VMConfig(hypervisor, config.agent), shared_path=shared_path)
        created = time.time()
        try:
            on_progress("booting the machine")
            await vm.start()
            booted = allocated_bytes(memory)
            on_progress("giving memory back")
            await squeeze(
                vm.hypervisor.monitor,
                memory_mib=hypervisor.default_memory_mib,
                bus=vm.hypervisor.take_port(),
                timeout_s=max(_SQUEEZE_TIMEOUT_S, config.agent.dial_timeout_s),
            )
            await vm.disconnect()
            # What the agent does when its host has gone is done when it answers the next.
            await vm.connect(config.agent.dial_timeout_s)
            await vm.disconnect()
            await vm.unplug_hvsock()
            squeezed = allocated_bytes(memory)
            on_progress("saving the machine")
            await vm.pause()
            await vm.save()
        finally:
            await asyncio.shield(vm.stop())
        if shared_path is not None:
            shared_path.rmdir()
        on_progress("punching out zero pages")
        zero = punch_zeros(memory)
        state = (build / "state").read_bytes()
        found = os.fstat(memory)
    finally:
        os.close(memory)
    return TemplateInfo(
        directory=build,
        created=created,
        made_of=parts,
        memory_bytes=found.st_size,
        memory_allocated_bytes=found.st_blocks * 512,
        memory_mtime_ns=found.st_mtime_ns,
        state_bytes=len(state),
        state_crc32=zlib.crc32(state),
        booted_bytes=booted,
        given_back_bytes=max(0, booted - squeezed),
        zero_bytes=zero,
    )


# -- the folder


@asynccontextmanager
async def _builders_lock(
    path: Path, timeout_s: float, on_progress: OnProgress = lambda step: None
) -> AsyncIterator[None]:
    """Whoever holds it changes what is in `path`. It ends with its holder, however that ends.

    Raises DeadlineExceededError when another holds it too long.
    """
    lock = _lock_file(path)
    deadline = asyncio.get_running_loop().time() + timeout_s
    waited = False
    while (fd := _try_lock(path, lock)) is None:
        if not waited:
            on_progress("waiting for another builder")
            waited = True
        if asyncio.get_running_loop().time() > deadline:
            raise DeadlineExceededError(
                f"template_path {path}: another builder holds {lock} for more than {timeout_s:g} s"
            )
        await asyncio.sleep(_LOCK_POLL_S)
    try:
        yield
    finally:
        os.close(fd)


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _try_lock(path: Path, lock: Path) -> int | None:
    """A descriptor that holds it; None: somebody else does. Raises KataError."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise KataError(f"template_path {path}: {error}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between the two it may have been removed, with its template.
        if os.path.samestat(os.fstat(fd), lock.stat()):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return None


def _mount_tmpfs(path: Path, memory_bytes: int) -> None:
    """Have room on a tmpfs for one more template. Raises KataError; never makes one on a disk."""
    path.mkdir(exist_ok=True, mode=0o700)
    if not os.path.ismount(path):
        if any(path.iterdir()):
            raise FailedPreconditionError(
                f"template_path {path} is a folder with files in it, expected a tmpfs or an empty folder"
            )
        options = f"size={memory_bytes + _ROOM_BYTES},mode=0700"
        mount.mount("kata-py-template", path, "tmpfs", _MOUNT_FLAGS, options)
    if (kind := mount.mounted_type(path)) != "tmpfs":
        raise FailedPreconditionError(
            f"template_path {path} is on {kind or 'a part of another file system'}, expected tmpfs: clones "
            "would read their memory from a disk"
        )
    _check_folder(path)
    found = os.statvfs(path)
    used = (found.f_blocks - found.f_bfree) * found.f_frsize
    if found.f_bavail * found.f_frsize < memory_bytes + _ROOM_BYTES:
        options = f"size={used + memory_bytes + _ROOM_BYTES},mode=0700"
        mount.mount("", path, "", mount.MS_REMOUNT | _MOUNT_FLAGS, options)


def _write(path: Path, text: str) -> None:
    """Atomically, for root alone."""
    temporary = path.with_name(f".{path.name}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)
    temporary.rename(path)


# -- failures


def _failed_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.failed")


def _note_failure(
    path: Path, parts: dict[str, str], reason: str | None, *, of: TemplateInfo | None = None
) -> None:
    """Remember that there can be no such template; None: forget it. `of`: and do not use this one again."""
    failed = _failed_file(path)
    with suppress(OSError):
        if reason is None:
            failed.unlink(missing_ok=True)
            return
        # One that was replaced or removed meanwhile concerns nobody any more.
        if of is not None and (path / "current").readlink().name != of.directory.name:
            return
        _write(failed, json.dumps({"at": time.time(), "made_of": parts, "reason": reason}))
        if of is not None:
            (path / "current").unlink()


def _check_failure(path: Path, parts: dict[str, str], asked_at: float) -> None:
    """Raise what another builder has failed with, when that is news."""
    try:
        found = json.loads(_failed_file(path).read_text())
        at, made_of_, reason = float(found["at"]), found["made_of"], str(found["reason"])
    except (OSError, ValueError, TypeError, KeyError):
        return
    ago = time.time() - at
    # In the future: the host's clock was set back.
    if made_of_ == parts and ago >= 0 and (at > asked_at or ago < _FAILURE_KEPT_S):
        raise KataError(f"tried {ago:.0f} s ago: {reason}")
