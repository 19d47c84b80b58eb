"""Tiny models with random weights, saved as Hugging Face directories."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
IMAGE: dict[str, Any] = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "intermediate_size": 48}  # fmt: skip
GPT: dict[str, Any] = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
                       "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip

# name -> (configuration class, model class, options)
TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**SMALL, "num_key_value_heads": 2}),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**SMALL, "num_key_value_heads": 2, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**SMALL, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**SMALL, "num_key_value_heads": 2, "head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "attn_implementation": "eager"},
    ),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**SMALL, "rotary_pct": 0.5}),
    "gpt-j": ("GPTJConfig", "GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {**{k: v for k, v in SMALL.items() if k != "intermediate_size"}, "ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "bert": ("BertConfig", "BertModel", SMALL),
    "vit": ("ViTConfig", "ViTModel", IMAGE),
    "resnet": (
        "ResNetConfig",
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 5},
    ),
    "mobilenet": ("MobileNetV2Config", "MobileNetV2Model", {"depth_multiplier": 0.25, "image_size": 32}),
}


def save_tiny(name: str, folder: Path) -> Path:
    """Save the tiny model ``name`` as a Hugging Face directory."""
    import torch
    import transformers

    config_class, model_class, options = TINY[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**options)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():  # norms and biases start as ones and zeros, which hides mistakes
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for key, buffer in model.named_buffers():
            if "running_var" in key:
                buffer.uniform_(0.5, 1.5)
            elif "running_mean" in key:
                buffer.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny("llama")``: the directory of that tiny model, made once per session."""
    pytest.importorskip("transformers")
    made: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in made:
            made[name] = save_tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return directory


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """Change entries of a directory's config.json."""

    def edit(folder: Path, **entries: Any) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))

    return edit


def feeds_of(model: ir.Model, batch: int, sequence: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs for a text or image model, the last row padded at the end."""
    rng = np.random.default_rng(seed)
    sizes = {"batch": batch, "sequence": sequence}
    feeds = {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape or ()]
        if value.name == "attention_mask":
            feeds[value.name] = np.ones(shape, np.int64)
            feeds[value.name][-1, max(1, sequence - 2) :] = 0
        elif value.dtype == ir.DataType.INT64:
            feeds[value.name or ""] = rng.integers(0, 2 if value.name == "token_type_ids" else 90, shape)
        else:
            feeds[value.name or ""] = rng.standard_normal(shape).astype(np.float32)
    return feeds


@pytest.fixture
def feeds() -> Callable[..., dict[str, np.ndarray]]:
    return feeds_of
