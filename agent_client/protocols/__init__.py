"""The messages of the Kata agent protocol, generated from the .proto files beside them."""
