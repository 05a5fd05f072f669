#!/bin/bash
# Sets everything up and runs every check and test. `hack/test.sh ARGS...` gives ARGS to pytest.
source "$(dirname "$0")/lib.sh"
require_root
cd "$repo"

failed=()
check() {
    local title=$1
    shift
    headline "==> $title: $*"
    "$@" || failed+=("$title")
}

# The tests have no network. Without them those of ttrpc with Go are skipped, and say why.
go_modules() {
    cd "$repo/tests/integration/ttrpc_go"
    command -v go && timeout 600 go mod download || echo "they cannot be had here"
}

headline "==> set-up"
hack/setup.sh
hack/containerd-versions
hack/vhost-user-daemons
hack/get-crictl
step "Go modules of the tests" go_modules

bin=$venv/bin
check "lint" "$bin/ruff" check
check "format" "$bin/ruff" format --check
check "types" "$bin/mypy"
check "types of the tests' harness" env MYPYPATH=hack:tests:tests/integration "$bin/mypy" --explicit-package-bases hack tests/processes.py tests/integration
check "imports point one way" "$bin/lint-imports"
check "generated code is up to date" hack/generate-protos --check
# Two at a time, a file's tests together, each worker with a host of its own to look at.
check "tests" "$bin/python" -m pytest --durations=10 -p no:cacheprovider --dist loadfile \
    --tx "2*popen//python=hack/isolated-python" tests/unit tests/integration "$@"

[ "${#failed[@]}" = 0 ] || die "failed: $(printf '%s; ' "${failed[@]}")"
