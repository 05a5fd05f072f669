#!/bin/bash
# Sets everything up, then runs one container in a machine of its own through containerd's ctr.
source "$(dirname "$0")/lib.sh"
require_root

headline "Set-up"
"$repo/hack/setup.sh"

headline "A private containerd"
was=$("$repo/hack/containerd" status | head -n 1) || true
"$repo/hack/containerd" start | sed 's/^/  /'
finish() {
    case $was in running*) ;; *) "$repo/hack/containerd" stop >/dev/null ;; esac
}
trap finish EXIT

headline "A template, to clone machines from"
"$repo/hack/kata-py" factory init

headline "This host"
echo "  \$ uname -a"
uname -a

headline "A container with a kernel of its own"
run=(run --rm --runtime io.containerd.kata-py.v2 docker.io/library/busybox:latest demo uname -a)
echo "  \$ ctr ${run[*]}"
started=${EPOCHREALTIME/./}
"$repo/hack/ctr" "${run[@]}"
echo "  $(((${EPOCHREALTIME/./} - started) / 1000)) ms from ctr's start to its end"

echo
echo "Try more with hack/ctr, for example:"
echo "  hack/ctr run --rm -t --runtime io.containerd.kata-py.v2 docker.io/library/busybox:latest mine sh"
