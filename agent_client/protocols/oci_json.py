"""Between an OCI runtime spec as JSON (runtime-spec 1.2, `linux`) and the agent's messages of oci.proto.

The messages are the Go structs of runtime-spec, so a field's JSON key follows from its name (`OOMScoreAdj`
is `oomScoreAdj`), and the walk over descriptor and JSON is the same for all of them. To know:

- The messages are older than the spec: what has no field is listed in `UNCARRIED`, does not reach the
  guest, and is named in one warning when a spec uses it. Keys that runtime-spec does not know (its
  "extensibility") are dropped as well, as are `solaris` and `windows`.
- An optional number that is 0 looks like one that is absent, as in Kata: `swappiness: 0` and
  `oomScoreAdj: 0` are not carried. `errnoRet: 0` is, having a presence of its own.
- Kata's agent takes an absent `errnoRet` for 0, which would make a forbidden syscall look successful; so the
  spec's default, EPERM, is written out.
"""

from __future__ import annotations

import errno
import logging
import re
from functools import cache
from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from agent_client.protocols import oci_pb2

log = logging.getLogger(__name__)

UNCARRIED = (
    "domainname",
    "mounts[].uidMappings",
    "mounts[].gidMappings",
    "process.execCPUAffinity",
    "process.ioPriority",
    "process.scheduler",
    "process.user.umask",
    "linux.intelRdt.closID",
    "linux.intelRdt.enableCMT",
    "linux.intelRdt.enableMBM",
    "linux.intelRdt.memBwSchema",
    "linux.personality",
    "linux.resources.cpu.burst",
    "linux.resources.cpu.idle",
    "linux.resources.memory.checkBeforeUpdate",
    "linux.resources.memory.useHierarchy",
    "linux.resources.rdma",
    "linux.resources.unified",
    "linux.seccomp.defaultErrnoRet",
    "linux.seccomp.listenerMetadata",
    "linux.seccomp.listenerPath",
    "linux.timeOffsets",
    # runtime-spec 1.3
    "linux.intelRdt.enableMonitoring",
    "linux.intelRdt.schemata",
    "linux.memoryPolicy",
    "linux.netDevices",
)
"""Where a runtime-spec says something that Kata's messages have no place for."""

_JSON_KEYS = {
    "Spec.Version": "ociVersion",
    "LinuxHugepageLimit.Pagesize": "pageSize",
    "LinuxSyscall.errnoret": "errnoRet",
}
"""The fields whose JSON key does not follow from their name."""

_REQUIRED = {
    "Spec": {"ociVersion"},
    "Root": {"path"},
    "Mount": {"destination"},
    "Process": {"user", "cwd"},
    "User": {"uid", "gid"},
    "Box": {"height", "width"},
    "POSIXRlimit": {"type", "hard", "soft"},
    "Hook": {"path"},
    "LinuxNamespace": {"type"},
    "LinuxIDMapping": {"containerID", "hostID", "size"},
    "LinuxDevice": {"path", "type", "major", "minor"},
    "LinuxDeviceCgroup": {"allow"},
    "LinuxPids": {"limit"},
    "LinuxWeightDevice": {"major", "minor"},
    "LinuxThrottleDevice": {"major", "minor", "rate"},
    "LinuxHugepageLimit": {"pageSize", "limit"},
    "LinuxInterfacePriority": {"name", "priority"},
    "LinuxSeccomp": {"defaultAction"},
    "LinuxSyscall": {"names", "action"},
    "LinuxSeccompArg": {"index", "value", "op"},
}
"""Keys that runtime-spec (specs-go/config.go: no omitempty) wants even when they are 0 or empty."""

_PYTHON_TYPES = {
    FieldDescriptor.CPPTYPE_STRING: str,
    FieldDescriptor.CPPTYPE_BOOL: bool,
    FieldDescriptor.CPPTYPE_INT64: int,
    FieldDescriptor.CPPTYPE_UINT32: int,
    FieldDescriptor.CPPTYPE_UINT64: int,
}

_RANGES = {
    FieldDescriptor.CPPTYPE_INT64: range(-(1 << 63), 1 << 63),
    FieldDescriptor.CPPTYPE_UINT32: range(1 << 32),
    FieldDescriptor.CPPTYPE_UINT64: range(1 << 64),
}

_JSON_TYPES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "an integer"}

MessageT = TypeVar("MessageT", bound=Message)


class SpecError(ValueError):
    """A value of the wrong type or size: its JSON path, what was found and what is expected."""


def spec_from_json(spec: dict[str, Any]) -> oci_pb2.Spec:
    """Raises SpecError."""
    return _from_json(oci_pb2.Spec(), spec, "")


def process_from_json(process: dict[str, Any]) -> oci_pb2.Process:
    """Raises SpecError."""
    return _from_json(oci_pb2.Process(), process, "process")


def resources_from_json(resources: dict[str, Any]) -> oci_pb2.LinuxResources:
    """Raises SpecError."""
    return _from_json(oci_pb2.LinuxResources(), resources, "linux.resources")


def spec_to_json(spec: oci_pb2.Spec) -> dict[str, Any]:
    return _to_json(spec)


def process_to_json(process: oci_pb2.Process) -> dict[str, Any]:
    return _to_json(process)


def resources_to_json(resources: oci_pb2.LinuxResources) -> dict[str, Any]:
    return _to_json(resources)


@cache
def _fields(descriptor: Descriptor) -> dict[str, FieldDescriptor]:
    """JSON key -> field."""
    return {
        _JSON_KEYS.get(f"{descriptor.name}.{field.name}") or _json_key(field.name): field
        for field in descriptor.fields
        if field.name not in ("Solaris", "Windows")
    }


def _json_key(name: str) -> str:
    """Go's habit: the first word in lower case, also where it is an abbreviation (OOMScoreAdj, CPU)."""
    return re.sub(r"^([A-Z]+(?=[A-Z][a-z])|[A-Z]+$|[A-Z])", lambda word: word[0].lower(), name)


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _from_json(message: MessageT, source: Any, path: str) -> MessageT:
    uncarried: set[str] = set()
    try:
        _fill(message, source, path, uncarried)
    except UnicodeEncodeError as error:  # a lone surrogate: JSON can say it, protobuf cannot
        raise SpecError(f"{path or 'spec'}: found {error.object!r:.60}, expected valid text") from None
    _report(uncarried)
    return message


def _fill(message: Message, source: Any, path: str, uncarried: set[str]) -> None:
    fields = _fields(message.DESCRIPTOR)
    for key, value in _expect(dict, source, path).items():
        where = f"{path}.{key}" if path else key
        field = fields.get(key)
        if field is None:
            uncarried.add(re.sub(r"\[\d+\]", "[]", where))
        elif value is None:
            pass  # Go's way of writing an absent slice, map or pointer
        elif _is_map(field):
            target = getattr(message, field.name)
            for name, text in _expect(dict, value, where).items():
                target[name] = _expect(str, text, f"{where}.{name}")
        elif field.is_repeated:
            target = getattr(message, field.name)
            for index, item in enumerate(_expect(list, value, where)):
                if field.message_type:
                    _fill(target.add(), item, f"{where}[{index}]", uncarried)
                else:
                    target.append(_scalar(field, item, f"{where}[{index}]"))
        elif field.message_type:
            target = getattr(message, field.name)
            target.SetInParent()
            _fill(target, value, where, uncarried)
        else:
            setattr(message, field.name, _scalar(field, value, where))
    if isinstance(message, oci_pb2.LinuxSyscall):
        _write_out_errno(message)


def _write_out_errno(syscall: oci_pb2.LinuxSyscall) -> None:
    if syscall.Action in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE") and not syscall.HasField("errnoret"):
        syscall.errnoret = errno.EPERM


def _scalar(field: FieldDescriptor, value: Any, path: str) -> Any:
    _expect(_PYTHON_TYPES[field.cpp_type], value, path)
    bounds = _RANGES.get(field.cpp_type)
    if bounds and value not in bounds:
        raise SpecError(f"{path}: found {value}, expected {bounds.start} to {bounds.stop - 1}")
    return value


def _expect(kind: type, value: Any, path: str) -> Any:
    # Not isinstance: a bool is an int to Python, and not to a spec.
    if type(value) is not kind:
        found = "null" if value is None else f"{value!r:.60}"
        raise SpecError(f"{path or 'spec'}: found {found}, expected {_JSON_TYPES[kind]}")
    return value


@cache
def _warn(path: str) -> None:
    log.warning("the Kata agent's messages have no place for %s of the OCI spec: not applied", path)


def _report(paths: set[str]) -> None:
    """Once per process and path: a pod's containers and execs tend to use the same fields."""
    for path in sorted(paths):
        if path in UNCARRIED:
            _warn(path)
        else:
            log.debug("%s of the OCI spec is not sent to the guest", path)


def _to_json(message: Message) -> dict[str, Any]:
    required = _REQUIRED.get(message.DESCRIPTOR.name, ())
    result: dict[str, Any] = {}
    for key, field in _fields(message.DESCRIPTOR).items():
        value = getattr(message, field.name)
        if _is_map(field):
            value = dict(value)
        elif field.is_repeated:
            value = [_to_json(item) for item in value] if field.message_type else list(value)
        elif field.has_presence:
            if key not in required and not message.HasField(field.name):
                continue
            result[key] = _to_json(value) if field.message_type else value
            continue
        if value or key in required:
            result[key] = value
    return result
