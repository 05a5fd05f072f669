#!/bin/bash
# Installs kata-py for the containerd of this machine, and `hack/install.sh --uninstall` takes it away again.
#   /opt/kata-py                         programs, Python packages, guest image
#   /usr/local/bin/{kata-py,containerd-shim-kata-py-v2}   links
#   /etc/kata-py/configuration.toml      only if there is none
# containerd's own configuration is never touched: what to add for Kubernetes is printed at the end.
source "$(dirname "$0")/lib.sh"
require_root

prefix=/opt/kata-py
configuration=/etc/kata-py/configuration.toml

if [ "${1:-}" = --uninstall ]; then
    # Nobody could end the VM cache, or unmount the template, afterwards.
    if [ -x "$prefix/bin/kata-py" ] && [ -e "$configuration" ]; then
        KATA_CONF_FILE=$configuration "$prefix/bin/kata-py" factory destroy || true
    fi
    for program in containerd-shim-kata-py-v2 kata-py; do
        [[ $(readlink "/usr/local/bin/$program") != "$prefix/"* ]] || rm "/usr/local/bin/$program"
    done
    rm -rf "$prefix"
    [ ! -e "$configuration" ] || echo "  $configuration is left as it is"
    echo "  kata-py is uninstalled; containers that run go on until they end"
    exit 0
fi
[ $# = 0 ] || die "usage: hack/install.sh [--uninstall]"

supported_system
exec 9>/run/lock/kata-py-setup
flock 9
packages

install_python() {
    make_venv "$prefix" "$repo/hack/requirements.txt"
    # A copy: setuptools would leave its build in the clone.
    local copy
    copy=$(mktemp -d)
    cp -r "$repo"/{pyproject.toml,LICENSE,README.md,shim,katautils,virtcontainers,agent_client,ttrpc,guest} "$copy"
    "$prefix/bin/python" -m pip install --disable-pip-version-check --no-index --no-deps --no-build-isolation \
        --force-reinstall "$copy"
    rm -rf "$copy"
    write_programs "$prefix"
}

write_configuration() {
    mkdir -p "$(dirname "$configuration")"
    sed "s|@GUEST@|$prefix/guest|" "$repo/hack/configuration.toml" >"$configuration"
}

step "Python packages in $prefix" install_python
step "guest image" env -C / "$prefix/bin/python" -m guest.image.build --output "$prefix/guest"
[ -e "$configuration" ] || step "$configuration" write_configuration
step "links in /usr/local/bin" link_programs "$prefix/bin" "$prefix/bin" "*/.venv/bin"

case $(containerd --version) in
    *" v2."* | *" 2."*) drop_in=$repo/hack/kubernetes/containerd-2.x.toml ;;
    *) drop_in=$repo/hack/kubernetes/containerd-1.x.toml ;;
esac
headline "Installed. With ctr it works at once: --runtime io.containerd.kata-py.v2"
headline "For Kubernetes, from $drop_in:"
sed 's/^/    /' "$drop_in"
headline "then restart containerd and: kubectl apply -f $repo/hack/kubernetes/runtimeclass.yaml"
