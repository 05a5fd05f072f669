"""containerd's ttrpc, client and server, on asyncio and for any protobuf service.

    client = await ttrpc.Client.connect("/run/example.sock")
    stub = client.service(example_pb2.DESCRIPTOR.services_by_name["Example"])
    answer = await stub.do_something(example_pb2.Request(), timeout_s=5, metadata={"key": ["value"]})

    class Handler:
        async def do_something(self, request, context):
            if not request.name:
                raise ttrpc.StatusError(ttrpc.Code.INVALID_ARGUMENT, "no name")
            return example_pb2.Answer()

    server = ttrpc.Server()
    server.register(example_pb2.DESCRIPTOR.services_by_name["Example"], Handler())
    await server.serve(listening_socket)        # until server.shutdown(grace_s)

There is no generated code but protobuf's own messages: methods are found by their descriptors and named in
snake_case on both sides. A method that streams answers a `ClientStream`:

    stream = await stub.chat()
    await stream.send(example_pb2.Line())
    await stream.close_send()
    async for line in stream: ...

and its handler takes an async iterator where the client streams, and is an async generator where the server
does:

    async def chat(self, lines, context):
        async for line in lines:
            yield line

Both ends work on any asyncio streams, `Client(reader, writer)` and `server.serve_connection(reader, writer)`;
`ttrpc.chardev` makes such streams of a virtio-serial port, which knows no connections.

The protocol is the one of github.com/containerd/ttrpc, PROTOCOL.md, version 1.2, which has no flow control.
What a peer can make us hold is bounded all the same: messages are at most 4 MiB, a peer that does not read is
written one message ahead, a server does not read a client that does not read its answers, and a stream that
is not read holds up its connection for a second and is then refused with RESOURCE_EXHAUSTED, as in Go.
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
