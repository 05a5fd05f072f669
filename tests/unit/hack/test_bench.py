"""The benchmark's arithmetic and its tables; nothing here is measured."""

import os
from pathlib import Path
from typing import Any

import bench
import bench_factory
import bench_files
import bench_network
import pytest
from bench_common import lined_up
from bench_factory import Aim

HOST = {
    "cpus": 2,
    "accelerator": "TCG",
    "qemu": "QEMU emulator version 7.2",
    "load": (0.1, 0.2, 0.3),
    "load_after": (1.5, 0.9, 0.4),
}


def level(pods: int, qemu: float, available: float) -> dict[str, Any]:
    return {
        "pods": pods,
        "pss_per_pod_mib": {"shim": 20.0, "QEMU": qemu},
        "pss_sum_per_pod_mib": 20.0 + qemu,
        "available_per_pod_mib": available,
    }


def way(answer: float, first_byte: float, *levels: dict[str, Any]) -> dict[str, Any]:
    return {
        "agent_answer_s": answer,
        "agent_ready_s": answer + 0.02,
        "first_byte_s": first_byte,
        "memory": list(levels),
    }


@pytest.fixture
def factory() -> dict[str, Any]:
    return {
        "ways": {
            "direct": way(2.5, 3.2, level(1, 330, 200), level(10, 280, 250)),
            "template": way(0.1, 0.9, level(1, 130, 60), level(10, 70, 55), level(30, 40, 50)),
            "cache": {"failure": "the cache's server ended: no output"},
        },
        "floor_s": {"exec": 0.001, "answer": 0.05},
    }


def found(factory: dict[str, Any]) -> dict[str, Aim]:
    return {aim.text.split(":")[0] + aim.text.split(":")[1]: aim for aim in bench_factory.aims(factory)}


def test_aims_say_by_how_much_they_are_met_or_missed(factory: dict[str, Any]) -> None:
    aims = found(factory)
    sooner = aims["agent answers direct / template"]
    assert sooner.found == pytest.approx(25)
    assert sooner.verdict == "met, by 25%"
    over_floor = aims["agent answers template / floor"]
    assert over_floor.found == pytest.approx(2)
    assert over_floor.verdict == "MISSED by 33%"
    first_byte = aims["ctr run to the first byte direct / template"]
    assert first_byte.verdict == "MISSED by 11%"


def test_what_was_not_measured_is_neither_met_nor_missed(factory: dict[str, Any]) -> None:
    assert found(factory)["agent answers cache"].verdict == "not measured"
    assert bench_factory.failures(factory) == ["cache: the cache's server ended: no output"]
    empty: dict[str, Any] = {"ways": {}, "floor_s": {}}
    assert {aim.verdict for aim in bench_factory.aims(empty)} == {"not measured"}


def test_memory_is_compared_at_the_most_pods_of_each_and_says_so(factory: dict[str, Any]) -> None:
    pss, available = (aim for aim in bench_factory.aims(factory) if "30 pods" in aim.text)
    assert pss.text == "PSS of a pod: template, 30 pods / direct, 10"
    assert pss.found == pytest.approx(20)
    assert available.found == pytest.approx(20)
    assert available.met


def test_memory_that_others_gave_back_meanwhile_is_no_measure(factory: dict[str, Any]) -> None:
    factory["ways"]["template"]["memory"] = [level(1, 100, -40.0)]
    pss, available = bench_factory.aims(factory)[-2:]
    assert pss.found is not None
    assert available.verdict == "not measured"


def test_a_busy_host_is_told(factory: dict[str, Any]) -> None:
    result = {"runs": 1, "host": HOST, "factory": factory}
    assert "busy" not in bench.report(result)
    assert "busy" in bench.report({**result, "host": {**HOST, "load": (4.0, 4.0, 4.0)}})


def test_pods_that_do_not_fit_are_told_and_not_compared(factory: dict[str, Any]) -> None:
    factory["ways"]["direct"]["memory"].append({"pods": 30, "failure": "it would take 5000 MiB more"})
    assert "direct, 30 pods: it would take 5000 MiB more" in bench_factory.failures(factory)
    assert any("direct, 10" in aim.text for aim in bench_factory.aims(factory))


def test_the_report_lines_up(factory: dict[str, Any]) -> None:
    text = bench.report({"runs": 10, "host": HOST, "factory": factory})
    table = text.split("\n\n")[0].splitlines()
    assert table[0].split() == ["direct", "template", "cache", "floor"]
    answers = next(line for line in table if line.startswith("agent answers"))
    assert answers.split() == ["agent", "answers", "2500", "ms", "100", "ms", "50", "ms"]
    # Numbers stand below the end of their column's name.
    assert answers.index("2500 ms") + len("2500 ms") == table[0].index("direct") + len("direct")
    assert "load 0.1 before, 1.5 after" in text


@pytest.fixture
def pods() -> dict[str, Any]:
    ten = {"pod_s": 0.8, "each_s": 0.25, "all_s": 2.6, "times_s": [0.3, 0.2]}
    direct = {"plugged_s": 0.1, "online_s": 0.9, "containers": ten, "with_limits": {"failure": "no slot"}}
    return {"ways": {"direct": direct, "runc": {"containers": {"each_s": 0.08, "all_s": 0.8}}}}


def test_the_table_of_growing_pods_has_gaps_where_nothing_was_found(pods: dict[str, Any]) -> None:
    text = bench.report({"runs": 10, "host": HOST, "pods": pods})
    rows = {line.partition("   ")[0].strip(): line.split() for line in text.splitlines()}
    assert rows["online in the guest"][-2:] == ["900", "ms"]
    assert rows["each of 10 containers"][-4:] == ["250", "ms", "80", "ms"]
    assert "full one" not in text
    assert "direct with_limits: no slot" in text


def test_growing_pods_are_drawn(pods: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "bench.png"
    bench.plot({"host": HOST, "pods": pods}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def network() -> dict[str, Any]:
    fast = {"sent_s": 0.5, "received_s": 1.0, "ping_s": 0.0002, "pings_s": [0.0001, 0.0002, 0.0003]}
    return {"ways": {"template": {**fast, "sent_s": 2.0, "ping_s": 0.001}, "runc": fast}}


@pytest.fixture
def files() -> dict[str, Any]:
    steps = {step: 0.1 * number for number, step in enumerate(bench_files.STEPS, start=1)}
    refused = "ctr run: no such disk\nlevel=debug msg=lines of containerd's log"
    return {"ways": {"template": steps, "block": {"failure": refused}, "runc": {**steps, "read": 0.002}}}


def test_the_table_of_the_network_has_speeds_and_round_trips(network: dict[str, Any]) -> None:
    text = bench.report({"runs": 10, "host": HOST, "network": network})
    lines = text.split("\n\n")[0].splitlines()
    assert [line.split() for line in lines[:2]] == [["network", "clone", "runc"], ["tcfilter", "veth"]]
    size = bench_network.FILE_MIB
    rows = {line.split("  ")[0]: line.split("  ", 1)[1].split() for line in lines[2:]}
    assert rows["pod to host, TCP"] == [f"{size / 2:.0f}", "MiB/s", f"{size * 2}", "MiB/s"]
    assert rows["host to pod, TCP"] == [f"{size}", "MiB/s", f"{size}", "MiB/s"]
    assert rows["round trip"] == ["1000", "us", "200", "us"]


def test_the_table_of_files_has_a_gap_and_the_reason_where_nothing_was_found(files: dict[str, Any]) -> None:
    text = bench.report({"runs": 10, "host": HOST, "files": files})
    table, missing, *_ = text.split("\n\n")
    lines = table.splitlines()
    assert lines[0].split() == ["files", "clone", "clone", "runc"]
    assert lines[1].split() == ["virtio-9p", "block", "bind"]
    read = next(line for line in lines if line.startswith(bench_files.STEPS["read"]))
    assert read.removeprefix(bench_files.STEPS["read"]).split() == ["200", "ms", "2", "ms"]
    assert missing == "not measured:\n  block: ctr run: no such disk"


def test_network_and_files_are_drawn(network: dict[str, Any], files: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "bench.png"
    bench.plot({"host": HOST, "network": network, "files": files}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    nothing = {"ways": {"template": {"failure": "no machine"}, "runc": {"failure": "no runc"}}}
    bench.plot({"host": HOST, "network": nothing, "files": nothing}, path)
    text = bench.report({"runs": 10, "host": HOST, "network": nothing, "files": nothing})
    assert text.count("runc: no runc") == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="raw sockets are root's")
def test_a_ping_has_a_checksum_that_the_kernel_takes() -> None:
    assert bench_network.ping("127.0.0.1", 2)[0] > 0


def test_lined_up_fills_short_rows() -> None:
    assert lined_up([("a", "bb"), ("ccc",), ("d", "e", "f")]) == "a    bb\nccc\nd     e  f"


@pytest.mark.parametrize("measured", ["agent_answer_s", "memory", "nothing"])
def test_the_plot_is_drawn_with_what_there_is(factory: dict[str, Any], tmp_path: Path, measured: str) -> None:
    path = tmp_path / "bench.png"
    for way in factory["ways"].values():
        for key in set(way) - {measured}:
            del way[key]
    bench.plot({"host": HOST, "factory": factory}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_quick_is_less_of_everything_and_options_win() -> None:
    assert bench.parse([]).runs == 10
    quick = bench.parse(["--quick"])
    assert (quick.runs, quick.pods) == (bench.QUICK_RUNS, bench.QUICK_PODS)
    chosen = bench.parse(["--quick", "--runs", "7", "--pods", "5,2", "--only", "agent", "--ways", "direct"])
    assert (chosen.runs, chosen.pods, chosen.only, chosen.ways) == (7, (2, 5), ["agent"], ["direct"])
    with pytest.raises(SystemExit):
        bench.parse(["--runs", "-1"])


def test_every_way_has_a_configuration_of_its_own(tmp_path: Path) -> None:
    ready = [bench_factory.Ready(name, tmp_path) for name in bench_factory.WAYS]
    assert len({one.config for one in ready}) == len(ready)
    assert len({one.template_path for one in ready}) == len(ready)
    texts = {one.name: one.config.read_text() for one in ready}
    assert "enable_template = false" in texts["direct"]
    assert 'shared_fs = "virtio-fs"' in texts["template-virtio-fs"]
    assert "vm_cache_number = 1" in texts["cache-template"]
