import socket
from pathlib import Path

import pytest

from virtcontainers.config import AgentTransport
from virtcontainers.errors import InvalidArgumentError
from virtcontainers.hypervisor.vhost_vsock import (
    FIRST_CID,
    LAST_CID,
    choose_cid,
    connected,
    find_context_id,
    find_vhost_device_vsock,
    resolve_transport,
    unread_bytes,
)


def test_a_taken_context_id_is_not_used() -> None:
    tried: list[int] = []

    def claim(cid: int) -> bool:
        tried.append(cid)
        return len(tried) == 3

    assert choose_cid(claim) == tried[2]
    assert len(set(tried)) == 3
    assert all(FIRST_CID <= cid <= LAST_CID for cid in tried)


def test_a_host_without_free_context_ids_is_an_error() -> None:
    with pytest.raises(InvalidArgumentError, match="no free vsock context id"):
        choose_cid(lambda cid: False)


def test_no_vhost_vsock_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r'modules?.*transport = "serial"'):
        find_context_id(tmp_path / "vhost-vsock")


def test_a_device_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "vhost-vsock").touch()
    with pytest.raises(InvalidArgumentError, match="refuses a context id"):
        find_context_id(tmp_path / "vhost-vsock")


def test_auto_takes_vsock_where_the_host_has_it(tmp_path: Path) -> None:
    device = tmp_path / "vhost-vsock"
    assert resolve_transport(AgentTransport.AUTO, device) is AgentTransport.SERIAL
    device.touch()
    assert resolve_transport(AgentTransport.AUTO, device) is AgentTransport.VSOCK


@pytest.mark.parametrize("wanted", [AgentTransport.SERIAL, AgentTransport.HVSOCK, AgentTransport.VSOCK])
def test_a_configured_transport_is_taken(tmp_path: Path, wanted: AgentTransport) -> None:
    assert resolve_transport(wanted, tmp_path / "none") is wanted


def test_no_vhost_device_vsock_names_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=str(tmp_path / "x")):
        find_vhost_device_vsock([tmp_path / "x"])


def test_whether_the_daemon_has_read_everything(tmp_path: Path) -> None:
    path = tmp_path / "vhost-vsock.sock"
    assert connected(path) is None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert connected(path) is None, "it does not listen yet"
        listener.listen()
        connection = connected(path)
        assert connection is not None
        daemon, _ = listener.accept()
        with connection, daemon:
            assert unread_bytes(connection) == 0
            connection.sendall(b"rings")
            assert daemon.recv(2) == b"ri"
            assert unread_bytes(connection) > 0
            assert daemon.recv(10) == b"ngs"
            assert unread_bytes(connection) == 0
