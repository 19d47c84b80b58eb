"""ARM targets by name, the toolchain they need, and what this machine may run."""

import importlib.util
import shutil

import pytest

from qcompile.errors import TargetError
from qcompile.targets import arm, get_target, list_targets


def test_targets_have_the_features_of_their_processors():
    assert get_target("arm") == get_target("cortex-a76") == get_target("arm", variant="cortex-a76")
    assert get_target("cortex-a76").has("dotprod") and not get_target("cortex-a76").has("i8mm")
    assert not get_target("cortex-a53").has("dotprod")
    assert get_target("apple-m2").has("i8mm") and "apple" in get_target("apple-m2").triple
    assert get_target("cortex-a53", cores=2).cores == 2
    assert {"cortex-a53", "neoverse-n1", "apple-m1"} <= list_targets().keys()


def test_unknown_processors_are_refused_with_those_there_are():
    with pytest.raises(TargetError, match=r"cortex-m4.*cortex-a53.*neoverse-n1"):
        get_target("arm", variant="cortex-m4")
    with pytest.raises(TargetError, match=r"znver4.*cortex-a53"):
        get_target("arm", variant="znver4")


def test_features_of_a_machine_are_read_from_cpuinfo(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nFeatures : fp asimd evtstrm aes crc32 atomics fphp asimdhp asimddp\n")
    assert arm.host_features(info) == (frozenset() if arm.platform.machine() == "x86_64" else arm.host_features())
    monkeypatch.setattr(arm.platform, "machine", lambda: "aarch64")
    assert arm.host_features(info) == {"neon", "dotprod", "fp16"}
    info.write_text("Features : fp asimd\n")
    assert arm.host_features(info) == {"neon"}
    assert arm.missing_features({"neon", "dotprod"}) == {"dotprod"} - arm.host_features()


def test_the_host_is_the_best_target_it_runs(monkeypatch):
    for features, name in (({"neon"}, "cortex-a72"), ({"neon", "dotprod", "fp16"}, "cortex-a76")):
        monkeypatch.setattr(arm, "host_features", lambda features=features: frozenset(features))
        assert arm.host(cores=3) == get_target(name, cores=3)
    monkeypatch.setattr(arm, "host_features", frozenset)
    with pytest.raises(TargetError, match="cannot run ARM"):
        arm.host()


def test_compilers_are_chosen_by_what_is_installed(monkeypatch):
    monkeypatch.setattr(arm.platform, "machine", lambda: "x86_64")
    have: set[str] = {"aarch64-linux-gnu-gcc"}
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in have else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in have else None)
    linux, apple = get_target("cortex-a53"), get_target("apple-m1")
    assert arm.compiler(linux).name == "aarch64-linux-gnu-gcc"
    with pytest.raises(TargetError, match="pip install ziglang"):
        arm.compiler(apple)
    have.clear()
    with pytest.raises(TargetError, match=r"ziglang.*gcc-aarch64-linux-gnu"):
        arm.compiler(linux)
    have.add("ziglang")
    assert "aarch64-linux-gnu.2.28" in arm.compiler(linux).command
    assert "aarch64-linux-musl" in arm.static_compiler(linux).command
    assert "aarch64-macos" in arm.compiler(apple).command
    with pytest.raises(TargetError, match="qemu-user"):
        arm.emulator(linux)
    with pytest.raises(TargetError, match="macOS"):
        arm.emulator(apple)
    have.add("qemu-aarch64")
    assert arm.emulator(linux)[-2:] == ("-cpu", "cortex-a53")
    assert arm.emulator(get_target("neoverse-v1"))[-1] == "max"


def test_a_missing_compiler_is_found_before_the_model_is_read(monkeypatch):
    import qcompile

    def none(target):
        raise TargetError(f"no compiler for {target}")

    monkeypatch.setattr(arm, "compiler", none)
    with pytest.raises(TargetError, match="no compiler for arm/apple-m2"):
        qcompile.compile("there/is/no/model.onnx", target="apple-m2", recipe="w8a8-rtn")


def test_a_failing_compiler_shows_what_it_said(tmp_path):
    cc = shutil.which("cc")
    if cc is None:
        pytest.skip("no C compiler")
    (tmp_path / "x.c").write_text("int main(void) { return nonsense; }")
    with pytest.raises(TargetError, match="nonsense"):
        arm.Compiler((cc,), (), "cc").run(tmp_path / "x.c", "-o", tmp_path / "x")
