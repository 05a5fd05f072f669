"""CopyFile: files the host sends because it shares no file system."""

from __future__ import annotations

import contextlib
import os
import stat

from agent_client.protocols import agent_pb2
from ttrpc import Code, StatusError

SHARED_DIRECTORY = "/run/kata-containers/shared/containers"

_copied = False
"""Whether anything was, ever: where files are shared there is nothing to remove."""


def copy_file(request: agent_pb2.CopyFileRequest, root: str = SHARED_DIRECTORY) -> None:
    """Write one piece of a file, or make a directory or a symbolic link, below `root` and nowhere else.

    The file appears under its name once it has its whole size. No link on the way is followed.
    """
    path = request.path
    parts = path.removeprefix(root + "/").split("/")
    if not path.startswith(root + "/") or any(part in ("", ".", "..") for part in parts):
        raise StatusError(Code.INVALID_ARGUMENT, f"{path!r} is no canonical path below {root}")
    global _copied
    _copied = True
    os.makedirs(root, exist_ok=True)
    *parents, name = parts
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parents:
            directory = _descend(directory, part, request)
        _place(directory, name, request)
    finally:
        os.close(directory)


def _descend(directory: int, name: str, request: agent_pb2.CopyFileRequest) -> int:
    """The directory below; closes `directory` when it has it."""
    made = False
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, request.dir_mode & 0o777, dir_fd=directory)
        made = True
    below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    if made:
        os.fchmod(below, request.dir_mode & 0o777)
        os.fchown(below, request.uid, request.gid)
    os.close(directory)
    return below


def _place(directory: int, name: str, request: agent_pb2.CopyFileRequest) -> None:
    kind, mode = stat.S_IFMT(request.file_mode), request.file_mode & 0o7777
    if kind == stat.S_IFDIR:
        _remove(directory, name, directories=False)
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, mode, dir_fd=directory)
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            os.fchown(fd, request.uid, request.gid)
            os.fchmod(fd, mode)
        finally:
            os.close(fd)
        return
    if kind == stat.S_IFLNK:
        partial = f"{name}.tmp"
        _remove(directory, partial)
        os.symlink(os.fsdecode(request.data), partial, dir_fd=directory)
        os.chown(partial, request.uid, request.gid, dir_fd=directory, follow_symlinks=False)
        # A link that is changed is never missing: kubelet's `..data` is what all others lead through.
        _remove(directory, name, files=False)
        os.rename(partial, name, src_dir_fd=directory, dst_dir_fd=directory)
        return
    partial = f"{name}.tmp"
    if request.offset == 0:
        _remove(directory, partial)
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(partial, flags, 0o600, dir_fd=directory)
    try:
        view, offset = memoryview(request.data), request.offset
        while view:
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written
        if os.fstat(fd).st_size != request.file_size:
            return
        os.fchown(fd, request.uid, request.gid)
        os.fchmod(fd, mode)
    finally:
        os.close(fd)
    _remove(directory, name, files=False)
    os.rename(partial, name, src_dir_fd=directory, dst_dir_fd=directory)


def remove_copies(container_id: str, root: str = SHARED_DIRECTORY) -> None:
    """What was copied for a container, under Kata's names for that, if anything was."""
    global _copied
    if not _copied:
        return
    import re

    ours = re.compile(re.escape(container_id) + r"-[0-9a-f]{16}-")
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in os.listdir(directory):
            if ours.match(name):
                _remove(directory, name)
    finally:
        os.close(directory)


def _remove(directory: int, name: str, *, directories: bool = True, files: bool = True) -> None:
    """What has the name, if anything has; with `directories` also a whole tree."""
    try:
        kind = os.lstat(name, dir_fd=directory).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(kind):
        if files:
            os.unlink(name, dir_fd=directory)
    elif directories:
        import shutil

        shutil.rmtree(name, dir_fd=directory)
