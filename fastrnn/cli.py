"""The command line: ``fastrnn train``, ``fastrnn generate`` and ``fastrnn info``."""

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from . import __version__, batching, cli_generate, cli_train
from .checks import number
from .cli_train import TASK_DEFAULTS, TEXT_DEFAULTS
from .models import CELLS
from .tasks import TASKS


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
    except (OSError, ValueError, FloatingPointError, OverflowError, MemoryError, KeyError) as error:
        text = error.args[0] if isinstance(error, KeyError) else str(error) or type(error).__name__
        print(f"fastrnn: error: {text}".replace("\n", " "), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fastrnn", description="Recurrent networks on the CPU.")
    parser.add_argument("--version", action="version", version=f"fastrnn {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", help="learn a text, character by character, or a task"))
    _add_generate(commands.add_parser("generate", help="write a text, or a task's answer, with a model"))
    info = commands.add_parser("info", help="what fastrnn runs on")
    info.set_defaults(run=_info)
    return parser


def _add_train(train: argparse.ArgumentParser) -> None:
    train.set_defaults(run=_train)
    train.add_argument("file", nargs="?", metavar="FILE", help="a UTF-8 text; default: Python's language reference")
    tasks = "; ".join(f"{name}: {task.help}" for name, task in TASKS.items())
    train.add_argument("--task", choices=TASKS, help=f"learn this instead, from sequence to sequence ({tasks})")
    train.add_argument("--cell", choices=CELLS, help="of the recurrent layers (default: lstm)")
    options = [
        ("hidden", int, "units of each recurrent layer"),
        ("layers", int, "recurrent layers"),
        ("embed", int, "numbers that stand for a character"),
        ("seq-len", int, "characters through which gradients go back"),
        ("examples", int, "pairs to learn"),
        ("batch", int, "places of the text, or pairs, that are read side by side"),
        ("epochs", int, "times that the text, or the examples, are read"),
        ("lr", float, "learning rate of the first update; it falls to 0 along a cosine"),
        ("clip", float, "largest norm of an update's gradients"),
        ("dropout", float, "probability of dropping an output of the embedding or of a layer"),
        ("seed", int, "of parameters, dropout, sample, and the task's examples"),
    ]
    for name, kind, text in options:
        train.add_argument(f"--{name}", type=kind, help=f"{text} ({_default(name.replace('-', '_'))})")
    either = argparse.BooleanOptionalAction
    text = "whether the decoder looks back at all that was read"
    train.add_argument("--attention", action=either, help=f"{text} ({_default('attention')})")
    text = "whether sources are read both ways; refused without --task: a language model may not look ahead"
    train.add_argument("--bidirectional", action=either, help=f"{text} ({_default('bidirectional')})")
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


def _default(name: str) -> str:
    """What the help says of a default, and whether an option is for one of a text and a task only."""
    if name not in TASK_DEFAULTS:
        return f"default: {TEXT_DEFAULTS[name]}; not with --task"
    if name not in TEXT_DEFAULTS:
        return f"with --task; default: {TASK_DEFAULTS[name]}"
    if TEXT_DEFAULTS[name] == TASK_DEFAULTS[name]:
        return f"default: {TEXT_DEFAULTS[name]}"
    return f"default: {TEXT_DEFAULTS[name]}, with --task {TASK_DEFAULTS[name]}"


def _add_generate(generate: argparse.ArgumentParser) -> None:
    generate.set_defaults(run=_generate)
    generate.add_argument("model", metavar="MODEL", help="a file that `fastrnn train` wrote")
    generate.add_argument(
        "--prompt",
        help="how the text begins (default: a new line, or the first character that the model knows); of a model of a "
        "task: the source, such as 1234",
    )
    generate.add_argument("--length", type=int, help="characters (default: 500); of a model of a task: at most so many")
    generate.add_argument(
        "--temperature", type=float, help="0: always the likeliest character (default: 0.8; with --beam 1)"
    )
    generate.add_argument("--beam", type=int, metavar="K", help="search for the likeliest texts with K hypotheses")
    generate.add_argument("--length-penalty", type=float, metavar="A", help="with --beam: more than 0 for longer texts")
    generate.add_argument(
        "--stochastic", action="store_true", help="with --beam: draw K different texts, by stochastic beam search"
    )
    generate.add_argument("-n", "--number", type=int, metavar="N", help="with --beam: texts to write (default: 1)")
    generate.add_argument("--end", metavar="C", help="with --beam: the character that ends a text (default: none)")
    generate.add_argument("--json", action="store_true", help="with --beam: write the texts and their scores as JSON")
    generate.add_argument("--seed", type=int, help="default: another text each time")
    generate.add_argument("--threads", type=int, help="default: as many as there are CPUs")


def _train(args: argparse.Namespace) -> int:
    _set_threads(args.threads)
    number(args.every, "--every", 0)
    return cli_train.on_text(args) if args.task is None else cli_train.on_task(args)


def _generate(args: argparse.Namespace) -> int:
    _set_threads(args.threads)
    return cli_generate.sample(args) if args.beam is None else cli_generate.search(args)


def _info(args: argparse.Namespace) -> int:
    from numba.core.registry import cpu_target

    from .kernels import tile, vector

    codegen = cpu_target.target_context.codegen()
    cpu = os.environ.get("NUMBA_CPU_NAME") or codegen._get_host_cpu_name()
    features = os.environ.get("NUMBA_CPU_FEATURES", codegen._get_host_cpu_features())
    print(f"fastrnn {__version__}")
    print(f"Python {platform.python_version()} on {platform.platform()}")
    for package in ("numpy", "numba", "llvmlite"):
        print(f"{package} {version(package)}")
    print(f"CPU: {cpu} ({', '.join(f[1:] for f in features.split(',') if f.startswith('+'))})")
    print(f"vectors: {vector.VECTOR_BYTES} bytes, {vector.REGISTERS} registers, fused multiply-add: {vector.FUSED}")
    for dtype, lanes in vector.LANES_OF.items():
        print(f"tile of {dtype}: {tile.ROWS} rows x {tile.VECS} vectors of {lanes}")
    print(f"threads: {batching.get_num_threads()}")
    return 0


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {threads}")
        batching.set_num_threads(threads)
