"""CUDA kernels on a CUDA device against float64; integer sums exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from qcompile.formats import parse_format
from qcompile.kernels import QuantizedLinear, quantize_rows, quantize_rows_float8
from qcompile.targets.cuda import for_capability

from .cases import CASES, ROWS, Case, TunedCase, tuned_cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def arch() -> str:
    return for_capability(*torch.cuda.get_device_capability()).cpu


def make(case: Case, seed: int) -> tuple[QuantizedLinear, torch.Tensor, torch.Tensor | None]:
    """The layer, its decoded float64 weight (K, N) and its bias."""
    rng = np.random.default_rng(seed)
    fmt = parse_format(case.weight)
    weight = fmt.encode(rng.standard_normal((case.k, case.n)).astype(np.float32) * 0.1)
    bias = rng.standard_normal(case.n).astype(np.float32) if case.bias else None
    layer = QuantizedLinear(case.plan(arch()), weight, bias).cuda()
    real = torch.from_numpy(fmt.decode(weight)).double().cuda()
    return layer, real, None if bias is None else torch.from_numpy(bias).double().cuda()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: Case) -> None:
    check(case, CASES.index(case), ROWS)


@pytest.mark.parametrize("case", tuned_cases("sm_90a"), ids=str)
@pytest.mark.skipif(torch.cuda.is_available() and arch() != "sm_90a", reason="measured configs are those of sm_90a")
def test_tuned_configs_match_float64(case: TunedCase) -> None:
    check(case, 1, sorted({m for rows, _ in case.entries for m in (rows - rows // 3, rows, rows + rows // 2)}))


def check(case: Case, seed: int, rows: Sequence[int]) -> None:
    """Compare with float64 for some numbers of rows."""
    layer, weight, bias = make(case, seed)
    dtype = getattr(torch, case.dtype)
    step = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    for m in rows:
        x = torch.randn(m, case.k, device="cuda", dtype=dtype)
        got = layer(x).double()
        a = x.double()
        if case.activation != "none":
            bits = layer.plan.problem.activation.bits
            codes, scale = quantize_rows_float8(x) if case.activation == "e4m3" else quantize_rows(x, bits)
            a = codes.double() * scale.double()[:, None]
        want = a @ weight + (0 if bias is None else bias)
        # Scales of groups, weights times those, and levels are rounded to the type of x; sums to float32; the result to its
        # type. Tensor cores cut 32 e4m3 products and the sum off at 2^-13 of the largest of them: what is lost grows with
        # the sum, and with K, because more of the products have its sign.
        size = a.abs() @ weight.abs()
        rounded = step / 2 * (bool(layer.plan.problem.weight.group) + layer.plan.shape().levels)
        cut = 2.0**-14 * (case.k / 32) if case.activation == "e4m3" else 0
        rounded += 2.0**-10.5 if case.activation == "e4m3" else 2.0**-18.5
        bound = (1.01 * step + cut) * want.abs() + size * rounded + 1e-6
        bad = (got - want).abs() > bound
        assert not bad.any(), f"{m} rows: {int(bad.sum())} of {bad.numel()} off, at most {(got - want).abs().max():.3g}"


@pytest.mark.parametrize("bits", [8, 4])
def test_quantizer_is_that_of_torch(bits: int) -> None:
    case = next(c for c in CASES if c.activation == f"int{bits}" and c.dtype == "bfloat16")
    for m in (1, 3, 257):
        x = torch.randn(m, case.k, device="cuda", dtype=torch.bfloat16)
        x[m // 2] = 0
        codes, scale = torch.ops.qcompile.quantize_rows(x, bits, arch())
        want, step = quantize_rows(x, bits)
        assert torch.equal(codes, want) and torch.equal(scale, step)


def test_integer_sums_are_exact() -> None:
    """Small integers: the result is an integer float16 represents, so nothing may be rounded."""
    case = Case("int8", 2048, 512, "int8", split=2)
    fmt = parse_format(case.weight)
    codes = np.random.default_rng(0).integers(-1, 2, (case.k, case.n)).astype(np.int8)
    layer = QuantizedLinear(case.plan(arch()), fmt.encode(codes.astype(np.float32) * 127), None).cuda()
    for m in (1, 9, 33, 100):
        x = torch.randint(-1, 2, (m, case.k), device="cuda").half()
        x[:, 0] = 1
        want = (x.double() @ torch.from_numpy(codes).double().cuda()) * 127
        got = layer(x).double()
        assert torch.allclose(got, want, rtol=2.0**-10, atol=0), (got - want).abs().max()


def test_same_bits_every_time() -> None:
    layer, *_ = make(Case("int4/g128", 2048, 320, split=3), 5)
    x = torch.randn(16, 2048, device="cuda", dtype=torch.float16)
    first = layer(x)
    assert all(torch.equal(first, layer(x)) for _ in range(50))


def test_cuda_graph_and_stream() -> None:
    layer, *_ = make(Case("int4/g128", 2048, 320, split=3), 6)
    x = torch.randn(5, 2048, device="cuda", dtype=torch.float16)
    layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for seed in range(3):
        torch.manual_seed(seed)
        x.normal_()
        graph.replay()
        want = layer(x)
        assert torch.equal(y, want)


def test_torch_compile() -> None:
    layer, *_ = make(CASES[0], 7)
    x = torch.randn(4, 3, 512, device="cuda", dtype=torch.float16)
    compiled = torch.compile(lambda t: torch.relu(layer(t * 2)), fullgraph=True)
    assert torch.allclose(compiled(x), torch.relu(layer(x * 2)))


def test_opcheck() -> None:
    layer, *_ = make(CASES[0], 8)
    packed = [getattr(layer, name) for name in layer.names]
    x = torch.randn(4, 512, device="cuda", dtype=torch.float16)
    torch.library.opcheck(
        torch.ops.qcompile.linear.default,
        (x, None, packed, layer.arrived, layer._description),
        test_utils=("test_schema", "test_faketensor"),
    )
