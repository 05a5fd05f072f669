"""For unit and integration tests together: they run in one process."""

import os

# As in virtcontainers.factory.cache: tests of gRPC must not end the processes that later tests start.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"
