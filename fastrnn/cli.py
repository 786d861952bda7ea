"""The command line: ``fastrnn train``, ``fastrnn generate`` and ``fastrnn info``."""

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from . import __version__, batching
from .checks import as_seed
from .models import CELLS, LanguageModel, Vocabulary, load
from .optim import Adam
from .parameters import Array, read_file
from .training import Trainer, check_settings, evaluate, read_settings

# What a run without options uses: about a minute on two cores.
DEFAULTS: dict[str, Any] = {
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
HELD_OUT = 0.05


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``, or the process's, and return the exit code.

    0 after success, 2 after an error, which is one line on stderr, 130 after Ctrl-C.

    >>> from fastrnn.cli import main
    >>> main(["info"])
    fastrnn ...
    0
    """
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError, FloatingPointError, KeyError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error
        print(f"fastrnn: error: {text}".replace("\n", " "), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fastrnn", description="Recurrent networks on the CPU.")
    parser.add_argument("--version", action="version", version=f"fastrnn {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="learn a text, character by character")
    train.set_defaults(run=_train)
    train.add_argument("file", nargs="?", metavar="FILE", help="a UTF-8 text; default: Python's language reference")
    train.add_argument("--cell", choices=CELLS, help=f"of the recurrent layers (default: {DEFAULTS['cell']})")
    options = [
        ("hidden", int, "units of each recurrent layer"),
        ("layers", int, "recurrent layers"),
        ("embed", int, "numbers that stand for a character"),
        ("seq-len", int, "characters through which gradients go back"),
        ("batch", int, "places of the text that are read side by side"),
        ("epochs", int, "times that the text is read"),
        ("lr", float, "learning rate of the first update; it falls to 0 along a cosine"),
        ("clip", float, "largest norm of an update's gradients"),
        ("dropout", float, "probability of dropping an output of the embedding or of a layer"),
        ("seed", int, "of parameters, dropout and sample"),
    ]
    for name, kind, text in options:
        default = DEFAULTS[name.replace("-", "_")]
        train.add_argument(f"--{name}", type=kind, help=f"{text} (default: {default})")
    train.add_argument("--bidirectional", action="store_true", help="refused: a language model may not look ahead")
    train.add_argument("--threads", type=int, help="default: as many as there are CPUs")
    train.add_argument("--diagnose", metavar="FILE.png", help="draw how far gradients reach, before and after training")
    train.add_argument(
        "--out", default="model.safetensors", help="the model's file and checkpoint (default: %(default)s)"
    )
    train.add_argument("--every", type=float, default=30.0, help="seconds between checkpoints (default: %(default)s)")
    train.add_argument(
        "--resume",
        action="store_true",
        help="continue from the checkpoint, with its settings; begin if there is none",
    )

    generate = commands.add_parser("generate", help="write a text with a model")
    generate.set_defaults(run=_generate)
    generate.add_argument("model", metavar="MODEL", help="a file that `fastrnn train` wrote")
    generate.add_argument("--prompt", default="\n", help="how the text begins (default: a new line)")
    generate.add_argument("--length", type=int, default=500, help="characters (default: %(default)s)")
    generate.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest character (default: %(default)s)"
    )
    generate.add_argument("--seed", type=int, help="default: another text each time")
    generate.add_argument("--threads", type=int, help="default: as many as there are CPUs")

    info = commands.add_parser("info", help="what fastrnn runs on")
    info.set_defaults(run=_info)
    return parser


def _train(args: argparse.Namespace) -> int:
    if args.bidirectional:
        raise ValueError("--bidirectional: expected one direction, as a language model may not look ahead")
    _set_threads(args.threads)
    out = Path(args.out)
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK) or out.is_dir():
        raise ValueError(f"--out: expected a file in a folder that can be written to, got {args.out!r}")
    if args.diagnose is not None:
        _check_picture(args.diagnose)
    text = _read_text(args.file)
    resume = args.resume and out.exists()
    if args.resume and not resume:
        print(f"no checkpoint {args.out!r} yet: training begins", file=sys.stderr)
    settings = _settings(args, out if resume else None)

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
    size = sum(array.size for array in model.parameters.values())
    print(
        f"{len(training):,} characters to learn, {len(validation):,} held out, {len(vocabulary)} different; "
        f"{size:,} parameters, {trainer.total:,} updates, {batching.get_num_threads()} threads"
    )

    if not _run(trainer, out, args.every):
        print(f"stopped; --resume --out {args.out} continues", file=sys.stderr)
        return 130
    streams = max(1, min(32, len(validation) // 4096))
    print(f"validation: {evaluate(model, validation, streams):.4f} bits per character")
    if args.diagnose is not None:
        _diagnose(model, validation[: settings["seq_len"]], settings["seed"], args.diagnose)
    prompt = tokens[:1] if "\n" not in vocabulary.characters else vocabulary.encode("\n")
    sample = model.generate(prompt, 500, 0.8, np.random.default_rng(settings["seed"]))
    _write(vocabulary.decode(sample))
    return 0


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
    flows = {name: gradient_flow(m.rnn, m.embedding(tokens[:, None]), iterations=10) for name, m in models.items()}
    figure: Any = plot_gradient_flow(flows).figure
    figure.savefig(file, dpi=150)


def _run(trainer: Trainer, out: Path, every: float) -> bool:
    """Train, and show how it goes."""
    characters = trainer.batch * trainer.seq_len
    # A cold start compiles for some seconds: the speed counts from the first update's end.
    started: list[float] = []
    mean = 0.0
    with tqdm(total=trainer.total, initial=trainer.updates, unit=" updates", dynamic_ncols=True) as bar:

        def progress(loss: float) -> None:
            nonlocal mean
            mean = 0.98 * mean + 0.02 * loss if started else loss
            started.append(time.perf_counter())
            seconds = started[-1] - started[0]
            speed = (len(started) - 1) * characters / seconds if seconds else 0
            bar.set_postfix_str(
                f"epoch {min(trainer.epoch + 1, trainer.epochs)}, loss {mean:.3f}, {mean / math.log(2):.3f} bits/char, "
                f"{speed:,.0f} chars/s",
                refresh=False,
            )
            bar.update()

        return trainer.run(out, every, progress)


def _settings(args: argparse.Namespace, checkpoint: Path | None) -> dict[str, Any]:
    """What the command line says, and for the rest the checkpoint or the defaults."""
    given = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
    if checkpoint is None:
        return {**DEFAULTS, **given}
    metadata = read_file(checkpoint)[1]
    theirs, _ = read_settings(metadata, checkpoint)
    model = load(checkpoint).config
    names = {"hidden": "hidden_size", "layers": "num_layers", "embed": "embedding_dim"}
    names |= {name: name for name in ("cell", "dropout")}
    kept = {name: model[names[name]] if name in names else theirs[name] for name in DEFAULTS}
    check_settings(kept, given, checkpoint)
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


def _generate(args: argparse.Namespace) -> int:
    _set_threads(args.threads)
    model = load(args.model)
    if model.vocabulary is None:
        raise ValueError(f"{args.model}: expected a model with a vocabulary, got one of tokens only")
    if not args.prompt:
        raise ValueError("--prompt: expected at least one character, got ''")
    seed = as_seed(args.seed, "--seed")
    prompt = model.vocabulary.encode(args.prompt)
    drawn = model.generate(prompt, args.length, args.temperature, np.random.default_rng(seed))
    _write(args.prompt + model.vocabulary.decode(drawn))
    return 0


def _info(args: argparse.Namespace) -> int:
    from numba.core.registry import cpu_target

    from .kernels import tile

    codegen = cpu_target.target_context.codegen()
    cpu = os.environ.get("NUMBA_CPU_NAME") or codegen._get_host_cpu_name()
    features = os.environ.get("NUMBA_CPU_FEATURES", codegen._get_host_cpu_features())
    print(f"fastrnn {__version__}")
    print(f"Python {platform.python_version()} on {platform.platform()}")
    for package in ("numpy", "numba", "llvmlite"):
        print(f"{package} {version(package)}")
    print(f"CPU: {cpu} ({', '.join(f[1:] for f in features.split(',') if f.startswith('+'))})")
    print(f"vectors: {tile.VECTOR_BYTES} bytes, {tile.REGISTERS} registers, fused multiply-add: {tile.FUSED}")
    for dtype, lanes in tile.LANES_OF.items():
        print(f"tile of {dtype}: {tile.ROWS} rows x {tile.VECS} vectors of {lanes}")
    print(f"threads: {batching.get_num_threads()}")
    return 0


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {threads}")
        batching.set_num_threads(threads)


def _write(text: str) -> None:
    """Print a text even if the terminal's encoding lacks some of its characters."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)
