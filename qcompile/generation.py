"""Text from a compiled decoder: the prompt is read, then one token follows the other, with a cache of keys and values.

A token is drawn from ``softmax(logits / temperature)`` of the ``top_k`` likeliest tokens, and among those of the fewest whose
probabilities add up to ``top_p`` (nucleus sampling: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qcompile.errors import ArtifactError, InputError
from qcompile.runtime import aligned

TOKENIZER = "tokenizer.json"
CACHE = "past_key_values."
CHUNK = 256
"""Tokens of a prompt that are read at once: a call returns the logits of all it reads."""

ROOM = 256
"""Positions a cache that is written in place has room for at first."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; 1 draws from the probabilities of the model, higher evens them out.
        top_k: draw from as many of the likeliest tokens; 0 is all.
        top_p: draw from the fewest of the likeliest tokens with at least this probability together.
        seed: of the generator.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < np.inf:
            raise InputError(f"a temperature is 0 or a positive number, not {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k is a number of tokens, or 0 for all of them, not {self.top_k}")
        if self.seed < 0:
            raise InputError(f"a seed is 0 or a positive number, not {self.seed}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is a probability above 0, at most 1, not {self.top_p}")

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Float64 ``(V,)`` for float logits ``(V,)``; of equally likely tokens the first counts as the likeliest."""
        scores = logits.astype(np.float64)
        chances = np.zeros(len(scores))
        order = np.argsort(-scores, kind="stable")
        if not self.temperature:
            chances[order[0]] = 1
            return chances
        kept = order[: self.top_k or None]
        likely = np.exp((scores[kept] - scores[kept[0]]) / self.temperature)
        before = np.cumsum(likely) - likely
        inside = before < self.top_p * likely.sum()
        chances[kept[inside]] = likely[inside] / likely[inside].sum()
        return chances

    def choose(self, logits: np.ndarray, random: np.random.Generator) -> int:
        """A token for logits ``(V,)``."""
        if not self.temperature:
            return int(np.argmax(logits))
        return int(random.choice(len(logits), p=self.probabilities(logits)))


class Decoder:
    """A compiled decoding step and what it has read so far.

    Where the program can, it writes new keys and values to a cache with room for more, which doubles when it is full; else every
    step returns a cache that is longer.

    Args:
        model: compiled with a cache of keys and values.

    Raises:
        InputError: it was compiled without.
    """

    def __init__(self, model: Any) -> None:
        names = [spec.name for spec in model.inputs]
        if "input_ids" not in names or not any(name.startswith(CACHE) for name in names):
            raise InputError(f"{model.path} has no cache of keys and values; compile the model with `--kv-cache`")
        program = model.program
        self._in_place = getattr(program, "step", None)
        # On a GPU the cache stays there.
        self._run = self._in_place.run if self._in_place else getattr(program, "run_torch", program.run)
        self._specs, self._names = [s for s in model.inputs if s.name.startswith(CACHE)], names
        self.reset()

    def reset(self, batch: int = 1) -> None:
        """Forget everything; the next call starts ``batch`` sequences."""
        self.batch, self.length, self._room = batch, 0, 0
        self._cache: dict[str, Any] = {s.name: self._zeros(s, 0) for s in self._specs}

    def read(self, tokens: np.ndarray) -> np.ndarray:
        """Read int64 ``(batch, L)`` more tokens; returns the float32 logits ``(batch, V)`` behind the last one.

        Raises:
            InputError: there are none, or they belong to another number of sequences.
        """
        if tokens.ndim != 2 or len(tokens) != self.batch or not tokens.shape[1]:
            raise InputError(f"tokens of shape {tokens.shape}; {self.batch} sequence(s) of at least one token continue")
        for start in range(0, tokens.shape[1], CHUNK):
            logits = self._step(np.ascontiguousarray(tokens[:, start : start + CHUNK], np.int64))
        return logits

    def _step(self, tokens: np.ndarray) -> np.ndarray:
        total = self.length + tokens.shape[1]
        if self._in_place and total > self._room:
            self._grow(total)
        feed = {
            "input_ids": tokens,
            "attention_mask": np.ones((self.batch, total), np.int64),
            "position_ids": np.tile(np.arange(self.length, total), (self.batch, 1)),
        }
        out = self._run({name: feed[name] for name in self._names if name in feed} | self._cache)
        logits = out.pop("logits")[:, -1]
        if not self._in_place:
            self._cache = dict(zip(self._cache, out.values(), strict=True))
        self.length = total
        return logits if isinstance(logits, np.ndarray) else logits.float().cpu().numpy()

    def _grow(self, total: int) -> None:
        self._room = max(ROOM, 1 << (total - 1).bit_length())
        for spec in self._specs:
            old, new = self._cache[spec.name], aligned(self._zeros(spec, self._room))
            new[:, :, : self.length] = old[:, :, : self.length]
            self._cache[spec.name] = new

    def _zeros(self, spec: Any, positions: int) -> np.ndarray:
        sizes: dict[str | int, int] = {"batch": self.batch, "past": positions}
        return np.zeros([int(sizes.get(d, d)) for d in spec.shape], spec.dtype)


@dataclass
class Pace:
    """What a generation took.

    Attributes:
        read, written: tokens.
        reading, writing: seconds.
        end: why it ended: ``"end of text"``, ``"as many tokens as asked for"`` or ``"longest text of the model"``.
    """

    read: int = 0
    written: int = 0
    reading: float = 0.0
    writing: float = 0.0
    end: str = ""

    def __str__(self) -> str:
        rates = [count / seconds if seconds else 0.0 for count, seconds in
                 ((self.read, self.reading), (max(self.written - 1, 0), self.writing))]  # fmt: skip
        return (
            f"{self.read} tokens read at {rates[0]:.0f} a second, {self.written} written at {rates[1]:.0f} a second "
            f"({self.end})"
        )


@dataclass
class Generation:
    """A text that is being written: iterate over its pieces.

    Attributes:
        tokens: written so far, the one that ended the text not among them.
        pace: what it took so far.
    """

    decoder: Decoder
    prompt: Sequence[int]
    limit: int
    sampling: Sampling
    ends: frozenset[int]
    longest: int | None
    encoder: Any = None
    tokens: list[int] = field(default_factory=list)
    pace: Pace = field(default_factory=Pace)

    def __iter__(self) -> Iterator[str]:
        """Pieces of text; with an artifact that has no tokenizer, tokens as decimal numbers."""
        if self.encoder is None:
            for token in self.ids():
                yield f"{token} "
            return
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        for token in self.ids():
            piece = stream.step(self.encoder, token)
            if piece:
                yield piece

    def ids(self) -> Iterator[int]:
        """Tokens, one after the other; from the start whenever it is called."""
        random, room = np.random.default_rng(self.sampling.seed), self.longest
        self.tokens, self.pace = [], Pace()
        pace = self.pace
        self.decoder.reset()
        start = time.perf_counter()
        logits = self.decoder.read(np.array([self.prompt], np.int64))
        pace.read, pace.reading = len(self.prompt), time.perf_counter() - start
        pace.end = "as many tokens as asked for"
        while pace.written < self.limit:
            token = self.sampling.choose(logits[0], random)
            if token in self.ends:
                pace.end = "end of text"
                return
            self.tokens.append(token)
            pace.written += 1
            yield token
            if room is not None and self.decoder.length >= room:
                pace.end = "longest text of the model"
                return
            if pace.written < self.limit:
                start = time.perf_counter()
                logits = self.decoder.read(np.array([[token]], np.int64))
                pace.writing += time.perf_counter() - start


def generate(
    model: Any,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Generation:
    """Continue a text; see `Sampling`.

    Args:
        model: a `CompiledModel` with a cache of keys and values.
        prompt: a text, or its tokens.
        max_new_tokens: the most it may write; the text ends before where the model ends it or can read no more positions.

    Returns:
        What to iterate over; nothing is computed before.

    Raises:
        InputError: the model has no cache, the prompt is empty, too long or holds a token out of range, or a text was given
            to a model without tokenizer.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be positive, not {max_new_tokens}")
    decoder = Decoder(model)
    encoder = tokenizer(model)
    facts = model.manifest.get("source", {}).get("generation") or {}
    if isinstance(prompt, str):
        if encoder is None:
            raise InputError(f"{model.path} has no {TOKENIZER}; give the prompt as tokens")
        prompt = encoder.encode(prompt).ids
    tokens = [int(token) for token in prompt]
    if not tokens:
        raise InputError("the prompt is empty")
    longest = facts.get("positions")
    if longest is not None and len(tokens) > longest:
        raise InputError(f"the prompt has {len(tokens)} tokens, the model reads at most {longest}")
    vocabulary = next((spec.shape[-1] for spec in model.outputs if spec.name == "logits"), None)
    if isinstance(vocabulary, int) and not all(0 <= token < vocabulary for token in tokens):
        raise InputError(f"the prompt holds a token outside of 0..{vocabulary - 1}")
    ends = frozenset(facts.get("ends", ()))
    return Generation(decoder, tokens, max_new_tokens, sampling, ends, longest, encoder)


def tokenizer(model: Any) -> Any:
    """The tokenizer of an artifact, None if it has none.

    Raises:
        ArtifactError: it is unreadable.
    """
    if TOKENIZER not in model.manifest["files"]:
        return None
    from tokenizers import Tokenizer

    path = model.path / TOKENIZER
    try:
        encoder = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself
        raise ArtifactError(f"{path} is not a tokenizer.json file: {error}") from None
    encoder.no_padding()
    encoder.no_truncation()
    return encoder
