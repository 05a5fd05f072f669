from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from guest.image import modules
from tests.unit.guest_image.elf_files import kernel_module


def no_zstd(data: bytes) -> bytes:
    raise AssertionError("nothing here is compressed with zstd")


@pytest.fixture
def tree(tmp_path: Path) -> modules.Tree:
    """9pnet_virtio is compressed; netfs needs fscache, which is built in; xfs would like crc32c, which nobody
    here is called."""
    files = {
        "kernel/drivers/virtio/virtio.ko": kernel_module("virtio", depends="virtio_ring"),
        "kernel/drivers/virtio/virtio_ring.ko": kernel_module("virtio_ring"),
        "kernel/net/9p/9pnet.ko": kernel_module("9pnet"),
        "kernel/fs/netfs/netfs.ko": kernel_module("netfs", depends="fscache"),
        "kernel/fs/9p/9p.ko": kernel_module("9p", depends="9pnet,netfs", aliases=["fs-9p"]),
        "kernel/fs/xfs/xfs.ko": kernel_module("xfs", depends="libcrc32c", softdep="pre: crc32c"),
        "kernel/lib/libcrc32c.ko": kernel_module("libcrc32c"),
        "kernel/net/broken.ko": kernel_module("broken", depends="absent"),
    }
    for path, data in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    (tmp_path / "kernel/net/9p/9pnet-virtio.ko.xz").write_bytes(
        lzma.compress(kernel_module("9pnet_virtio", depends="virtio,virtio-ring,9pnet"))
    )
    (tmp_path / "modules.builtin").write_text("kernel/fs/fscache/fscache.ko\n")
    return modules.Tree(tmp_path, decompress_zstd=no_zstd)


def test_a_module_brings_what_it_depends_on(tree: modules.Tree) -> None:
    assert set(modules.closure(tree, ["9p"], [])) == {"9p", "9pnet", "netfs"}


def test_a_compressed_module_with_a_dash_is_found_and_unpacked(tree: modules.Tree) -> None:
    found = modules.closure(tree, ["9pnet_virtio"], [])
    assert found["9pnet_virtio"].path == "kernel/net/9p/9pnet-virtio.ko"
    assert found["9pnet_virtio"].data.startswith(b"\x7fELF")
    assert set(found) == {"9pnet_virtio", "9pnet", "virtio", "virtio_ring"}


def test_what_is_built_in_needs_no_file(tree: modules.Tree) -> None:
    assert modules.closure(tree, ["fscache"], []) == {}


def test_a_required_module_that_is_not_there_is_an_error(tree: modules.Tree) -> None:
    with pytest.raises(modules.ModuleError, match="has no module vsock"):
        modules.closure(tree, ["vsock"], [])


def test_an_optional_one_is_not(tree: modules.Tree) -> None:
    assert modules.closure(tree, [], ["vsock"]) == {}


def test_a_missing_dependency_is_named_with_who_depends_on_it(tree: modules.Tree) -> None:
    with pytest.raises(modules.ModuleError, match="has no module absent, which broken depends on"):
        modules.closure(tree, [], ["broken"])


def test_a_soft_dependency_may_be_missing(tree: modules.Tree) -> None:
    assert set(modules.closure(tree, ["xfs"], [])) == {"xfs", "libcrc32c"}


def test_the_load_order_puts_every_module_after_what_it_depends_on(tree: modules.Tree) -> None:
    found = modules.closure(tree, ["9p", "9pnet_virtio"], [])
    order = [module.name for module in modules.load_order(found, ["9pnet_virtio", "9p"])]
    assert sorted(order) == sorted(found)
    for module in found.values():
        for other in set(module.depends) & set(found):
            assert order.index(other) < order.index(module.name)


def test_modules_dep_lists_dependencies_as_modprobe_expects_them(tree: modules.Tree) -> None:
    found = modules.closure(tree, ["9pnet_virtio"], [])
    lines = dict(line.split(":") for line in modules.index_dependencies(found).splitlines())
    dependencies = lines["kernel/net/9p/9pnet-virtio.ko"].split()
    ring, virtio = "kernel/drivers/virtio/virtio_ring.ko", "kernel/drivers/virtio/virtio.ko"
    # From the last to the first is an order to load them in.
    assert dependencies.index(ring) > dependencies.index(virtio)
    assert lines[ring] == ""


def test_the_kernel_finds_a_file_system_by_its_alias(tree: modules.Tree) -> None:
    assert "alias fs-9p 9p\n" in modules.index_aliases(modules.closure(tree, ["9p"], []))


def test_modules_that_depend_on_each_other_are_an_error(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.ko").write_bytes(kernel_module(name, depends=other))
    found = modules.closure(modules.Tree(tmp_path, decompress_zstd=no_zstd), ["a"], [])
    with pytest.raises(modules.ModuleError, match="depend on each other: a -> b -> a"):
        modules.load_order(found, ["a"])
