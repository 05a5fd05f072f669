#!/bin/bash
# Everything kata-py needs on this machine: packages, .venv, programs, guest image, test image.
# Idempotent. Debian 12 and 13, Ubuntu 24.04; as root. Starts and stops no service.
source "$(dirname "$0")/lib.sh"

require_root
[ "$(uname -m)" = x86_64 ] || die "kata-py runs on x86_64, this is $(uname -m)"
[[ $repo != *[[:space:]]* ]] || die "the path of the clone, '$repo', has a space: a #! line cannot name it"
source /etc/os-release
case "$ID:$VERSION_ID" in
    debian:12 | debian:13 | ubuntu:24.04) ;;
    *) command -v apt-get >/dev/null || die "$PRETTY_NAME is not supported: expected Debian 12, 13 or Ubuntu 24.04"
       echo "  $PRETTY_NAME is untested: expected Debian 12, 13 or Ubuntu 24.04" ;;
esac

# One set-up at a time, for all clones: dpkg and the caches are shared.
exec 9>/run/lock/kata-py-setup
flock 9

needed_packages() {
    local packages=(ca-certificates crun python3 python3-venv qemu-system-x86) package
    # Debian 12 has virtiofsd in qemu-system-common.
    [ "$ID:$VERSION_ID" = debian:12 ] || packages+=(virtiofsd)
    # Docker's containerd.io brings both; it stays.
    command -v containerd >/dev/null && command -v ctr >/dev/null || packages+=(containerd)
    command -v runc >/dev/null || packages+=(runc)
    for package in "${packages[@]}"; do
        [ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null)" = "ii " ] || echo "$package"
    done
}

install_packages() {
    # needrestart (Ubuntu) would restart the services of others.
    export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1
    apt-get update
    if [[ " $* " != *" containerd "* ]] || [ ! -d /run/systemd/system ]; then
        apt-get install -y --no-install-recommends "$@"
        return
    fi
    # containerd's package enables and starts its service; a masked unit is left alone.
    systemctl mask --runtime containerd.service
    trap 'systemctl unmask --runtime containerd.service' EXIT
    apt-get install -y --no-install-recommends "$@"
    systemctl disable containerd.service
}

packages=$(needed_packages)
# shellcheck disable=SC2086 # one word per package
[ -z "$packages" ] || step "packages: ${packages//$'\n'/ }" install_packages $packages
# `apt-get download` of the images below needs lists.
[ -n "$(find /var/lib/apt/lists -maxdepth 1 -name '*_Packages*' -print -quit)" ] || step "package lists" apt-get update

python_version=$(/usr/bin/python3 -c 'import sys; print("{}.{}.{}".format(*sys.version_info))')
lock="$python_version $(sha256sum <"$repo/hack/requirements-dev.txt")"

make_venv() {
    # Another interpreter after an upgrade of the distribution: its packages are elsewhere.
    if ! "$venv/bin/python" -c "import sys; sys.exit(sys.version_info[:2] != tuple(map(int, '$python_version'.split('.')[:2])))"; then
        rm -rf "$venv"
        /usr/bin/python3 -m venv "$venv"
    fi
    "$venv/bin/python" -m pip install --disable-pip-version-check --require-hashes --only-binary :all: \
        -r "$repo/hack/requirements-dev.txt"
    echo "$repo" >"$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')/kata_py.pth"
    echo "$lock" >"$venv/lock"
}

[ "$(cat "$venv/lock" 2>/dev/null)" = "$lock" ] || step "locked Python packages" make_venv
step "programs" write_programs "$venv" "$repo"
step "bytecode" compile_packages "$venv" "$repo"
step "links in /usr/local/bin" link_programs "$venv/bin"
step "guest image" "$venv/bin/python" -m guest.image.build --output "$state_dir/guest" --cache "$cache_dir/guest"
step "test image" "$repo/hack/busybox-image" "$cache_dir/images/busybox.tar"
