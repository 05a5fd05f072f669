#!/bin/bash
# Measures kata-py beside runc on the same image: times, shares, memory, CPU. `hack/bench.sh [RUNS]`.
source "$(dirname "$0")/lib.sh"
require_root
"$repo/hack/setup.sh"
exec "$venv/bin/python" "$repo/hack/bench.py" "$@"
