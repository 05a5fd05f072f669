#!/bin/bash
# Measures kata-py, beside runc and from each factory: times and memory. `hack/bench.sh --help`.
source "$(dirname "$0")/lib.sh"
require_root
"$repo/hack/setup.sh"
exec "$venv/bin/python" "$repo/hack/bench.py" "$@"
