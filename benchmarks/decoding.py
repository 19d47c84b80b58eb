"""Tokens per second of whole decoders beside llama.cpp: one model, two programs, in one process.

    python benchmarks/decoding.py --folder FOLDER --layers 8 --weight int4/g128:Q4_0 --weight int2/g128:Q2_K

makes a Llama with random weights in FOLDER (the shape of TinyLlama 1.1B unless said otherwise, with so many layers), compiles it
with ``--kv-cache``, writes it as GGUF (package ``gguf``) and quantizes that with llama.cpp (package ``llama-cpp-python``,
extra ``peers``). What is there already is used again. Then both read a prompt and continue it, in turns, and the table has medians:
tokens read per second, and tokens written per second behind so many positions. The last column is the cosine of both logits
behind the prompt, which tells whether both computed the same model (formats of few bits differ from each other).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from pathlib import Path

os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import gguf
import llama_cpp
import numpy as np
import torch
import transformers

import qcompile
from qcompile.generation import Decoder
from qcompile.runtime import set_threads

FTYPES = {"Q4_0": 2, "Q8_0": 7, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15}
"""``enum llama_ftype``, of the mixes with mostly this type."""


def make(folder: Path, args: argparse.Namespace) -> None:
    """A Llama with random weights, in the layout of Hugging Face."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.inner,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def write_gguf(model: Path, path: Path) -> None:
    """The same model as GGUF, float16 matrices; rows of queries and keys in the order of llama.cpp's rotary embedding."""
    config = transformers.LlamaConfig.from_pretrained(model)
    module = transformers.LlamaForCausalLM.from_pretrained(model)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in module.state_dict().items():
        array = tensor.numpy()
        for part, count in heads.items():
            if part in name:  # halves that rotate together become neighbours
                array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)), array.astype(np.float16 if array.ndim > 1 else np.float32)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A model of llama.cpp and its context."""

    def __init__(self, path: Path, positions: int) -> None:
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = positions
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def threads(self, count: int) -> None:
        """Use so many from now on."""
        llama_cpp.llama_set_n_threads(self.context, count, count)

    def reset(self) -> None:
        """Forget everything."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def read(self, tokens: np.ndarray) -> np.ndarray:
        """Logits behind the last of ``(1, L)`` tokens."""
        held = (llama_cpp.llama_token * tokens.size)(*tokens[0].tolist())
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(held, tokens.size)):
            raise RuntimeError("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, (self.vocabulary,)).copy()[None]


class Ours(Decoder):
    """The same interface."""

    def threads(self, count: int) -> None:
        """Use so many from now on."""
        set_threads(count)


def quantize(source: Path, path: Path, kind: str) -> None:
    """With llama.cpp's own quantizer."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = FTYPES[kind], len(os.sched_getaffinity(0))
    parameters.pure = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp could not quantize to {kind}")


def measure(contenders: dict[str, Ours | LlamaCpp], args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Per contender ``(rounds, 2)``: seconds per token read, and per token written."""
    tokens = np.random.default_rng(0).integers(0, args.vocabulary, (1, args.prompt + args.written))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, contender in contenders.items():
            contender.reset()
            start = time.perf_counter()
            contender.read(tokens[:, : args.prompt])
            middle = time.perf_counter()
            steps = []
            for i in range(args.prompt, tokens.shape[1]):
                before = time.perf_counter()
                contender.read(tokens[:, i : i + 1])
                steps.append(time.perf_counter() - before)
            times[name].append(((middle - start) / args.prompt, float(np.median(steps))))
    return {name: np.array(rows) for name, rows in times.items()}


def main() -> None:
    """Prepare what is missing, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where models and artifacts are kept")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5632)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--weight", action="append", metavar="OURS:THEIRS", help="formats to compare")
    parser.add_argument("--prompt", type=int, default=128, help="positions before the first token that is written")
    parser.add_argument("--written", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", default="1", help="comma-separated")
    parser.add_argument("--prepare", action="store_true", help="make models and artifacts only")
    args = parser.parse_args()
    model, plain = args.folder / "model", args.folder / "model.gguf"
    if not model.exists():
        make(model, args)
    if not plain.exists():
        write_gguf(model, plain)
    rows = []
    for pair in args.weight or ["int4/g128:Q4_0"]:
        weight, _, kind = pair.partition(":")
        artifact, quantized = args.folder / weight.replace("/", "-"), args.folder / f"{kind}.gguf"
        if not artifact.exists():
            qcompile.compile(
                model, recipe="w8a8-rtn", weight=weight, output=artifact, capture_options={"kv_cache": True}
            )
        if not quantized.exists():
            quantize(plain, quantized, kind)
        if args.prepare:
            continue
        compiled = qcompile.load(artifact)
        contenders = {"ours": Ours(compiled), kind: LlamaCpp(quantized, args.prompt + args.written)}
        size = [artifact.joinpath("weights.safetensors").stat().st_size / 1e6, quantized.stat().st_size / 1e6]
        for threads in map(int, args.threads.split(",")):
            for contender in contenders.values():
                contender.threads(threads)
            tokens = np.random.default_rng(0).integers(0, args.vocabulary, (1, args.prompt))
            logits = []
            for contender in contenders.values():
                contender.reset()
                logits.append(contender.read(tokens)[0].astype(np.float64))
            cosine = logits[0] @ logits[1] / np.linalg.norm(logits[0]) / np.linalg.norm(logits[1])
            ours, theirs = (np.median(t, axis=0) for t in measure(contenders, args).values())
            rows.append(
                f"| {weight} | {kind} | {threads} | {1 / ours[0]:.0f} | {1 / theirs[0]:.0f} ({theirs[0] / ours[0]:.2f}x) "
                f"| {1 / ours[1]:.1f} | {1 / theirs[1]:.1f} ({theirs[1] / ours[1]:.2f}x) "
                f"| {size[0]:.0f} | {size[1]:.0f} | {cosine:.3f} |"
            )
            print(rows[-1], flush=True)
    print(f"\nbehind {args.prompt} positions, {args.layers} layers of width {args.width}\n")
    print("| weights | llama.cpp | threads | read/s | llama.cpp | written/s | llama.cpp | MB | llama.cpp | cosine |")
    print("|---|---|---|---|---|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
