"""The Kata agent protocol: messages, a typed client, the transports."""
