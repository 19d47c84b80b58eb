"""Code generation without a GPU: sources, nvcc, the torch op's fake kernel, and errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from qcompile.codegen.kernels.cuda import build
from qcompile.errors import FormatError, TargetError
from qcompile.kernels import linear, plan
from qcompile.targets.cuda import TARGETS, for_capability

WAIT = "griddepcontrol_wait();"

nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QCOMPILE_CUDA_CACHE", str(tmp_path))
    return tmp_path


def small(p, rows: int):
    """The plan with only the kernel for ``rows`` rows."""
    from dataclasses import replace

    return replace(p, entries=tuple(e for e in p.entries if e.rows == rows))


def test_source_is_written_once(cache: Path) -> None:
    p = small(plan(300, 70, "int4/g128"), 8)
    path = p.source()
    text = path.read_text()
    assert "rows8_kernel" in text and "cp.async.cg.shared.global" in text and "ldmatrix" in text
    assert "mma.sync.aligned.m16n8k16" in text
    stamp = path.stat().st_mtime_ns
    assert p.source().stat().st_mtime_ns == stamp
    assert small(plan(301, 70, "int4/g128"), 8).source() != path


def test_many_rows_use_warpgroups() -> None:
    hopper = small(plan(300, 70, "int4/g128"), 128).source().read_text()
    assert "wgmma.mma_async.sync.aligned" in hopper and "stmatrix" in hopper
    ampere = small(plan(300, 70, "int4/g128", target="sm_80"), 128).source().read_text()
    assert "wgmma" not in ampere and "ldmatrix" in ampere and "stmatrix" not in ampere


def test_integer_layers_use_integer_tensor_cores() -> None:
    assert "s32.s8.s8.s32" in small(plan(300, 70, "int4", "int8/token"), 8).source().read_text()


def test_hopper_kernels_start_before_the_one_before_ends() -> None:
    """Weights are copied before `await_previous`, x after it; the launch allows it. Other chips have no such launches."""
    for rows in (8, 64):
        early = {rows: {"overlap": True, "ring": 0}}
        text = small(plan(300, 70, "int4/g128", configs=early), rows).source().read_text()
        body = text[text.index("{", text.index(f" rows{rows}_kernel(", text.index(f" rows{rows}_kernel(") + 1)) :]
        before, after = body.split(WAIT)
        assert "programmaticStreamSerializationAllowed = 1" in after
        assert "codes0_ptr" in before and "x_ptr" not in before and "x_ptr" in after
        for target, configs in (("sm_80", early), ("sm_90a", {rows: {"overlap": False, "ring": 0}})):
            other = small(plan(300, 70, "int4/g128", target=target, configs=configs), rows).source().read_text()
            assert "griddepcontrol" not in other and "programmatic" not in other


def test_rings_copy_x_by_tensor_copies_after_weights() -> None:
    config = {"family": "cuda-tiled-int8", "rows": 32, "wg": 1, "mt": 1, "split": 2, "stages": 3, "wgmma": True}
    rings = {"ring": 3, "cluster": True, "overlap": True, "resident": 2}
    text = plan(300, 700, "int4", "int8/token", rows=(64,), configs={64: config | rings}).source().read_text()
    assert "cuTensorMapEncodeTiled" in text and "__launch_bounds__(128, 2)" in text
    body = text[text.index("{", text.index(" rows64_kernel(", text.index(" rows64_kernel(") + 1)) :]
    before, after = body.split(WAIT)
    assert "codes0_ptr" in before and "bulk_tensor" not in before and "bulk_tensor" in after


def test_blocks_share_rows_by_multicast() -> None:
    config = {"family": "cuda-tiled-shared-int8", "rows": 32, "wg": 1, "mt": 1, "split": 2, "stages": 3, "wgmma": True}
    for share in (1, 2):
        more = {"cluster": True, "overlap": True, "share": share, "resident": 2}
        p = plan(300, 700, "int4", "int8/token", rows=(64,), configs={64: config | more})
        text = p.source().read_text()
        # A warp that copies, beside the four that multiply.
        assert f"__cluster_dims__({share}, 2, 1) __launch_bounds__(160, 2)" in text
        body = text[text.index("{", text.index(" rows64_kernel(", text.index(" rows64_kernel(") + 1)) :]
        before, after = body.split(WAIT)[:2]
        assert "bulk_tensor_3d" in before and "bulk_tensor_2d" not in before
        assert "bulk_tensor_2d" in after and ("multicast" in after) == (share > 1)
        assert p.scratch() == (1, 1) and "store_remote_vector" in text


def test_every_group_of_rows_has_one_owner() -> None:
    cases = [(rows, split) for rows in (16, 32, 64, 128) for split in range(1, min(8, rows // 16) + 1)]
    for rows, split in cases:
        config = {"family": "cuda-tiled-shared-int8", "rows": rows, "wg": 1, "mt": 1, "split": split, "stages": 3}
        p = plan(1024, 256, "int4", "int8/token", rows=(64,), configs={64: {**config, "share": 1}})
        owned = [p.shape().owned(part) for part in range(split)]
        assert [group for part in owned for group in part] == list(range(rows // 16)) and all(map(len, owned))


def test_clusters_are_launched_where_splits_use_them() -> None:
    config = {"family": "cuda-tiled", "rows": 32, "wg": 1, "mt": 1, "split": 2, "stages": 3, "ring": 0, "wgmma": True}
    for cluster in (True, False):
        p = plan(300, 70, "int4/g128", rows=(64,), configs={64: {**config, "cluster": cluster}})
        text = p.source().read_text()
        assert text.count("__cluster_dims__(1, 2, 1)") == 2 * cluster and ("ld.shared::cluster" in text) == cluster
        assert p.scratch() == ((1, 1) if cluster else (2 * 2 * 32 * 128, 4))


@pytest.mark.parametrize(
    ("weight", "activation"), [("int4/g128", "none"), ("nf4/g64", "none"), ("int2/g64", "int8/token")]
)
def test_persistent_kernels(weight: str, activation: str) -> None:
    integer = "-int8" if activation != "none" else ""
    name = "cuda-stream-persistent" + integer
    config = {"family": name, "tn": 1, "kw": 3, "grid": 2, "stages": 4, "raw": False}
    p = plan(1100, 72, weight, activation, rows=(1,), configs={1: config})
    shape = p.shape()
    assert (shape.launched, shape.turns, shape.per_warp) == (2, 3, 3)
    text = p.source().read_text()
    body = text[text.rindex("rows1_kernel(", 0, text.index("#include <tvm/ffi")) :]
    assert "x_ptr" not in body[body.index("{") : body.index(WAIT)]


@pytest.mark.parametrize(("tn", "stages", "wide", "split"), [(4, 4, 1, 1), (3, 6, 1, 1), (4, 4, 2, 2)])
def test_sliced_kernels(tn: int, stages: int, wide: int, split: int) -> None:
    """Weights are copied before x may be read; the products are of unsigned codes by signed slices."""
    config = {"family": "cuda-stream-sliced", "tn": tn, "kw": 4, "stages": stages, "overlap": True}
    config |= {"wide": wide, "split": split, "cluster": split > 1}
    p = plan(1100, 72, "int2/g64", rows=(1,), configs={1: config})
    assert p.entries[0].family == "cuda-stream-sliced" and p.scratch() == (1, 1)
    text = p.source().read_text()
    body = text[text.rindex("rows1_kernel(", 0, text.index("#include <tvm/ffi")) :]
    assert "x_ptr" not in body[body.index("{") : body.index(WAIT)] and "m16n8k32" in text and ".u8.s8.s32" in text
    assert (f"__cluster_dims__(1, {split}, 1)" in text) == (split > 1)


@nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
def test_nvcc_accepts_it(arch: str) -> None:
    library = plan(515, 77, "int4/g64", target=arch, rows=(128 if arch == "sm_90a" else 1,)).library()
    log = library.with_suffix(".log").read_text()
    assert library.exists() and "Used" in log
    assert all(" 0 bytes spill stores" in line for line in log.splitlines() if "spill stores" in line)


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(TargetError, match="nvcc"):
        build.nvcc()


def test_compiler_errors_are_shown(cache: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    path = cache / "bad.cu"
    path.write_text("this is no C++")
    with pytest.raises(TargetError, match="this is no C"):
        build.compile_library(path, TARGETS["sm_80"])


def test_layer_on_a_machine_without_gpu() -> None:
    layer = linear(torch.randn(70, 300), "int4/g64/asym", bias=torch.zeros(70), target="sm_80")
    assert layer.names == ["codes", "meta", "column", "bias"]
    if not torch.cuda.is_available():
        with pytest.raises(TargetError, match="no CUDA device"):
            linear(torch.randn(70, 300), "int4/g64")
    with pytest.raises(FormatError):
        linear(torch.randn(70, 300), "nf44", target="sm_80")
    with pytest.raises(TargetError, match="16 levels"):
        linear(torch.randn(70, 300), "nf5", target="sm_80")
    with pytest.raises(TargetError, match="sm_80 lacks"):
        linear(torch.randn(70, 300), "fp8", "e4m3/token", target="sm_80")
    with pytest.raises(TargetError, match="bits"):
        linear(torch.randn(70, 300), "int5", target="sm_80")


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("cuda-stremed", "no family 'cuda-stremed' .* takes int4/g128"),
        ("cuda-planes", "no family 'cuda-planes' .* takes int4/g128"),
        ("cuda-stream-sliced", "cuda-stream-sliced has no config for 8 rows"),
    ],
)
def test_families_that_cannot_be_had_are_refused_by_name(family: str, reason: str) -> None:
    with pytest.raises(TargetError, match=reason):
        plan(300, 70, "int4/g128", rows=(8,), configs={8: {"family": family}})


def test_fake_kernel_gives_the_shape() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = linear(torch.randn(70, 300), "int4/g64", target="sm_90a", dtype=torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = layer(torch.empty(3, 5, 300, dtype=torch.bfloat16))
    assert y.shape == (3, 5, 70) and y.dtype == torch.bfloat16


def test_capabilities() -> None:
    assert for_capability(9, 0).cpu == "sm_90a"
    with pytest.raises(TargetError, match=r"7\.5"):
        for_capability(7, 5)
