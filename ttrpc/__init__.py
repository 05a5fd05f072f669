"""containerd's ttrpc, client and server, on asyncio and for any protobuf service.

    client = await ttrpc.Client.connect("/run/example.sock")
    stub = client.service(example_pb2.DESCRIPTOR.services_by_name["Example"])
    answer = await stub.do_something(example_pb2.Request(), timeout_s=5)

    server = ttrpc.Server()
    server.register(example_pb2.DESCRIPTOR.services_by_name["Example"], Handler())
    await server.serve(listening_socket)

The protocol is the one of github.com/containerd/ttrpc, PROTOCOL.md, version 1.2.
"""

from ttrpc.client import Client, ClientStream, Stub
from ttrpc.errors import Code, ConnectionClosed, ProtocolError, StatusError, TtrpcError
from ttrpc.naming import snake_case
from ttrpc.server import Context, Server

__all__ = [
    "Client",
    "ClientStream",
    "Code",
    "ConnectionClosed",
    "Context",
    "ProtocolError",
    "Server",
    "StatusError",
    "Stub",
    "TtrpcError",
    "snake_case",
]
