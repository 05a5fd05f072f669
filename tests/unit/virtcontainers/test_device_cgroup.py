from pathlib import Path

from virtcontainers.device_cgroup import DeviceRule, device_rules, sandbox_rules


def rules(*spec: dict[str, object], only: bool = False, debug: bool = False) -> list[DeviceRule]:
    return sandbox_rules(spec, sandbox_cgroup_only=only, debug=debug, others=[Path("/dev/null")])


def test_the_specs_rules_come_first() -> None:
    found = rules(
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "c", "major": 10, "minor": 5, "access": "r"},
        {"allow": True, "type": "b", "major": 8, "minor": -1},
    )
    assert found[:3] == [
        DeviceRule(False, "a *:* rwm"),
        DeviceRule(True, "c 10:5 r"),
        DeviceRule(True, "b 8:* rwm"),
    ]
    assert all(rule.allow for rule in found[1:])
    assert found[-1] == DeviceRule(True, "c 1:3 rwm")


def test_the_shim_has_loop_devices_when_it_is_inside() -> None:
    loop, ptmx = DeviceRule(True, "b 7:* rwm"), DeviceRule(True, "c 5:2 rwm")
    assert not {loop, ptmx} & set(rules(debug=True))
    assert loop in rules(only=True)
    assert ptmx not in rules(only=True)
    assert ptmx in rules(only=True, debug=True)


def test_only_devices_have_rules(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    paths = [tmp_path / "file", tmp_path / "none", Path("overlay"), Path("/dev/zero")]
    assert device_rules(paths) == [DeviceRule(True, "c 1:5 rwm")]
