"""Detection of x86 features and the check before running a compiled program."""

import subprocess
import sys

import pytest

from qcompile.errors import TargetError
from qcompile.targets import x86

HASWELL = frozenset(["fpu", "sse2", "avx", "avx2", "fma", "f16c", "bmi2"])
SKYLAKE = HASWELL | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
ZEN4 = SKYLAKE | {"avx512_vnni"}
ALDERLAKE = HASWELL | {"avx_vnni"}


@pytest.mark.parametrize(
    "flags, expected",
    [
        (HASWELL, "x86-64-v3"),
        (ALDERLAKE, "x86-64-v3+avxvnni"),
        (SKYLAKE, "x86-64-v4"),
        (ZEN4, "x86-64-v4+vnni"),
        (SKYLAKE - {"avx512bw"}, "x86-64-v3"),
    ],
)
def test_host_is_the_best_target_the_flags_allow(flags, expected):
    target = x86.host(flags, cores=3)
    assert target.features == x86.TARGETS[expected].features and target.cpu == x86.TARGETS[expected].cpu
    assert target.cores == 3 and not x86.missing_features(target, flags)


def test_a_machine_without_avx2_is_refused_by_name():
    with pytest.raises(TargetError, match="avx2"):
        x86.host(frozenset({"sse2"}))


def test_running_a_program_for_a_larger_machine_names_what_is_missing_and_the_way_out():
    assert x86.missing_features(x86.VNNI, HASWELL) == {"avx512", "vnni"}
    with pytest.raises(TargetError, match=r"avx512, vnni.*x86-64-v3") as error:
        x86.check(x86.VNNI, HASWELL)
    assert "znver4" not in str(error.value)
    x86.check(x86.AVX2, ZEN4)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(TargetError, match="icelake-server"):
        x86.named("pentium")


def test_flags_of_the_first_processor(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\nbugs\t: x\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert x86.cpu_flags(info) == {"fpu", "avx2", "fma"}
    assert x86.cpu_flags(tmp_path / "missing") == frozenset()


def test_detection_does_not_load_tvm():
    code = "import sys; from qcompile.targets import x86; x86.host_features(); sys.exit('tvm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_llvm_accepts_every_target():
    pytest.importorskip("tvm")
    for target in x86.TARGETS.values():
        spec = str(target.tvm())
        assert target.cpu in spec and all(a in spec for a in target.attributes)
