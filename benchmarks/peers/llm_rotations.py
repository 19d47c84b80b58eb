"""Perplexity of a Llama quantized by llm-compressor or brevitas, for `benchmarks/rotations.py`; runs under a Python that has them.

    python llm_rotations.py PEER MODEL_DIRECTORY WINDOWS.npz OPTIONS_JSON

``WINDOWS.npz`` holds token ids ``(windows, length)``: ``evaluation`` and ``calibration``. Options: ``bits`` of activations
(dynamic, per token, symmetric), ``rotate`` (QuaRot's rotations, as far as the peer has them), ``gptq``. Weights are int4 in
groups of 128 with zero points; head and embedding stay float. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch


def perplexity(model, rows: np.ndarray) -> float:
    """``exp`` of the mean negative log likelihood of every token but the first of each window."""
    total, device = 0.0, next(model.parameters()).device
    with torch.no_grad():
        for row in torch.as_tensor(rows, device=device):
            logits = model(input_ids=row[None], attention_mask=torch.ones_like(row)[None]).logits[0, :-1].double()
            total -= float(logits.log_softmax(-1).gather(-1, row[1:, None]).sum())
    return float(np.exp(total / (rows.shape[0] * (rows.shape[1] - 1))))


def llm_compressor(directory: str, calibration: np.ndarray, options: dict):
    """RTN or GPTQ behind SpinQuant's R1 and R2; R4 is refused for widths that are no powers of two."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform import SpinQuantModifier
    from transformers import AutoModelForCausalLM

    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 128}
    inputs = {"num_bits": options["bits"], "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    groups = {"g": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    kind = GPTQModifier if options["gptq"] else QuantizationModifier
    recipe = [SpinQuantModifier(rotations=["R1", "R2"], transform_type="hadamard")] if options["rotate"] else []
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    samples = Dataset.from_dict(
        {"input_ids": calibration.tolist(), "attention_mask": np.ones_like(calibration).tolist()}
    )
    oneshot(
        model=model,
        recipe=[*recipe, kind(config_groups=groups, ignore=["lm_head"])],
        dataset=samples,
        max_seq_length=calibration.shape[1],
        num_calibration_samples=len(calibration),
    )
    return model


def brevitas(directory: str, calibration: np.ndarray, options: dict):
    """RTN or GPTQ behind fused Hadamard rotations, with one at run time before the down projections."""
    from brevitas_examples.llm import main as llm
    from brevitas_examples.llm.llm_args import create_args_parser

    def samples(**kwargs):
        ids = torch.as_tensor(calibration, device="cuda" if torch.cuda.is_available() else "cpu")
        return [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]

    def batches(dataset, **kwargs):
        return dataset

    llm.get_dataset_for_model, llm.DataLoader = samples, batches
    arguments = (
        f"--model {directory} --dtype float32 --seqlen {calibration.shape[1]} --nsamples {len(calibration)} "
        "--weight-bit-width 4 --weight-quant-type asym --weight-quant-granularity per_group --weight-group-size 128 "
        "--quantize-weight-zero-point --weight-param-method stats --weight-scale-precision float_scale "
        f"--input-bit-width {options['bits']} --input-scale-type dynamic --input-quant-type sym "
        "--input-quant-granularity per_row --input-param-method stats --input-scale-precision float_scale"
    )
    if options["rotate"]:
        arguments += " --rotation fused_no_fx --rotation-mode had --rotation-orphan-sink --rotation-sdpa-regions"
        arguments += " --replace-rmsnorm"
    if options["gptq"]:
        arguments += " --gptq --gpxq-act-order --gpxq-use-quant-activations"
    args = create_args_parser().parse_args(arguments.split())
    return llm.quantize_llm(args)[1]


def main(peer: str, directory: str, windows: str, options: str) -> None:
    """Quantize, evaluate, print."""
    given, chosen, start = np.load(windows), json.loads(options), time.time()
    model = {"llm-compressor": llm_compressor, "brevitas": brevitas}[peer](directory, given["calibration"], chosen)
    model.eval()
    value = perplexity(model, given["evaluation"])
    print(json.dumps({"peer": peer, **chosen, "perplexity": value, "seconds": round(time.time() - start)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
