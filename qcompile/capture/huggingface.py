"""A Hugging Face model directory -> what to export: a module, example inputs, names, symbolic dimensions.

Reads ``config.json`` and ``*.safetensors`` only: nothing is downloaded, no code of the directory is executed, pickled
weights are refused. Weights are widened to float32, the type in which models are analysed.

| the architecture in config.json | inputs | output |
|---|---|---|
| ``*ForCausalLM``, ``*LMHeadModel`` | input_ids, attention_mask | logits (batch, sequence, vocabulary) |
| the same with ``kv_cache=True`` | + position_ids, past_key_values.N.key/value | logits, present.N.key/value |
| takes pixel_values, ``*Classification`` | pixel_values (batch, channels, height, width) | logits |
| takes pixel_values, others | pixel_values | last_hidden_state |
| takes text, ``*Classification`` | input_ids, attention_mask[, token_type_ids] | logits |
| takes text, others | input_ids, attention_mask[, token_type_ids] | last_hidden_state |
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompile.errors import ModelError

TASKS = ("text-generation", "features", "classification", "image-features", "image-classification")


@dataclass
class Prepared:
    """All that the exporter and the parity check need to know about a model."""

    module: Any
    examples: list[tuple[Any, ...]]
    dynamic_shapes: tuple[Any, ...]
    input_names: list[str]
    output_names: list[str]
    task: str
    architecture: str
    strip_prefix: str = "model."
    renamed_dims: dict[str, str] = field(default_factory=dict)
    padding_input: int | None = None
    generation: dict[str, Any] | None = None


def model_directory(directory: Path) -> tuple[Path, bool]:
    """Return the folder that holds config.json, and whether ``directory`` is a sentence-transformers one.

    ``modules.json`` lists the stages of a sentence embedder; the first is the transformer, in a sub-folder or in place.
    """
    listing = directory / "modules.json"
    if not listing.is_file():
        return directory, False
    for module in _read_json(listing):
        if str(module.get("type", "")).rsplit(".", 1)[-1] == "Transformer":
            inner = (directory / module.get("path", "")).resolve()
            if not inner.is_relative_to(directory.resolve()):
                raise ModelError(f"{listing}: the path of the transformer, '{module['path']}', leaves the directory")
            return inner, True
    raise ModelError(f"{listing}: lists no module of type Transformer")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory; ModelError if there are none."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise ModelError(
                f"{directory}: weights are pickled ({pickles[0]}), which can run code when loaded;"
                " save the model again with save_pretrained(..., safe_serialization=True)"
            )
        raise ModelError(f"{directory}: no *.safetensors file")
    for file in files:
        if not file.resolve().is_relative_to(directory.resolve()) and not _is_cache_blob(directory, file):
            raise ModelError(f"{file}: a link to a file outside the model directory")
        check_safetensors(file)
    return files


def check_safetensors(file: Path) -> None:
    """Read the header of a safetensors file: corrupt and truncated files end here, with their name."""
    import safetensors

    try:
        with safetensors.safe_open(file, framework="np") as archive:
            archive.keys()
    except Exception as error:
        raise ModelError(f"{file}: corrupt or truncated: {_one_line(error)}") from error


def _is_cache_blob(directory: Path, file: Path) -> bool:
    """In the Hugging Face cache, ``models--x/snapshots/<revision>/file`` is a link to ``models--x/blobs/<hash>``."""
    root = directory.resolve().parent.parent
    return directory.resolve().parent.name == "snapshots" and file.resolve().is_relative_to(root / "blobs")


def load(directory: Path, *, task: str | None, kv_cache: bool, token_types: bool | None) -> Prepared:
    """Instantiate the model of ``directory`` (the folder of config.json) and choose inputs and outputs for it."""
    import torch

    try:
        import transformers
    except ImportError as error:
        raise ModelError(f"{directory}: needs transformers; install qcompile[torch]") from error

    config_file = directory / "config.json"
    raw = _read_json(config_file)
    if task is not None and task not in TASKS:
        raise ModelError(f"task '{task}' is not one of {', '.join(TASKS)}")
    weight_files(directory)
    if not isinstance(raw, dict) or not raw.get("model_type"):
        raise ModelError(f"{config_file}: has no model_type")
    if raw.get("is_encoder_decoder"):
        raise ModelError(
            f"{config_file}: '{raw['model_type']}' is an encoder-decoder, which is two graphs; save one part"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{config_file}: {_one_line(error)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{config_file}: '{raw['model_type']}' is an encoder-decoder, which is two graphs; save one part"
        )
    architecture = (raw.get("architectures") or [""])[0]
    task = task or default_task(architecture, config)
    model = _instantiate(transformers, directory, config, task)
    if kv_cache and task != "text-generation":
        raise ModelError(f"{directory}: a key-value cache needs a text-generation model, this one is for {task}")
    if kv_cache and getattr(config, "num_attention_heads", None) is None:
        raise ModelError(f"{config_file}: '{raw['model_type']}' has no attention and so no cache of keys and values")
    torch.manual_seed(0)
    if task == "text-generation":
        prepared = _with_cache(model, config) if kv_cache else _text(model, config, "logits", False, True)
    elif task.startswith("image"):
        prepared = _image(
            model, config, directory, "logits" if task.endswith("classification") else "last_hidden_state"
        )
    else:
        types = token_types if token_types is not None else getattr(config, "type_vocab_size", 0) > 1
        prepared = _text(model, config, "logits" if task == "classification" else "last_hidden_state", types, False)
    if kv_cache:
        prepared.generation = _generation(model, config)
    prepared.task = task
    prepared.architecture = architecture or type(model).__name__
    return prepared


def _generation(model: Any, config: Any) -> dict[str, Any]:
    """How texts of a decoder end: ``ends``, the tokens that end one, and ``positions``, the most it reads (or None)."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return {
        "ends": [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)],
        "positions": positions if isinstance(positions, int) and positions > 0 else None,
    }


def default_task(architecture: str, config: Any) -> str:
    """The task that an architecture's name and the kind of its input imply."""
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "text-generation"
    image = hasattr(config, "num_channels") or hasattr(config, "image_size")
    if "Classification" in architecture:
        return "image-classification" if image else "classification"
    return "image-features" if image else "features"


def _instantiate(transformers: Any, directory: Path, config: Any, task: str) -> Any:
    import torch

    loaders = {
        "text-generation": "AutoModelForCausalLM",
        "features": "AutoModel",
        "image-features": "AutoModel",
        "classification": "AutoModelForSequenceClassification",
        "image-classification": "AutoModelForImageClassification",
    }
    name = loaders[task]
    if task == "classification" and "TokenClassification" in ((config.architectures or [""])[0]):
        name = "AutoModelForTokenClassification"
    if any(hasattr(config, name) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
        config._experts_implementation = "batched_mm"  # the others depend on data or have no ONNX form
    # torch's fused attention has no logit soft-capping: models that use it are exact in eager form only.
    softcap = getattr(config, "attn_logit_softcapping", None)
    choices = ["eager"] if softcap else ["sdpa", "eager"]
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        for attention in choices:
            try:
                model, info = getattr(transformers, name).from_pretrained(
                    directory,
                    config=config,
                    dtype=torch.float32,
                    attn_implementation=attention,
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # reported below, by name
                )
                break
            except ValueError as error:
                if attention == choices[-1] or "attention" not in str(error):
                    raise
    except Exception as error:
        raise ModelError(f"{directory}: {_one_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
    # Poolers are loaded for no task here, so a checkpoint may lack them; anything else would be random numbers.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ModelError(f"{directory}: {len(missing)} weights are missing, first '{missing[0]}'")
    if info["mismatched_keys"]:
        key, found, wanted = sorted(info["mismatched_keys"])[0]
        raise ModelError(
            f"{directory}: weight '{key}' has shape {tuple(found)}, the configuration asks for {tuple(wanted)}"
        )
    return model.eval()


def _text(model: Any, config: Any, output: str, token_types: bool, causal: bool) -> Prepared:
    import torch

    class TextModel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, token_type_ids=None):
            extra = {"use_cache": False} if causal else {}
            if token_types:
                extra["token_type_ids"] = token_type_ids
            return getattr(self.model(input_ids=input_ids, attention_mask=attention_mask, **extra), output)

    examples = []
    for batch, sequence, padding in ((2, 12, 4), (3, 17, 5)):
        ids = torch.randint(0, config.vocab_size, (batch, sequence))
        mask = torch.ones_like(ids)
        mask[-1, -padding:] = 0
        types = torch.zeros_like(ids)
        types[:, sequence // 2 :] = 1
        examples.append((ids, mask, types) if token_types else (ids, mask))
    names = ["input_ids", "attention_mask", "token_type_ids"][: len(examples[0])]
    dims = {0: "batch", 1: "sequence"}
    return Prepared(TextModel().eval(), examples, tuple(dims for _ in names), names, [output], "", "", padding_input=1)


def _with_cache(model: Any, config: Any) -> Prepared:
    """Decoding step: past keys and values are inputs ``(batch, kv heads, past, head size)``, present ones outputs."""
    import torch
    from transformers.cache_utils import DynamicCache

    layers = config.num_hidden_layers

    class CachedModel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, position_ids, past):
            cache = DynamicCache()
            for layer in range(layers):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            result = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            present = [tensor for layer in result.past_key_values.layers for tensor in (layer.keys, layer.values)]
            return (result.logits, *present)

    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    examples = []
    for batch, past, sequence in ((2, 7, 5), (3, 11, 2)):
        ids = torch.randint(0, config.vocab_size, (batch, sequence))
        mask = torch.ones(batch, past + sequence, dtype=torch.long)
        positions = torch.arange(past, past + sequence)[None].repeat(batch, 1)
        cache = [torch.randn(batch, heads, past, size) for _ in range(2 * layers)]
        examples.append((ids, mask, positions, cache))
    new, old = {0: "batch", 1: "sequence"}, {0: "batch", 2: "past"}
    kinds = [(layer, kind) for layer in range(layers) for kind in ("key", "value")]
    return Prepared(
        CachedModel().eval(),
        examples,
        (new, {0: "batch", 1: "total"}, new, [old] * (2 * layers)),
        ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{i}.{kind}" for i, kind in kinds)],
        ["logits", *(f"present.{i}.{kind}" for i, kind in kinds)],
        "",
        "",
        renamed_dims={"total": "past + sequence"},  # torch.export has no dimension that is the sum of two
    )


def _image(model: Any, config: Any, directory: Path, output: str) -> Prepared:
    import torch

    class ImageModel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            return getattr(self.model(pixel_values=pixel_values), output)

    height, width = image_size(config, directory)
    channels = getattr(config, "num_channels", 3)
    examples = [(torch.randn(batch, channels, height, width),) for batch in (2, 3)]
    return Prepared(ImageModel().eval(), examples, ({0: "batch"},), ["pixel_values"], [output], "", "")


def image_size(config: Any, directory: Path) -> tuple[int, int]:
    """Height and width of the model's images: from config.json, else preprocessor_config.json, else 224."""
    size: Any = getattr(config, "image_size", None)
    preprocessor = directory / "preprocessor_config.json"
    if size is None and preprocessor.is_file():
        raw = _read_json(preprocessor)
        size = raw.get("crop_size") or raw.get("size")
    if isinstance(size, dict):
        edge = size.get("shortest_edge")
        size = (size.get("height", edge), size.get("width", edge))
    if isinstance(size, Sequence) and len(size) == 2 and all(size):
        return int(size[0]), int(size[1])
    return (int(size), int(size)) if isinstance(size, int) else (224, 224)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{file}: not found") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: not valid JSON: {error}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
