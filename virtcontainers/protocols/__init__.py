"""Messages that containerd and its shims exchange; see the .proto files."""
