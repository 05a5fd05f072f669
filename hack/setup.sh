#!/bin/bash
# Everything kata-py needs on this machine: packages, .venv, programs, guest image, test image.
# Idempotent. Debian 12 and 13, Ubuntu 24.04; as root. Starts and stops no service.
source "$(dirname "$0")/lib.sh"

require_root
[[ $repo != *[[:space:]]* ]] || die "the path of the clone, '$repo', has a space: a #! line cannot name it"
supported_system
# One set-up at a time, for all clones: dpkg and the caches are shared.
exec 9>/run/lock/kata-py-setup
flock 9
packages crun containernetworking-plugins iproute2

lock=$(/usr/bin/python3 --version; sha256sum <"$repo/hack/requirements-dev.txt")

development_venv() {
    make_venv "$venv" "$repo/hack/requirements-dev.txt"
    echo "$repo" >"$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/kata_py.pth"
    echo "$lock" >"$venv/lock"
}

[ "$(cat "$venv/lock" 2>/dev/null)" = "$lock" ] || step "locked Python packages" development_venv
step "programs" write_programs "$venv" "$repo"
step "bytecode" compile_packages "$venv" "$repo"
step "links in /usr/local/bin" link_programs "$venv/bin" "$venv/bin"
step "guest image" "$venv/bin/python" -m guest.image.build --output "$state_dir/guest" --cache "$cache_dir/guest"
step "test image" "$repo/hack/busybox-image" "$cache_dir/images/busybox.tar"
step "image for pods" "$repo/hack/pause-image" "$cache_dir/images/pause.tar"
