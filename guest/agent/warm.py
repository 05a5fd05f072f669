"""What the first container of a machine would have to wait for, done while nobody waits.

A host that builds a template connects, and goes; its clones then find all of this done, in memory they share.
"""

from __future__ import annotations

import ctypes
import gc
import logging

from google.protobuf.message import Message

from agent_client.protocols import oci_json, oci_pb2
from guest.agent.sandbox import Sandbox
from ttrpc import StatusError

log = logging.getLogger(__name__)


def warm_up(sandbox: Sandbox, *, is_init: bool) -> None:
    """Blocks for some 0.1 s of an emulated machine. What fails is logged: it will fail again, and be told,
    when it is wanted."""
    spec = oci_pb2.Spec()
    _fill(spec)
    # Its modules and its tables.
    oci_json.spec_to_json(spec)
    try:
        sandbox.prepare()
    except OSError as error:
        log.warning("crun: %s", error)
    if is_init:
        _prepare_network()
        _prepare_disks()
    # Python's collector writes to every object it looks at: clones go on sharing those that are there.
    gc.collect()
    gc.freeze()
    ctypes.CDLL(None).malloc_trim(0)


def _prepare_network() -> None:
    """For the interface that most pods are given: its driver, and what sets it up."""
    from guest.agent import network
    from guest.agent.modules import load_module

    try:
        load_module("virtio_net")
        network.list_interfaces()
        network.list_routes()
    except (OSError, StatusError) as error:
        log.warning("network: %s", error)


def _prepare_disks() -> None:
    """For a root that is a disk, by either driver: a clone that has none has them at no cost."""
    from guest.agent import device
    from guest.agent.modules import load_module

    device.load_modules(device.DRIVER_BLK)
    device.load_modules(device.DRIVER_SCSI)
    try:
        load_module("ext4")
    except OSError as error:
        log.warning("ext4: %s", error)


def _fill(message: Message) -> None:
    """One of every message in it."""
    for field in message.DESCRIPTOR.fields:
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        value = getattr(message, field.name)
        if field.is_repeated:
            value = value.add()
        else:
            value.SetInParent()
        _fill(value)
