"""Tiny, randomly initialised models of many architectures, exported to ONNX.

They exist to be analysed and proved: two layers or less, odd sizes where the architecture permits, and no parameter left
at its initial value (a norm gamma of ones would hide a wrong rule). Exports are kept in a cache folder, keyed by this
file and the versions of torch and transformers.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

TOKENS = 97
BUILDERS: dict[str, Callable[[], tuple[nn.Module, tuple, tuple, list[str]]]] = {}


def miniature(function: Callable) -> Callable:
    """Register a builder: it returns the module, example inputs, dynamic shapes and input names."""
    BUILDERS[function.__name__] = function
    return function


class Call(nn.Module):
    """A module whose forward is a given function of another module."""

    def __init__(self, module: nn.Module, function: Callable) -> None:
        super().__init__()
        self.inner, self.function = module, function

    def forward(self, *inputs):
        return self.function(self.inner, *inputs)


def model(name: str) -> ir.Model:
    """The exported miniature ``name``."""
    path = _folder(name) / f"{name}.onnx"
    if not path.exists():
        exported = export(*BUILDERS[name]())
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        ir.save(exported, temporary)
        temporary.replace(path)
    return ir.load(path)


def export(module: nn.Module, inputs: tuple, dynamic: tuple, names: list[str]) -> ir.Model:
    """Export a module with randomised parameters at opset 23."""
    randomise(module.eval())
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                opset_version=23,
                dynamic_shapes=dynamic if len(names) > 1 or not isinstance(module, Call) else (dynamic,),
                input_names=names,
                verbose=False,
            )
    finally:
        logging.disable(level)
    return program.model


def randomise(module: nn.Module) -> None:
    """Give every parameter and running statistic a generic value; matrices keep a sensible gain."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() > 1:
                fan = p[0].numel() if "embed" not in name else 1
                p.copy_(noise / max(1, fan) ** 0.5)
            elif name.endswith(("A_log", "dt_bias", "D")):
                p.copy_(p + 0.1 * noise)
            elif p.dim() == 1 and (p == 1).all():
                p.copy_(1 + 0.3 * noise)
            else:
                p.copy_(p + 0.3 * noise)
        for name, b in module.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.3 * torch.randn(b.shape, generator=generator))
            elif name.endswith("running_var"):
                b.copy_(0.5 + torch.rand(b.shape, generator=generator))


def _folder(name: str) -> Path:
    """Cache folder, keyed by this file without the builders of other miniatures, so that adding one costs one export."""
    import transformers

    text = Path(__file__).read_text()
    for other, builder in BUILDERS.items():
        if other != name:
            text = text.replace(inspect.getsource(builder), "")
    key = hashlib.sha256(f"{text} {torch.__version__} {transformers.__version__}".encode())
    folder = Path(tempfile.gettempdir()) / f"qcompile-miniatures-{os.getuid()}" / key.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _ids(batch: int = 2, length: int = 6) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, TOKENS, (batch, length)))


def _tokens(module: nn.Module, pick: Callable, static: bool = False):
    dynamic = ({0: "batch"} if static else {0: "batch", 1: "seq"},)
    return Call(module, pick), (_ids(),), dynamic, ["input_ids"]


def _causal(config_class: str, model_class: str, *, static: bool = False, **options):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, config_class)(vocab_size=TOKENS, **options)
    config._experts_implementation = "batched_mm"
    module = getattr(transformers, model_class)(config)
    return _tokens(module, lambda m, ids: m(input_ids=ids, use_cache=False).logits, static)


_DECODER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@miniature
def llama():
    return _causal("LlamaConfig", "LlamaForCausalLM", **_DECODER, tie_word_embeddings=False)


@miniature
def llama_tied():
    return _causal("LlamaConfig", "LlamaForCausalLM", **_DECODER, tie_word_embeddings=True)


@miniature
def qwen2():
    return _causal("Qwen2Config", "Qwen2ForCausalLM", **_DECODER, tie_word_embeddings=False)


@miniature
def qwen3():
    return _causal("Qwen3Config", "Qwen3ForCausalLM", **_DECODER, head_dim=8, tie_word_embeddings=False)


@miniature
def gemma2():
    return _causal(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        **_DECODER,
        head_dim=8,
        attn_implementation="eager",
        tie_word_embeddings=False,
        query_pre_attn_scalar=8,
    )


@miniature
def gpt_neox():
    options = {k: v for k, v in _DECODER.items() if k != "num_key_value_heads"}
    return _causal("GPTNeoXConfig", "GPTNeoXForCausalLM", **options, rotary_pct=0.5, tie_word_embeddings=False)


@miniature
def opt():
    return _causal(
        "OPTConfig",
        "OPTForCausalLM",
        hidden_size=24,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=24,
        tie_word_embeddings=False,
        dropout=0.0,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )


@miniature
def gpt2():
    return _causal(
        "GPT2Config", "GPT2LMHeadModel", n_embd=24, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )


@miniature
def phi3():
    return _causal("Phi3Config", "Phi3ForCausalLM", **_DECODER, tie_word_embeddings=False)


@miniature
def mixtral():
    return _causal(
        "MixtralConfig",
        "MixtralForCausalLM",
        **_DECODER,
        num_local_experts=3,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )


@miniature
def glm4_moe():
    return _causal(
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        **_DECODER,
        head_dim=8,
        moe_intermediate_size=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        tie_word_embeddings=False,
    )


@miniature
def mamba():
    return _causal(
        "MambaConfig",
        "MambaForCausalLM",
        static=True,
        hidden_size=12,
        num_hidden_layers=2,
        state_size=4,
        time_step_rank=3,
        tie_word_embeddings=False,
        pad_token_id=0,
    )


@miniature
def mamba2():
    return _causal(
        "Mamba2Config",
        "Mamba2ForCausalLM",
        static=True,
        hidden_size=12,
        num_hidden_layers=1,
        state_size=4,
        num_heads=4,
        head_dim=6,
        n_groups=2,
        chunk_size=6,
        tie_word_embeddings=False,
        pad_token_id=0,
    )


@miniature
def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=TOKENS,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return _tokens(BertModel(config, add_pooling_layer=False), lambda m, ids: m(input_ids=ids).last_hidden_state)


@miniature
def albert():
    """One layer whose weights are used twice."""
    from transformers import AlbertConfig, AlbertModel

    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=TOKENS,
        embedding_size=12,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return _tokens(AlbertModel(config, add_pooling_layer=False), lambda m, ids: m(input_ids=ids).last_hidden_state)


def _image(module: nn.Module, pick: Callable, size: int):
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return Call(module, pick), (x,), ({0: "batch"},), ["pixels"]


@miniature
def vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    return _image(ViTForImageClassification(config), lambda m, x: m(x).logits, 16)


@miniature
def swin():
    from transformers import SwinConfig, SwinModel

    torch.manual_seed(0)
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=12, depths=[2, 1], num_heads=[2, 4], window_size=2)
    module = nn.ModuleDict({"body": SwinModel(config, add_pooling_layer=False), "head": nn.Linear(24, 5)})
    return _image(module, lambda m, x: m["head"](m["body"](x).last_hidden_state.mean(1)), 32)


@miniature
def mobilenet_v2():
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    torch.manual_seed(0)
    config = MobileNetV2Config(image_size=32, depth_multiplier=0.35, min_depth=4, num_labels=5)
    return _image(MobileNetV2ForImageClassification(config), lambda m, x: m(x).logits, 32)


@miniature
def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=6, hidden_sizes=[12, 20], depths=[2, 1], layer_type="basic", num_labels=5)
    return _image(ResNetForImageClassification(config), lambda m, x: m(x).logits, 16)


@miniature
def convnext():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    torch.manual_seed(0)
    config = ConvNextConfig(
        hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=4, num_labels=5, layer_scale_init_value=0.5
    )
    return _image(ConvNextForImageClassification(config), lambda m, x: m(x).logits, 16)


class DiTBlock(nn.Module):
    """Adaptive layer norm: shift, scale and gate of both branches come from the conditioning vector."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 40), nn.Linear(40, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x, c):
        b, s, w = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(torch.nn.functional.silu(c))[:, None].chunk(
            6, -1
        )
        q, k, v = (
            self.qkv(self.norm1(x) * (1 + scale1) + shift1).reshape(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        a = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, w)
        x = x + gate1 * self.out(a)
        h = torch.nn.functional.gelu(self.up(self.norm2(x) * (1 + scale2) + shift2), approximate="tanh")
        return x + gate2 * self.down(h)


class DiT(nn.Module):
    """A diffusion transformer on latents of 4 channels."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4, width, 2, 2)
        self.position = nn.Parameter(torch.zeros(1, 16, width))
        self.time1, self.time2 = nn.Linear(16, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, 2 * 2 * 4)

    def forward(self, x, t):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        frequency = torch.exp(-torch.arange(8, dtype=torch.float32))
        angle = t[:, None] * frequency
        c = self.time2(torch.nn.functional.silu(self.time1(torch.cat((angle.cos(), angle.sin()), -1))))
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(torch.nn.functional.silu(c))[:, None].chunk(2, -1)
        return self.head(self.norm(x) * (1 + scale) + shift)


@miniature
def dit():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return DiT(), (x, torch.tensor([0.3, 0.9])), ({0: "batch"}, {0: "batch"}), ["latents", "time"]


class Looped(nn.Module):
    """A decoder block applied three times with the same weights, and a head tied to the embedding."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, width)
        self.norm1, self.norm2, self.norm = nn.RMSNorm(width), nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 40, bias=False), nn.Linear(width, 40, bias=False)
        self.down = nn.Linear(40, width, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        b, s, w = x.shape
        for _ in range(3):
            q, k, v = (t.reshape(b, s, 4, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
            a = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(a.transpose(1, 2).reshape(b, s, w))
            h = self.norm2(x)
            x = x + self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h))
        return self.norm(x) @ self.embed.weight.T


@miniature
def looped():
    torch.manual_seed(0)
    return Looped(), (_ids(),), ({0: "batch", 1: "seq"},), ["input_ids"]
