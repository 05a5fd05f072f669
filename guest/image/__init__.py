"""The image that the guest boots from: a kernel, and an initrd that is all of its root.

    python -m guest.image.build --output DIR [--cache DIR]

writes DIR/vmlinuz (the kernel, as an ELF file), DIR/initrd.img and DIR/manifest.json (what went in, by
version and hash). By hand, on a machine without KVM; the agent's port is the socket agent.sock:

    cd DIR
    qemu-system-x86_64 -machine q35,accel=tcg -cpu max -m 256 -nodefaults -no-user-config \\
        -display none -no-reboot -serial stdio -kernel vmlinuz -initrd initrd.img \\
        -append "console=ttyS0 quiet panic=-1 agent.transport=serial" -device virtio-serial-pci \\
        -chardev socket,id=agent,path=agent.sock,server=on,wait=off \\
        -device virtserialport,chardev=agent,name=agent.channel.0

What the agent finds:

    /init                    runs guest.agent.main:main() as PID 1, with python3 -ISB; standard input,
                             output and error are the console
    /proc /sys /dev          empty, mounting them is the agent's work; so are /run, /tmp and others.
                             /dev has console, null and urandom
    /usr/bin                 crun, busybox and links to it (sh, mount, ...), in /usr/sbin too (modprobe, ip)
    /usr/lib/kata-py/bundle  all Python modules as bytecode: the standard library less python.STDLIB_PRUNED,
                             google.protobuf, ttrpc, agent_client.protocols and guest.agent. Python in a
                             shell of the guest: import kata_importer, kata_importer.install(this path)
    /usr/lib/python3.X       what the interpreter needs to start, and extension modules
    /etc/kata-py/modules     kernel modules to load at boot: absolute paths, one a line, in load order
    /lib/modules/RELEASE     all modules, uncompressed, with modules.dep (as kmod writes it: the dependency
                             to load first stands last), modules.alias and modules.builtin

A kernel module that is not in the boot list comes in two ways. What the kernel itself asks for by an alias (a
file system at its first mount, a cipher, a netfilter table) it gets through /sbin/modprobe, unaided.
The driver of a device, found or hot-plugged, is loaded by the agent: modprobe takes the device's modalias.
"""
