import json
import logging
from copy import deepcopy
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from agent_client.protocols import oci_json, oci_pb2
from agent_client.protocols.oci_json import (
    UNCARRIED,
    SpecError,
    process_from_json,
    process_to_json,
    resources_from_json,
    resources_to_json,
    spec_from_json,
    spec_to_json,
)

# Everything that runtime-spec 1.2 has for Linux, with a value of its own for each field.
CARRIED: dict[str, Any] = {
    "ociVersion": "1.2.1",
    "process": {
        "terminal": True,
        "consoleSize": {"height": 24, "width": 80},
        "user": {"uid": 1000, "gid": 1001, "additionalGids": [5, 4294967295], "username": "somebody"},
        "args": ["/bin/sh", "-c", "echo ü", ""],
        "env": ["PATH=/bin", "EMPTY="],
        "cwd": "/home",
        "capabilities": {
            "bounding": ["CAP_CHOWN", "CAP_KILL"],
            "effective": ["CAP_CHOWN"],
            "inheritable": ["CAP_KILL"],
            "permitted": ["CAP_SETUID"],
            "ambient": ["CAP_NET_RAW"],
        },
        "rlimits": [
            {"type": "RLIMIT_NOFILE", "hard": 18446744073709551615, "soft": 1024},
            {"type": "RLIMIT_CORE", "hard": 0, "soft": 0},
        ],
        "noNewPrivileges": True,
        "apparmorProfile": "kata-default",
        "oomScoreAdj": -997,
        "selinuxLabel": "system_u:system_r:container_t:s0:c1,c2",
    },
    "root": {"path": "rootfs", "readonly": True},
    "hostname": "pod",
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec"]},
        {"destination": "/data", "source": "/srv/data", "options": ["rbind", "ro"]},
    ],
    "hooks": {
        "prestart": [{"path": "/bin/a", "args": ["a", "b"], "env": ["K=V"], "timeout": 5}],
        "createRuntime": [{"path": "/bin/b", "args": ["b"], "env": ["K=0"], "timeout": 6}],
        "createContainer": [{"path": "/bin/c", "args": ["c"], "env": ["K=1"], "timeout": 7}],
        "startContainer": [{"path": "/bin/d", "args": ["d"], "env": ["K=2"], "timeout": 8}],
        "poststart": [{"path": "/bin/e", "args": ["e"], "env": ["K=3"], "timeout": 9}],
        "poststop": [{"path": "/bin/f", "args": ["f"], "env": ["K=4"], "timeout": 10}],
    },
    "annotations": {"io.kubernetes.cri.container-type": "container", "empty": ""},
    "linux": {
        "uidMappings": [{"containerID": 5, "hostID": 100000, "size": 65536}],
        "gidMappings": [{"containerID": 1, "hostID": 200000, "size": 1}],
        "sysctl": {"net.ipv4.ip_forward": "1", "net.core.somaxconn": "256"},
        "resources": {
            "devices": [
                {"allow": False, "access": "rwm"},
                {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rw"},
                {"allow": True, "type": "b", "major": 8, "minor": -1, "access": "r"},
            ],
            "memory": {
                "limit": 536870912,
                "reservation": 268435456,
                "swap": -1,
                "kernel": -1,
                "kernelTCP": 1048576,
                "swappiness": 60,
                "disableOOMKiller": True,
            },
            "cpu": {
                "shares": 1024,
                "quota": -1,
                "period": 100000,
                "realtimeRuntime": 950000,
                "realtimePeriod": 1000000,
                "cpus": "0-1,3",
                "mems": "0",
            },
            "pids": {"limit": -1},
            "blockIO": {
                "weight": 500,
                "leafWeight": 300,
                "weightDevice": [{"major": 8, "minor": 16, "weight": 600, "leafWeight": 350}],
                "throttleReadBpsDevice": [{"major": 8, "minor": 1, "rate": 1}],
                "throttleWriteBpsDevice": [{"major": 8, "minor": 2, "rate": 2}],
                "throttleReadIOPSDevice": [{"major": 8, "minor": 3, "rate": 3}],
                "throttleWriteIOPSDevice": [{"major": 8, "minor": 4, "rate": 4}],
            },
            "hugepageLimits": [{"pageSize": "2MB", "limit": 209715200}, {"pageSize": "1GB", "limit": 0}],
            "network": {"classID": 1048577, "priorities": [{"name": "eth0", "priority": 500}]},
        },
        "cgroupsPath": "kubepods.slice:cri:abc",
        "namespaces": [
            {"type": "pid"},
            {"type": "network", "path": "/var/run/netns/x"},
            {"type": "ipc"},
            {"type": "uts"},
            {"type": "mount"},
            {"type": "user"},
            {"type": "cgroup"},
            {"type": "time"},
        ],
        "devices": [
            {
                "path": "/dev/fuse",
                "type": "c",
                "major": 10,
                "minor": 229,
                "fileMode": 438,
                "uid": 1,
                "gid": 2,
            },
            {"path": "/dev/fifo", "type": "p", "major": 0, "minor": 0},
        ],
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X32"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [
                {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"},
                {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
                {"names": ["getcwd"], "action": "SCMP_ACT_ERRNO", "errnoRet": 0},
                {
                    "names": ["personality"],
                    "action": "SCMP_ACT_ALLOW",
                    "args": [
                        {
                            "index": 0,
                            "value": 18446744073709551615,
                            "valueTwo": 7,
                            "op": "SCMP_CMP_MASKED_EQ",
                        },
                        {"index": 1, "value": 0, "op": "SCMP_CMP_EQ"},
                    ],
                },
            ],
        },
        "rootfsPropagation": "rslave",
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
        "mountLabel": "system_u:object_r:container_file_t:s0",
        "intelRdt": {"l3CacheSchema": "L3:0=f;1=f0"},
    },
}

# The rest of runtime-spec 1.2 and 1.3 for Linux: what the Kata messages have no place for.
BEYOND: dict[str, Any] = {
    "domainname": "example.org",
    "process": {
        "user": {"umask": 18},
        "scheduler": {"policy": "SCHED_FIFO", "priority": 10, "flags": ["SCHED_FLAG_RESET_ON_FORK"]},
        "ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 4},
        "execCPUAffinity": {"initial": "0", "final": "1"},
    },
    "mounts": [
        {
            "uidMappings": [{"containerID": 0, "hostID": 1, "size": 1}],
            "gidMappings": [{"containerID": 0, "hostID": 1, "size": 1}],
        }
    ],
    "linux": {
        "personality": {"domain": "LINUX32"},
        "timeOffsets": {"boottime": {"secs": 50}},
        "netDevices": {"eth1": {"name": "container_eth1"}},
        "memoryPolicy": {"mode": "MPOL_BIND", "nodes": "0"},
        "resources": {
            "cpu": {"burst": 1000, "idle": 1},
            "memory": {"useHierarchy": True, "checkBeforeUpdate": True},
            "rdma": {"mlx5_1": {"hcaHandles": 3, "hcaObjects": 10000}},
            "unified": {"memory.high": "100000"},
        },
        "seccomp": {"defaultErrnoRet": 1, "listenerPath": "/run/l.sock", "listenerMetadata": "x"},
        "intelRdt": {
            "closID": "c",
            "memBwSchema": "MB:0=20",
            "enableCMT": True,
            "enableMBM": True,
            "enableMonitoring": True,
            "schemata": ["L3:0=f"],
        },
    },
}


def merge(into: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    for key, value in other.items():
        if isinstance(value, dict):
            merge(into.setdefault(key, {}), value)
        elif isinstance(value, list) and key in into:
            for mine, theirs in zip(into[key], value, strict=False):
                merge(mine, theirs)
        else:
            into[key] = value
    return into


def fill(message: Message, seed: int = 1) -> int:
    """Give every field of `message`, at every depth, a value that no other field has."""
    for field in message.DESCRIPTOR.fields:
        if field.name in ("Solaris", "Windows"):
            continue
        target = getattr(message, field.name)
        if field.message_type and field.message_type.GetOptions().map_entry:
            for _ in range(2):
                seed += 1
                target[f"key {seed}"] = f"value {seed}"
        elif field.message_type and field.is_repeated:
            seed = fill(target.add(), fill(target.add(), seed))
        elif field.message_type:
            seed = fill(target, seed)
        else:
            seed += 1
            value: Any = {
                FieldDescriptor.CPPTYPE_STRING: f"text {seed}",
                FieldDescriptor.CPPTYPE_BOOL: True,
            }.get(field.cpp_type, seed)
            if field.is_repeated:
                target.extend([value, value])
            else:
                setattr(message, field.name, value)
    return seed


@pytest.fixture(autouse=True)
def forget_warnings():
    oci_json._warn.cache_clear()


def test_a_spec_with_every_field_of_the_messages_comes_back():
    spec = oci_pb2.Spec()
    assert fill(spec) > 150

    encoded = json.loads(json.dumps(spec_to_json(spec)))
    assert spec_from_json(encoded) == spec
    assert spec_from_json(encoded).SerializeToString(deterministic=True) == spec.SerializeToString(
        deterministic=True
    )


def test_a_full_spec_comes_back(caplog):
    assert spec_to_json(spec_from_json(CARRIED)) == CARRIED
    assert not caplog.records


def test_the_full_spec_sets_every_field():
    unset = []

    def walk(message: Message, path: str) -> None:
        for field in message.DESCRIPTOR.fields:
            if path == "" and field.name in ("Solaris", "Windows"):
                continue
            value = getattr(message, field.name)
            if field.is_repeated:
                if not value:
                    unset.append(f"{path}.{field.name}")
                elif field.message_type and not field.message_type.GetOptions().map_entry:
                    merged = type(value[0])()
                    for item in value:
                        merged.MergeFrom(item)
                    walk(merged, f"{path}.{field.name}[]")
            elif field.message_type:
                walk(value, f"{path}.{field.name}")
            elif not value and not (field.has_presence and message.HasField(field.name)):
                unset.append(f"{path}.{field.name}")

    spec = spec_from_json(CARRIED)
    walk(spec, "")
    assert unset == []


def test_the_messages_say_what_the_spec_says():
    spec = spec_from_json(CARRIED)

    assert spec.Version == "1.2.1"
    assert spec.Process.User.AdditionalGids == [5, 4294967295]
    assert spec.Process.OOMScoreAdj == -997
    assert spec.Process.Rlimits[0].Hard == 2**64 - 1
    assert spec.Linux.Resources.Memory.KernelTCP == 1048576
    assert spec.Linux.Resources.CPU.Quota == -1
    assert spec.Linux.Resources.HugepageLimits[0].Pagesize == "2MB"
    assert spec.Linux.Resources.BlockIO.ThrottleWriteIOPSDevice[0].Rate == 4
    assert spec.Linux.IntelRdt.L3CacheSchema == "L3:0=f;1=f0"
    assert spec.Hooks.CreateContainer[0].Path == "/bin/c"
    assert not spec.HasField("Solaris")


def test_what_has_no_place_is_known_and_warned_of_once(caplog):
    full = merge(deepcopy(CARRIED), BEYOND)

    assert spec_to_json(spec_from_json(full)) == CARRIED
    spec_from_json(full)

    warned = [record.args[0] for record in caplog.records if record.levelno >= logging.WARNING]
    assert sorted(warned) == sorted(UNCARRIED)


def test_processes_and_resources_name_the_same_paths(caplog):
    process_from_json({"user": {"uid": 0, "gid": 0, "umask": 18}, "cwd": "/"})
    resources_from_json({"unified": {"memory.high": "1"}})

    assert "process.user.umask" in caplog.text
    assert "linux.resources.unified" in caplog.text


def test_a_key_that_runtime_spec_does_not_know_is_dropped_without_a_warning(caplog):
    assert spec_to_json(spec_from_json({"ociVersion": "1.0", "vendor": {"x": 1}})) == {"ociVersion": "1.0"}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_processes_and_resources_come_back():
    process, resources = CARRIED["process"], CARRIED["linux"]["resources"]

    assert process_to_json(process_from_json(process)) == process
    assert resources_to_json(resources_from_json(resources)) == resources


def test_required_keys_are_written_when_they_are_zero():
    process = process_to_json(oci_pb2.Process(Rlimits=[oci_pb2.POSIXRlimit(Type="RLIMIT_CORE")]))

    assert process == {
        "user": {"uid": 0, "gid": 0},
        "cwd": "",
        "rlimits": [{"type": "RLIMIT_CORE", "hard": 0, "soft": 0}],
    }


def test_present_but_empty_objects_stay_present():
    spec = {"ociVersion": "1.0", "linux": {"resources": {"memory": {}, "cpu": {}}}, "hooks": {}}

    assert spec_to_json(spec_from_json(spec)) == spec


def test_null_is_absent():
    spec = {"ociVersion": "1.0", "process": None, "mounts": None, "hostname": None, "linux": {"sysctl": None}}

    assert spec_to_json(spec_from_json(spec)) == {"ociVersion": "1.0", "linux": {}}


def test_an_error_action_without_errno_gets_the_default_of_the_spec():
    rules = [
        {"names": ["mount"], "action": "SCMP_ACT_ERRNO"},
        {"names": ["ptrace"], "action": "SCMP_ACT_TRACE"},
        {"names": ["read"], "action": "SCMP_ACT_ALLOW"},
    ]
    seccomp = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}

    sent = spec_from_json({"ociVersion": "1.0", "linux": {"seccomp": seccomp}}).Linux.Seccomp.Syscalls

    assert [(rule.HasField("errnoret"), rule.errnoret) for rule in sent] == [(True, 1), (True, 1), (False, 0)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], r"^spec: found \[\], expected an object$"),
        ({"process": {"args": ["sh", 3]}}, r"^process\.args\[1\]: found 3, expected a string$"),
        ({"process": {"args": "sh"}}, r"^process\.args: found 'sh', expected a list$"),
        ({"process": {"terminal": "yes"}}, r"^process\.terminal: found 'yes', expected true or false$"),
        ({"process": {"user": {"uid": True}}}, r"^process\.user\.uid: found True, expected an integer$"),
        ({"process": {"user": {"uid": 1.0}}}, r"^process\.user\.uid: found 1\.0, expected an integer$"),
        ({"process": {"user": {"uid": -1}}}, r"^process\.user\.uid: found -1, expected 0 to 4294967295$"),
        ({"linux": {"resources": {"cpu": {"quota": 1 << 63}}}}, r"^linux\.resources\.cpu\.quota: found 9223"),
        ({"linux": {"sysctl": {"a.b": 1}}}, r"^linux\.sysctl\.a\.b: found 1, expected a string$"),
        ({"mounts": [None]}, r"^mounts\[0\]: found null, expected an object$"),
        ({"hostname": "\ud800"}, r"^spec: found '\\ud800', expected valid text$"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(spec, message):
    with pytest.raises(SpecError, match=message):
        spec_from_json(spec)
