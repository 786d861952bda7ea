"""``fastrnn generate``: texts of a language model, answers of a sequence-to-sequence model; drawn, or searched for."""

import argparse
import json
import sys
from typing import Any

import numpy as np

from .checks import as_seed, positive
from .models import LanguageModel
from .parameters import Array
from .seq2seq import Seq2Seq, load

LENGTH = 500
TEMPERATURE = 0.8


def sample(args: argparse.Namespace) -> int:
    """Draw one text, character by character."""
    for name in ("length_penalty", "stochastic", "number", "end", "json"):
        if getattr(args, name) not in (None, False):
            option = "-n" if name == "number" else f"--{name.replace('_', '-')}"
            raise ValueError(f"{option}: expected only with --beam")
    model, prompt, tokens = _model_and_prompt(args)
    rng = np.random.default_rng(as_seed(args.seed, "--seed"))
    temperature = TEMPERATURE if args.temperature is None else args.temperature
    if isinstance(model, Seq2Seq):
        drawn = model.sample(tokens[:, None], max_length=_longest(args, model), temperature=temperature, rng=rng)
        write(model.decode(drawn.tokens[0, 0]))
    else:
        assert model.vocabulary is not None
        write(prompt + model.vocabulary.decode(model.generate(tokens, _longest(args, model), temperature, rng)))
    return 0


def search(args: argparse.Namespace) -> int:
    """Search for the likeliest texts, or draw different ones, and write them with their scores."""
    if args.seed is not None and not args.stochastic:
        raise ValueError(f"--seed: expected only with --stochastic, or without --beam, got {args.seed}")
    if args.stochastic and args.length_penalty:
        raise ValueError("--length-penalty: expected only without --stochastic, which draws from the model as it is")
    K = positive(args.beam, "--beam")
    number = (K if args.stochastic else 1) if args.number is None else positive(args.number, "-n")
    if number > K:
        raise ValueError(f"-n: expected at most --beam, {K}, got {number}")
    model, prompt, tokens = _model_and_prompt(args)
    options: dict[str, Any] = {"beam_size": K, "max_length": _longest(args, model)}
    options["temperature"] = 1.0 if args.temperature is None else args.temperature
    if args.stochastic:
        options["rng"] = np.random.default_rng(as_seed(args.seed, "--seed"))
    else:
        options |= {"length_penalty": args.length_penalty or 0.0, "num_return": number}

    if isinstance(model, Seq2Seq):
        if args.end is not None:
            raise ValueError("--end: expected only for a language model: others have their own end")
        before: dict[str, Any] = {"sources": tokens[:, None]}
        decode, begin = model.decode, ""
    else:
        vocabulary = model.vocabulary
        assert vocabulary is not None
        eos = None if args.end is None else _end(vocabulary, args.end)
        if eos is None and args.length_penalty:
            raise ValueError("--length-penalty: expected only with --end, as without it all texts are as long")
        state = model(tokens[:-1, None])[1] if len(tokens) > 1 else None
        before = {"state": state, "bos": tokens[-1], "eos": eos}
        decode, begin = vocabulary.decode, prompt
    found: Any = (model.stochastic_beam_search if args.stochastic else model.beam_search)(**before, **options)

    name, scores = ("perturbed_log_prob", "perturbed") if args.stochastic else ("score", "scores")
    texts: list[dict[str, Any]] = [
        {
            "text": decode(found.tokens[0, i, : found.lengths[0, i]]),
            "log_prob": float(found.log_probs[0, i]),
            name: float(getattr(found, scores)[0, i]),
        }
        for i in range(number)
        if found.lengths[0, i]
    ]
    if args.json:
        write(json.dumps({"prompt": prompt, "texts": texts}))
    else:
        for text in texts:
            write(f"{text['log_prob' if args.stochastic else 'score']:9.4f}  {_one_line(begin + text['text'])}")
    return 0


def _model_and_prompt(args: argparse.Namespace) -> tuple[LanguageModel | Seq2Seq, str, Array]:
    """The model, and the prompt as text and as tokens."""
    model = load(args.model)
    vocabulary = model.source_vocabulary if isinstance(model, Seq2Seq) else model.vocabulary
    if vocabulary is None or (isinstance(model, Seq2Seq) and model.target_vocabulary is None):
        raise ValueError(f"{args.model}: expected a model with a vocabulary, got one of tokens only")
    if args.prompt is None and isinstance(model, Seq2Seq):
        raise ValueError("--prompt: expected the source, as the model is not of one language, got none")
    if args.prompt == "":
        raise ValueError("--prompt: expected at least one character, got ''")
    prompt = args.prompt or ("\n" if "\n" in vocabulary.characters else vocabulary.characters[0])
    return model, prompt, vocabulary.encode(prompt)


def _longest(args: argparse.Namespace, model: LanguageModel | Seq2Seq) -> Any:
    """The length that was asked for, or the default, which for a sequence-to-sequence model is its own."""
    if isinstance(model, Seq2Seq):
        return None if args.length is None else positive(args.length, "--length")
    return LENGTH if args.length is None else args.length


def _end(vocabulary: Any, text: str) -> int:
    if len(text) != 1:
        raise ValueError(f"--end: expected one character, got {text!r}")
    return int(vocabulary.encode(text)[0])


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def write(text: str) -> None:
    """Print a text even if the terminal's encoding lacks some of its characters."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)
