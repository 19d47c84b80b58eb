"""Mixtures of experts from a Hugging Face directory: they compile, and all their weights are quantized."""

import math

import numpy as np
import pytest

import qcompile
from qcompile import ort

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 97, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 64, "num_experts_per_tok": 2}  # fmt: skip
MODELS = {
    "Mixtral": {"intermediate_size": 52, "num_local_experts": 3},
    "Qwen2Moe": {"intermediate_size": 52, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28,
                 "num_experts": 5},
    "DeepseekV3": {"intermediate_size": 52, "moe_intermediate_size": 20, "num_key_value_heads": 4, "n_routed_experts": 4,
                   "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 12,
                   "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_experts_are_quantized_and_the_report_has_them_as_layers(name, tmp_path):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **MODELS[name]})
    module = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    module.save_pretrained(tmp_path / "model")
    model = qcompile.compile(tmp_path / "model", recipe="w8a8-rtn", output=tmp_path / "out", progress=False)
    ids = np.random.default_rng(0).integers(0, 97, (2, 7))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    logits = model(feed)
    expected = module(torch.from_numpy(ids)).logits.detach().numpy()
    # A router that is nearly undecided may pick another expert than the float model for single tokens.
    assert np.median(np.linalg.norm(logits - expected, axis=-1) / np.linalg.norm(expected, axis=-1)) < 0.05
    emitted = next(iter(ort.run(ort.session(model.onnx_path), feed).values()))
    np.testing.assert_allclose(logits, emitted, atol=1e-4)

    stacks = [p for key, p in module.named_parameters() if ".experts." in key and p.ndim == 3]
    layers = [layer for layer in model.report.layers if layer.kind == "experts"]
    assert len(layers) == len(stacks) > 0 and all("experts" in layer.name for layer in layers)
    assert sum(math.prod(layer.shape) for layer in layers) == sum(p.numel() for p in stacks)
    assert model.report.float_weights == 0 and model.report.bits_per_weight < 9
    assert not [r for r in model.report.refusals if "stay float" in r.reason]
