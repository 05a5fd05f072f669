"""What the first container of a machine would have to wait for, done while nobody waits.

A host that builds a template connects, and goes; its clones then find all of this done, in memory they share.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os

from google.protobuf.message import Message

from agent_client.protocols import oci_json, oci_pb2
from guest.agent.sandbox import Sandbox
from ttrpc import StatusError

log = logging.getLogger(__name__)

_9P_DRIVER = "/sys/bus/virtio/drivers/9pnet_virtio"
"""There once a machine has such a device."""


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
        _prepare_devices()
        _prepare_network()
    # Python's collector writes to every object it looks at: clones go on sharing those that are there.
    gc.collect()
    gc.freeze()
    ctypes.CDLL(None).malloc_trim(0)


def _prepare_devices() -> None:
    """Drivers of what clones are given while their hosts wait: a clone that is given none has them at no
    cost. And the file system of the share, for which the kernel would call modprobe."""
    from guest.agent import device, uevent
    from guest.agent.modules import load_module

    for driver in (device.DRIVER_BLK, device.DRIVER_SCSI):
        device.load_modules(driver)
    for module in ("virtio_net", "ext4", "9p" if os.path.isdir(_9P_DRIVER) else "virtiofs"):
        try:
            load_module(module)
        except OSError as error:
            log.warning("module %s: %s", module, error)
    uevent.has_drivers()


def _prepare_network() -> None:
    """What sets up the interface that most pods are given."""
    from guest.agent import network

    try:
        network.list_interfaces()
        network.list_routes()
    except (OSError, StatusError) as error:
        log.warning("network: %s", error)


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
