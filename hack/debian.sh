# Programs of newer Debians beside the machine's own, unpacked with their own libc; nothing is installed. Sourced
# after lib.sh.

keyring=/usr/share/keyrings/debian-archive-keyring.gpg

get_keyring() {
    apt-get install -y --no-install-recommends debian-archive-keyring
}

[ -e "$keyring" ] || step "Debian's keyring" get_keyring

# unpack SUITE DIRECTORY FINAL "PACKAGE..." PROGRAM...: wrappers of the programs into DIRECTORY/bin, for when it has
# been moved to FINAL. Fetches with apt's own checks of signature and checksum, but none of its state.
unpack() {
    local suite=$1 directory=$2 final=$3 packages=$4 apt package program found loader library_path
    shift 4
    mkdir -p "$directory"/{lists/partial,cache/archives/partial,packages,root,bin}
    cd "$directory/packages"
    : >"$directory/status"
    echo "deb [arch=amd64 signed-by=$keyring] http://deb.debian.org/debian $suite main" >"$directory/sources.list"
    apt=(-o Dir::Etc::sourcelist="$directory/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State="$directory"
        -o Dir::State::status="$directory/status" -o Dir::Cache="$directory/cache" -o APT::Sandbox::User=root
        -o APT::Architecture=amd64 -o Acquire::Languages=none -o Acquire::Retries=2)
    apt-get "${apt[@]}" update
    # shellcheck disable=SC2086
    apt-get "${apt[@]}" download $packages libc6
    for package in *.deb; do
        dpkg-deb -x "$package" "$directory/root"
    done
    loader=$(find "$directory/root" -name 'ld-linux-x86-64.so.2' -type f | head -n 1)
    library_path=$(dirname "$(find "$directory/root" -name libc.so.6 | head -n 1)")
    for program in "$@"; do
        found=$(find "$directory"/root/usr/{bin,libexec} -name "$program" -type f | head -n 1)
        # The host's loader would find the host's libc, which may be older than the program.
        printf '#!/bin/sh\nexec %s --library-path %s %s "$@"\n' \
            "${loader/#$directory/$final}" "${library_path/#$directory/$final}" "${found/#$directory/$final}" \
            >"$directory/bin/$program"
        chmod +x "$directory/bin/$program"
    done
    rm -rf "$directory"/{lists,cache,packages,status,sources.list}
}

# get SUITE DIRECTORY "PACKAGE..." PROGRAM...: as unpack, whole or not at all; the first program must run.
get() {
    local suite=$1 directory=$2 packages=$3
    shift 3
    rm -rf "$directory.new"
    mkdir -p "$(dirname "$directory")"
    unpack "$suite" "$directory.new" "$directory" "$packages" "$@"
    rm -rf "$directory"
    mv "$directory.new" "$directory"
    "$directory/bin/$1" --version
}
