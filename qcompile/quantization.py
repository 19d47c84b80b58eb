"""Quantize a float model as a recipe says: solve for codes site by site, then write them into the graph."""

from __future__ import annotations

import dataclasses
import glob
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.calibration import ChannelStatistics, Feed
from qcompile.calibration.experts import LARGEST, ExpertMoments, experts_key
from qcompile.calibration.patches import PatchMoments, patches_key
from qcompile.calibration.sequential import SequentialStatistics
from qcompile.formats import BitPlane, DualInt4, Format, NvFp4, Quantized, SuperBlock, joined
from qcompile.passes.graph import constant_shape
from qcompile.passes.quantize import Quantizer, clip_of
from qcompile.passes.sites import (
    ConvSite,
    EmbeddingSite,
    ExpertSite,
    LinearSite,
    Site,
    conv_sites,
    embedding_sites,
    expert_sites,
    linear_sites,
    matrix_sites,
    other_weights,
    router_sites,
    site_name,
)
from qcompile.recipes import Recipe
from qcompile.recipes.recipe import Override
from qcompile.report import LayerRecord, Report
from qcompile.solvers import correct_weight, get_solver, output_error
from qcompile.solvers.base import Solver

_KINDS: dict[type, str] = {LinearSite: "linear", ExpertSite: "experts", ConvSite: "convolution"}
_OF_FLOAT = "convolutions and experts are solved for the activations of the float model"
_ROUTER = "rounded, this router would choose other experts; an override of the recipe quantizes it"
_MIN_TABLE = 64  # rows; smaller tables (token types) are not worth a gather of codes


def spare_routers(recipe: Recipe, model: ir.Model) -> Recipe:
    """``recipe`` with the weights of routers left float, but for those that an override names."""
    names = [site.name for site in router_sites(model)]
    return dataclasses.replace(
        recipe, overrides=(*recipe.overrides, *(Override(glob.escape(name), weight="none") for name in names))
    )


def sites_with_hessian(model: ir.Model, recipe: Recipe) -> set[str]:
    """Names of activations whose second moment in the float model some solver of ``recipe`` wants."""
    apart = expert_moments(model, recipe)
    wanting: list[Site] = [site for site in expert_sites(model) if experts_key(site) not in apart]
    if recipe.hessian == "float":
        wanting += linear_sites(model)
    return {site.x.name or "" for site in wanting if _wants_hessian(site, recipe)}


def expert_moments(model: ir.Model, recipe: Recipe) -> dict[str, ExpertMoments]:
    """Empty second moments, by `experts_key`, of experts whose solver wants some, as far as memory goes; always the float model's."""
    sites = [site for site in expert_sites(model) if _wants_hessian(site, recipe)]
    if sum(map(ExpertMoments.size, sites)) > LARGEST:
        return {}
    return {experts_key(site): ExpertMoments(site) for site in sites}


def _wants_hessian(site: Site, recipe: Recipe) -> bool:
    return recipe.weight_format(site.name) is not None and _solver(recipe, site.name).needs_hessian


def convolution_moments(model: ir.Model, recipe: Recipe) -> dict[str, PatchMoments]:
    """Empty second moments, by `patches_key`, of the convolutions whose solver wants some; always the float model's."""
    return {patches_key(site): PatchMoments(site) for site in conv_sites(model) if _wants_hessian(site, recipe)}


def quantize_model(
    model: ir.Model,
    recipe: Recipe,
    statistics: Mapping[str, ChannelStatistics | PatchMoments | ExpertMoments],
    report: Report,
    progress: Callable[[str], None] | None = None,
    *,
    feeds: Sequence[Feed] = (),
    device: str = "cpu",
) -> ir.Model:
    """Quantize ``model`` in place and return it.

    Args:
        model: a float model.
        recipe: formats and solver.
        statistics: of the inputs of its linear sites, by value name, of convolutions, by `patches_key`, and of experts, by
            `experts_key`; may be empty for data-free solvers.
        report: receives one record per site, and what was left float.
        progress: called with the name of each finished site.
        feeds: calibration samples, for recipes whose Hessians are those of the quantized model.
        device: on which these are run; see `SequentialStatistics`.

    Raises:
        FormatError: static activations without statistics.
    """
    scales = {name: _static_scale(s) for name, s in statistics.items() if isinstance(s, ChannelStatistics)}
    scales = {name: scale for name, scale in scales.items() if scale > 0}
    quantizer = Quantizer(model, scales)
    linear = _sequential(model, recipe, feeds, scales, device) if recipe.hessian != "float" and feeds else statistics
    for node, weight in other_weights(model):
        count = math.prod(constant_shape(weight) or ())
        report.refuse(
            "quantize", site_name(node, weight), f"{_other(model, node, weight)} stay float ({count:,} of them)"
        )
        report.float_weights += count
    solved: dict[str, tuple[Quantized, LayerRecord]] = {}
    routers = {site.name for site in router_sites(model)}
    for site in matrix_sites(model):
        fmt, activation = recipe.weight_format(site.name), recipe.activation_format(site.name)
        if fmt is None:
            reason = _ROUTER if site.name in routers else "the recipe leaves this weight float"
            report.refuse("quantize", site.name, reason)
            report.float_weights += site.shape[0] * site.shape[1]
        else:
            site = quantizer.current(site)
            known = _known(site, statistics, linear)
            picked = site.ids.name if isinstance(site, ExpertSite) else ""
            key = f"{site.weight.name} {fmt} {site.x.name} {picked}"
            if key not in solved:
                solved[key] = _solve(site, fmt, recipe, known)
            weight, record = solved[key]
            record.activation_format = str(activation)
            if isinstance(site, ConvSite):
                quantizer.conv(site, fmt, weight, activation)
            elif isinstance(site, ExpertSite):
                quantizer.experts(site, fmt, weight, activation)
            else:
                quantizer.linear(site, fmt, weight, activation)
            report.layers.append(record)
            if isinstance(site, ExpertSite) and _wants_hessian(site, recipe):
                _tell_of_sharing(site, known, report)
            if linear is not statistics and isinstance(site, ConvSite | ExpertSite) and _wants_hessian(site, recipe):
                report.refuse(f"Hessian of the {recipe.hessian} model", site.name, _OF_FLOAT)
        if progress is not None:
            progress(site.name)
    for table in embedding_sites(model):
        if recipe.embedding_bits:
            _embedding(quantizer, table, report)
        else:
            report.refuse("quantize", table.name, "the recipe leaves this table float")
            report.float_weights += math.prod(constant_shape(table.table) or ())
    return quantizer.finish()


def _other(model: ir.Model, node: ir.Node, weight: ir.Value) -> str:
    if node.graph is not model.graph:
        return "weights inside of branches and loops"
    if weight.const_value is not None and weight.const_value.dtype == ir.DataType.DOUBLE:
        return "weights of float64 (convert the model to float32)"
    return "weights that are picked at run time" if node.op_type.startswith("Gather") else f"weights of {node.op_type}"


def _known(site: Site, statistics: Mapping[str, Any], linear: Mapping[str, Any]) -> Any:
    """Statistics of what ``site`` reads, in the form its solver wants; None if there are none."""
    if isinstance(site, ConvSite):
        return statistics.get(patches_key(site))
    if isinstance(site, ExpertSite):
        return statistics.get(experts_key(site)) or statistics.get(site.x.name or "")
    return linear.get(site.x.name or "")


def _tell_of_sharing(site: ExpertSite, known: Any, report: Report) -> None:
    """Say where experts have no Hessian of their own, or too few rows for one."""
    what = "Hessian of each expert"
    if isinstance(known, ExpertMoments):
        if few := len(known.scarce):
            least = int(known.rows.min())
            reason = (
                f"{few} of {site.experts} experts saw fewer rows than they have input channels ({site.shape[0]}; least {least}): "
                "filled up with the rows of all experts; more calibration data help"
            )
            report.refuse(what, site.name, reason)
    elif known is not None:
        report.refuse(what, site.name, f"those of all experts would take more than {LARGEST >> 30} GiB: they share one")


def _sequential(
    model: ir.Model, recipe: Recipe, feeds: Sequence[Feed], scales: Mapping[str, float], device: str
) -> SequentialStatistics:
    """Statistics behind the sites that are quantized already, of activations as their readers will see them."""
    sites = [s for s in linear_sites(model) if recipe.weight_format(s.name) is not None]
    formats = {s.x.name or "": recipe.activation_format(s.name) for s in sites}
    clips = {s.x.name or "": clip_of(s.x) for s in sites}

    def rounded(name: str, rows: Any) -> Any:
        if device == "cpu":
            return formats[name].round(rows, scales.get(name), clips[name])
        if not formats[name].bits or formats[name].granularity == "token":
            from qcompile.passes.learn.rounding import round_tokens

            return round_tokens(rows, formats[name], clips[name]) if formats[name].bits else rows
        return rows.new_tensor(formats[name].round(rows.cpu().numpy(), scales.get(name), clips[name]))

    names = {s.node.name or "": s.x.name or "" for s in sites if _solver(recipe, s.name).needs_hessian}
    return SequentialStatistics(model, feeds, names, rounded, device=device)


def _solver(recipe: Recipe, site: str) -> Solver:
    name = recipe.solver_name(site)
    return get_solver(name, **(recipe.solver_options if name == recipe.solver else {}))


def _solve(
    site: Site, fmt: Format, recipe: Recipe, known: ChannelStatistics | PatchMoments | ExpertMoments | None
) -> tuple[Quantized, LayerRecord]:
    weight = site.matrix()
    hessian = known.hessian if known is not None else None
    solver = _solver(recipe, site.name)
    wanted = weight
    if recipe.hessian == "corrected" and known is not None and known.cross is not None and hessian is not None:
        wanted = correct_weight(weight, hessian, known.cross)
    quantized = half_scales(_codes(solver, wanted, fmt, hessian), fmt)
    decoded = fmt.decode(quantized)
    norm = float(np.linalg.norm(weight)) or 1.0
    error = None
    if hessian is not None:
        whole, rest = (
            sum(output_error(w, d, h) for w, d, h in _by_group(hessian, weight, against))
            for against in (np.zeros_like(weight), decoded)
        )
        error = (rest / whole) ** 0.5 if whole > 0 else 0.0
    record = LayerRecord(
        site.name,
        _KINDS[type(site)],
        site.shape,
        str(fmt),
        solver=solver.name,
        bits_per_weight=fmt.bits_per_weight(site.shape),
        weight_error=float(np.linalg.norm(weight - decoded)) / norm,
        output_error=error,
    )
    return quantized, record


def _by_group(hessian: np.ndarray, *matrices: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Columns of ``(K, N)`` matrices and the Hessian of each expert or group of a convolution; else all at once."""
    hessians = hessian.reshape(-1, *hessian.shape[-2:])
    return zip(*(np.split(matrix, len(hessians), axis=1) for matrix in matrices), hessians)


def _codes(solver: Solver, weight: np.ndarray, fmt: Format, hessian: np.ndarray | None) -> Quantized:
    if hessian is None:
        return solver.solve(weight, fmt)
    parts = [solver.solve(columns, fmt, hessian=moment) for columns, moment in _by_group(hessian, weight)]
    return parts[0] if len(parts) == 1 else joined(parts)


def half_scales(quantized: Quantized, fmt: Format) -> Quantized:
    """Round group scales to 11 significant bits, so that kernels may store them as float16; below 0.03 % change.

    Codes stay as they are. Per-channel scales stay float32, and so do scales that are small numbers times one per column.
    """
    planes = isinstance(fmt, BitPlane)
    if not (fmt.group or planes) or isinstance(fmt, DualInt4 | NvFp4 | SuperBlock):
        return quantized
    aux = {name: _eleven_bits(array) if planes and name == "offset" else array for name, array in quantized.aux.items()}
    return Quantized(quantized.codes, _eleven_bits(quantized.scale), quantized.zero_point, aux)


def _eleven_bits(values: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(values.astype(np.float32))
    return np.ldexp(np.rint(mantissa * 2048) / 2048, exponent).astype(np.float32)


def _static_scale(statistics: ChannelStatistics) -> float:
    """Scale of a static int8 tensor: clip where 99.999 % of all entries lie below."""
    top = max(statistics.percentile(99.999), 1e-12)
    return top / 127.0


def _embedding(quantizer: Quantizer, site: EmbeddingSite, report: Report) -> None:
    assert site.table.const_value is not None
    table = site.table.const_value.numpy().astype(np.float32, copy=False)
    if len(table) < _MIN_TABLE:
        report.refuse("quantize", site.name, f"a table of {len(table)} rows is too small to gain from it")
        report.float_weights += table.size
        return
    largest = np.abs(table).max(1, keepdims=True)
    scale = np.where(largest == 0, 1, largest / 127.0).astype(np.float32)
    codes = np.clip(np.rint(table / scale), -127, 127).astype(np.int8)
    quantizer.embedding(site, codes, scale)
    error = float(np.linalg.norm(codes * scale - table) / (np.linalg.norm(table) or 1.0))
    bits = 8 + 32 / table.shape[1]
    report.layers.append(
        LayerRecord(
            site.name,
            "embedding",
            (table.shape[0], table.shape[1]),
            "int8/row",
            solver="rtn",
            bits_per_weight=bits,
            weight_error=error,
        )
    )
