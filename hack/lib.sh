# Shared by the scripts of hack/: paths, steps with progress, root. Sourced, never run.

set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$repo/.venv
# Two clones on one machine share what is expensive to make, and nothing that runs.
key=$(printf %s "$repo" | sha256sum | cut -c1-8)
cache_dir=/var/cache/kata-py
state_dir=/var/lib/kata-py/$key
log_dir=/var/log/kata-py
log=$log_dir/$(basename "$0" .sh).log

if [ -t 1 ]; then
    terminal=yes bold=$'\e[1m' green=$'\e[32m' red=$'\e[31m' plain=$'\e[0m'
else
    terminal='' bold='' green='' red='' plain=''
fi

die() {
    printf '%serror:%s %s\n' "$red" "$plain" "$*" >&2
    exit 1
}

require_root() {
    [ "$(id -u)" = 0 ] || die "$(basename "$0") must run as root: it installs packages and starts machines"
    mkdir -p "$log_dir"
    printf '\n=== %s %s, %s\n' "$(date -Is)" "$0" "$repo" >>"$log"
}

headline() {
    printf '%s%s%s\n' "$bold" "$*" "$plain"
}

# On a terminal: the title, the seconds, and the command's latest line.
show_progress() {
    local title=$1 latest
    trap 'exit 0' TERM
    while sleep 0.3; do
        latest=$(tail -n 1 "$log" | tr '\r' '\n' | tail -n 1 | tr -cd '[:print:]')
        printf '\r\e[K  ...   %s (%ss) %s' "$title" "$SECONDS" "${latest:0:$((COLUMNS > 60 ? COLUMNS - 50 : 30))}"
    done
}

# step TITLE COMMAND...: runs it with its output in the log; shows how it went and, if badly, the log's end.
step() {
    local title=$1 progress='' status=0
    shift
    SECONDS=0
    printf '\n--- %s: %s\n' "$title" "$*" >>"$log"
    if [ -n "$terminal" ]; then
        COLUMNS=$(tput cols 2>/dev/null || echo 80)
        show_progress "$title" &
        progress=$!
    fi
    # In a subshell: what it changes, and its exit, are its own.
    set +e
    (set -e; "$@") >>"$log" 2>&1 </dev/null
    status=$?
    set -e
    if [ -n "$progress" ]; then
        kill "$progress" 2>/dev/null || true
        wait "$progress" 2>/dev/null || true
        printf '\r\e[K'
    fi
    if [ "$status" != 0 ]; then
        printf '  %sfailed%s %s, exit status %s; the end of %s:\n' "$red" "$plain" "$title" "$status" "$log"
        tail -n 25 "$log" | sed 's/^/    /'
        exit "$status"
    fi
    printf '  %sok%s    %s (%ss)\n' "$green" "$plain" "$title" "$SECONDS"
}

# write_programs VENV PATH...: the programs into VENV/bin, finding our packages on PATH..., all compiled.
# containerd runs the shim three times per pod: -I and -S leave out the environment and the site module, whose
# .pth files alone cost as much as the rest of the interpreter's start.
write_programs() {
    local venv=$1 packages program
    shift
    packages=$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
    while read -r program module function; do
        {
            echo "#!$venv/bin/python -IS"
            echo "import sys"
            printf 'sys.path += ['
            printf '"%s", ' "$@"
            printf '"%s"]\n' "$packages"
            echo "from $module import $function"
            echo "sys.exit($function())"
        } >"$venv/bin/$program.new"
        chmod +x "$venv/bin/$program.new"
        mv "$venv/bin/$program.new" "$venv/bin/$program"
    done <<'PROGRAMS'
containerd-shim-kata-py-v2 shim.main main
kata-py katautils.cli.main main
PROGRAMS
}

# compile_packages VENV PATH: the bytecode of our packages below PATH; a shim must never compile at its start.
compile_packages() {
    local package
    for package in shim katautils virtcontainers agent_client ttrpc guest; do
        "$1/bin/python" -m compileall -q "$2/$package"
    done
}

# link_programs BIN OURS...: /usr/local/bin/PROGRAM -> BIN/PROGRAM, where the name is free, dangling, or a link into
# one of the directories OURS.
link_programs() {
    local bin=$1 program link ours
    shift
    for program in containerd-shim-kata-py-v2 kata-py; do
        link=/usr/local/bin/$program
        for ours in "$@"; do
            if [ ! -e "$link" ] || [[ $(readlink "$link") == $ours/$program ]]; then
                ln -sfn "$bin/$program" "$link"
                break
            fi
        done
        [ "$(readlink "$link")" = "$bin/$program" ] || echo "$link is another's: left as it is"
    done
}

supported_system() {
    [ "$(uname -m)" = x86_64 ] || die "kata-py runs on x86_64, this is $(uname -m)"
    command -v apt-get >/dev/null || die "no apt-get: expected Debian 12, Debian 13 or Ubuntu 24.04"
    source /etc/os-release
    case "$ID:$VERSION_ID" in
        debian:12 | debian:13 | ubuntu:24.04) ;;
        *) echo "  $PRETTY_NAME is untested: expected Debian 12, Debian 13 or Ubuntu 24.04" ;;
    esac
}

# packages EXTRA...: what kata-py needs of the distribution, and EXTRA; only what is missing.
packages() {
    local needed=(ca-certificates python3 python3-venv qemu-system-x86 "$@") missing=() package
    # Debian 12 has virtiofsd in qemu-system-common.
    [ "$ID:$VERSION_ID" = debian:12 ] || needed+=(virtiofsd)
    # Docker's containerd.io brings both, and stays.
    command -v containerd >/dev/null && command -v ctr >/dev/null || needed+=(containerd)
    command -v runc >/dev/null || needed+=(runc)
    for package in "${needed[@]}"; do
        [ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null)" = "ii " ] || missing+=("$package")
    done
    if [ "${#missing[@]}" != 0 ]; then
        step "packages: ${missing[*]}" install_packages "${missing[@]}"
    elif [ -z "$(find /var/lib/apt/lists -maxdepth 1 -name '*_Packages*' -print -quit)" ]; then
        # The images are made of packages that are fetched, not installed.
        step "package lists" apt-get update
    fi
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

# make_venv DIRECTORY LOCK: a virtual environment of the system's Python with exactly the packages of LOCK.
make_venv() {
    local version
    version=$(/usr/bin/python3 -c 'import sys; print(sys.version_info[:2])')
    # After an upgrade of the distribution the packages belong to an interpreter that is gone.
    if [ "$("$1/bin/python" -c 'import sys; print(sys.version_info[:2])' 2>/dev/null)" != "$version" ]; then
        rm -rf "$1"
        /usr/bin/python3 -m venv "$1"
    fi
    "$1/bin/python" -m pip install --disable-pip-version-check --require-hashes --only-binary :all: -r "$2"
}

crictl_version=v1.34.0

# crictl into $cache_dir/bin from the Go module proxy, where Go is there; else the distribution's package. Where neither
# gives it, that is no failure: hack/cri_client.py has its commands.
get_crictl() {
    if [ -x "$cache_dir/bin/crictl" ] || command -v crictl; then
        return
    fi
    if command -v go && GOBIN=$cache_dir/bin CGO_ENABLED=0 timeout 600 \
        go install -ldflags '-s -w' "sigs.k8s.io/cri-tools/cmd/crictl@$crictl_version"; then
        return
    fi
    if apt-cache show cri-tools && apt-get install -y --no-install-recommends cri-tools; then
        return
    fi
    echo "crictl cannot be had here: hack/crictl uses hack/cri_client.py"
}
