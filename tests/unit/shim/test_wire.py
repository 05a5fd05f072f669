"""The hand-made wire format against protobuf's own."""

from hypothesis import given
from hypothesis import strategies as st

from shim.delete import response
from shim.protocols.bootstrap_pb2 import BootstrapParams, BootstrapResult
from shim.protocols.task_v2_pb2 import DeleteResponse
from shim.wire import decode, encode


@given(st.text(), st.text(), st.integers(-(1 << 31), (1 << 31) - 1), st.text())
def test_decode_reads_what_protobuf_writes(id_: str, namespace: str, level: int, directory: str) -> None:
    params = BootstrapParams(instance_id=id_, namespace=namespace, socket_dir=directory)
    params.log_level = level  # type: ignore[assignment] # an open enum
    params.extensions.add().value.Pack(BootstrapResult(version=3))
    fields = decode(params.SerializeToString())
    assert fields is not None
    assert fields.get(1, b"") == id_.encode()
    assert fields.get(2, b"") == namespace.encode()
    assert fields.get(3, 0) == level % (1 << 64)
    assert fields.get(9) == directory.encode()


@given(st.integers(0, (1 << 31) - 1), st.text())
def test_protobuf_reads_what_encode_writes(version: int, address: str) -> None:
    data = encode(1, version) + encode(2, address.encode())
    assert BootstrapResult.FromString(data) == BootstrapResult(version=version, address=address)


@given(st.binary())
def test_decode_survives_anything(data: bytes) -> None:
    decode(data)


def test_the_answer_to_delete() -> None:
    answer = DeleteResponse.FromString(response(4711))
    assert (answer.pid, answer.exit_status) == (4711, 137)
    assert answer.exited_at.ToSeconds() > 1_700_000_000
