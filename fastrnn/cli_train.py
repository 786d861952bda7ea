"""``fastrnn train``: a language model learns a text, a sequence-to-sequence model a task."""

import argparse
import math
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from . import batching
from .checks import positive
from .cli_generate import write
from .models import LanguageModel, Vocabulary, read_config
from .optim import Adam
from .parameters import Array, read_file
from .seq2seq import Seq2Seq
from .tasks import TASKS, exact_matches
from .training import PairTrainer, Trainer, Training, check_settings, evaluate, read_settings

# What a run without options uses: about a minute on two cores.
TEXT_DEFAULTS: dict[str, Any] = {
    "cell": "lstm",
    "hidden": 256,
    "layers": 1,
    "embed": 64,
    "seq_len": 64,
    "batch": 32,
    "epochs": 8,
    "lr": 1e-2,
    "clip": 1.0,
    "dropout": 0.0,
    "seed": 0,
}
# And a run on a task: half of that.
TASK_DEFAULTS: dict[str, Any] = {
    "cell": "lstm",
    "hidden": 128,
    "layers": 1,
    "embed": 32,
    "attention": True,
    "bidirectional": True,
    "examples": 20_000,
    "batch": 64,
    "epochs": 3,
    "lr": 5e-3,
    "clip": 1.0,
    "dropout": 0.0,
    "seed": 0,
}
# The part of a text, and the pairs of a task, that are not learnt.
HELD_OUT = 0.05
HELD_OUT_PAIRS = 1000
BEAM = 8
# Held-out pairs that are shown in the end.
SHOWN = 5


def on_text(args: argparse.Namespace) -> int:
    if args.bidirectional:
        raise ValueError("--bidirectional: expected one direction, as a language model may not look ahead")
    _refuse(args, ("attention", "examples"), "only with --task")
    out, resume = _output(args)
    if args.diagnose is not None:
        _check_picture(args.diagnose)
    text = _read_text(args.file)
    settings = _settings(args, TEXT_DEFAULTS, LanguageModel, out if resume else None)

    held_out = max(2, round(len(text) * HELD_OUT))
    least = 2 * settings["batch"] + held_out
    if len(text) < least:
        raise ValueError(f"text: expected at least {least} characters for --batch {settings['batch']}, got {len(text)}")
    vocabulary = Vocabulary.of(text)
    tokens = vocabulary.encode(text)
    training, validation = tokens[:-held_out], tokens[-held_out:]
    model = LanguageModel(
        len(vocabulary),
        settings["embed"],
        settings["hidden"],
        settings["layers"],
        settings["dropout"],
        seed=settings["seed"],
        vocabulary=vocabulary,
        cell=settings["cell"],
    )
    optimizer = Adam(model.parameters, settings["lr"])
    names = ("batch", "seq_len", "epochs", "clip", "seed")
    trainer = Trainer(model, optimizer, training, schedule="cosine", **{name: settings[name] for name in names})
    if resume:
        trainer.resume(out)
    counts = f"{len(training):,} characters to learn, {len(validation):,} held out, {len(vocabulary)} different"
    if not _run(trainer, counts, args):
        return 130
    streams = max(1, min(32, len(validation) // 4096))
    print(f"validation: {evaluate(model, validation, streams):.4f} bits per character")
    if args.diagnose is not None:
        _diagnose(model, validation[: settings["seq_len"]], settings["seed"], args.diagnose)
    prompt = tokens[:1] if "\n" not in vocabulary.characters else vocabulary.encode("\n")
    sample = model.generate(prompt, 500, 0.8, np.random.default_rng(settings["seed"]))
    write(vocabulary.decode(sample))
    return 0


def on_task(args: argparse.Namespace) -> int:
    _refuse(args, ("file", "seq_len", "diagnose"), "nothing with --task")
    out, resume = _output(args)
    settings = _settings(args, TASK_DEFAULTS, Seq2Seq, out if resume else None)

    task = TASKS[args.task]
    training, held_out = task.pairs(positive(settings["examples"], "--examples"), HELD_OUT_PAIRS, settings["seed"])
    model = Seq2Seq(
        len(task.source_vocabulary),
        len(task.target_vocabulary),
        settings["embed"],
        settings["hidden"],
        settings["layers"],
        settings["dropout"],
        seed=settings["seed"],
        source_vocabulary=task.source_vocabulary,
        target_vocabulary=task.target_vocabulary,
        cell=settings["cell"],
        bidirectional=settings["bidirectional"],
        attention=settings["attention"],
    )
    optimizer = Adam(model.parameters, settings["lr"])
    sources = [task.source_vocabulary.encode(source) for source, _ in training]
    answers = [task.target_vocabulary.encode(answer) for _, answer in training]
    names = ("batch", "epochs", "clip", "seed")
    trainer = PairTrainer(
        model, optimizer, sources, answers, schedule="cosine", **{name: settings[name] for name in names}
    )
    trainer.settings |= {"task": task.name, "examples": settings["examples"]}
    if resume:
        trainer.resume(out)
    if not _run(trainer, f"{len(training):,} pairs to learn, {len(held_out):,} held out", args):
        return 130

    for name, size in (("greedy", 1), (f"beam of {BEAM}", BEAM)):
        print(f"held out, {name}: {exact_matches(model, held_out, size).mean():.2%} right")
    shown = held_out[:SHOWN]
    for (source, right), answer in zip(shown, model.translate([source for source, _ in shown], BEAM)):
        print(f"{source} -> {answer}{'' if answer == right else f', not {right}'}")
    return 0


def _refuse(args: argparse.Namespace, names: tuple[str, ...], expected: str) -> None:
    """Raise ValueError if one of these options, or the file, is given."""
    for name in names:
        if getattr(args, name) is not None:
            option = "FILE" if name == "file" else f"--{name.replace('_', '-')}"
            raise ValueError(f"{option}: expected {expected}, got {getattr(args, name)}")


def _output(args: argparse.Namespace) -> tuple[Path, bool]:
    """The model's file, and whether training continues from it."""
    out = Path(args.out)
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK) or out.is_dir():
        raise ValueError(f"--out: expected a file in a folder that can be written to, got {args.out!r}")
    resume = args.resume and out.exists()
    if args.resume and not resume:
        print(f"no checkpoint {args.out!r} yet: training begins", file=sys.stderr)
    return out, resume


def _check_picture(file: str) -> None:
    """Nothing is to fail after the training."""
    if find_spec("matplotlib") is None:
        raise ValueError("--diagnose: expected matplotlib to be installed: pip install 'fastrnn[plot]'")
    if Path(file).suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--diagnose: expected a file named *.png, *.pdf or *.svg, got {file!r}")
    if not Path(file).parent.is_dir() or Path(file).is_dir():
        raise ValueError(f"--diagnose: expected a file in a folder that exists, got {file!r}")


def _diagnose(model: LanguageModel, tokens: Array, seed: int, file: str) -> None:
    """Draw how far gradients reach in the model that training began with, and in the trained one."""
    from .diagnostics import gradient_flow, plot_gradient_flow

    models = {"initialised": LanguageModel(**model.config, seed=seed), "trained": model}
    print(f"measuring how far gradients reach, for {file}", file=sys.stderr)
    flows = {name: gradient_flow(m.rnn, m.embedding(tokens[:, None]), iterations=10) for name, m in models.items()}
    figure: Any = plot_gradient_flow(flows).figure
    figure.savefig(file, dpi=150)


def _run(trainer: Training, counts: str, args: argparse.Namespace) -> bool:
    """Train, and show how it goes. Returns whether it came to the end."""
    size = sum(array.size for array in trainer.model.parameters.values())
    threads = batching.get_num_threads()
    print(f"{counts}; {size:,} parameters, {trainer.total:,} updates, {threads} threads")
    items, unit = (
        (trainer.batch * trainer.seq_len, "chars") if isinstance(trainer, Trainer) else (trainer.batch, "pairs")
    )
    # A cold start compiles for some seconds: the speed counts from the first update's end.
    started: list[float] = []
    mean = 0.0
    with tqdm(total=trainer.total, initial=trainer.updates, unit=" updates", dynamic_ncols=True) as bar:

        def progress(loss: float) -> None:
            nonlocal mean
            mean = 0.98 * mean + 0.02 * loss if started else loss
            started.append(time.perf_counter())
            seconds = started[-1] - started[0]
            speed = (len(started) - 1) * items / seconds if seconds else 0
            bar.set_postfix_str(
                f"epoch {min(trainer.epoch + 1, trainer.epochs)}, loss {mean:.3f}, {mean / math.log(2):.3f} bits/char, "
                f"{speed:,.0f} {unit}/s",
                refresh=False,
            )
            bar.update()

        ended = trainer.run(args.out, args.every, progress)
    if not ended:
        task = "" if args.task is None else f"--task {args.task} "
        print(f"stopped; {task}--resume --out {args.out} continues", file=sys.stderr)
    return ended


def _settings(
    args: argparse.Namespace, defaults: dict[str, Any], kind: type, checkpoint: Path | None
) -> dict[str, Any]:
    """What the command line says, and for the rest the checkpoint, which is of this kind of model, or the defaults."""
    given = {name: getattr(args, name) for name in defaults if getattr(args, name) is not None}
    if checkpoint is None:
        return {**defaults, **given}
    metadata = read_file(checkpoint)[1]
    theirs, _ = read_settings(metadata, checkpoint)
    config = read_config(metadata, checkpoint)
    check_settings(config, {"class": kind.__name__}, checkpoint)
    names = {"hidden": "hidden_size", "layers": "num_layers", "embed": "embedding_dim"}
    names |= {name: name for name in ("cell", "dropout", "attention", "bidirectional")}
    kept = {name: config[names[name]] if name in names else theirs[name] for name in defaults}
    given |= {} if args.task is None else {"task": args.task}
    check_settings({**theirs, **kept}, given, checkpoint)
    return kept


def _read_text(file: str | None) -> str:
    if file is None:
        from pydoc_data.topics import topics

        return "\n".join(topics.values())
    content = Path(file).read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise ValueError(f"{file}: expected UTF-8 text, got byte 0x{byte:02x} at position {error.start}") from None
