"""The command line: runs, errors, and that a run survives Ctrl-C and kill -9."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from fastrnn import batching, cli, models
from fastrnn.cli import main

SMALL = ["--hidden", "8", "--embed", "4", "--seq-len", "10", "--batch", "4", "--epochs", "2", "--lr", "0.02"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("".join(f"{i} is a number, and süß.\r\n" for i in range(60)).encode())
    return path


def run(argv, capsys):
    """Exit code, stdout, stderr; a SystemExit, with which argparse ends, is an exit code too."""
    capsys.readouterr()
    try:
        code = main([str(a) for a in argv])
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def start(argv, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "fastrnn", *map(str, argv)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        **options,
    )


def test_train_then_generate(text, tmp_path, capsys):
    out = tmp_path / "model"
    code, stdout, stderr = run(["train", text, *SMALL, "--out", out, "--threads", 1], capsys)
    assert code == 0, stderr
    assert batching.get_num_threads() == 1
    bits = re.search(r"validation: (\d+\.\d+) bits per character\n", stdout)
    assert 0.5 < float(bits[1]) < 6
    sample = stdout[bits.end() :]
    model = models.load(out)
    assert set(sample) <= set(model.vocabulary.characters)
    assert len(sample) == 501
    content = text.read_bytes().decode()
    assert model.vocabulary.characters == sorted(set(content))
    assert "bits/char" in stderr

    argv = ["generate", out, "--prompt", "1 is süß", "--length", 40, "--seed", 3]
    code, first, _ = run(argv, capsys)
    assert code == 0
    assert first.startswith("1 is süß")
    assert len(first) == 8 + 40 + 1
    assert run(argv, capsys)[1] == first
    assert run([*argv[:-1], 4], capsys)[1] != first
    code, greedy, _ = run([*argv, "--temperature", 0], capsys)
    tokens = model.generate(model.vocabulary.encode("1 is süß"), 40, temperature=0)
    assert greedy == "1 is süß" + model.vocabulary.decode(tokens) + "\n"


@pytest.mark.parametrize("cell", models.CELLS)
def test_cell_is_chosen_and_kept_by_the_checkpoint(cell, text, tmp_path, capsys):
    out = tmp_path / "model"
    assert run(["train", text, *SMALL, "--cell", cell, "--out", out], capsys)[0] == 0
    assert models.load(out).config["cell"] == cell
    for argv in (["train", text, "--resume", "--out", out], ["generate", out, "--length", 3]):
        code, stdout, stderr = run(argv, capsys)
        assert (code, bool(stdout)) == (0, True), stderr
    other = next(name for name in models.CELLS if name != cell)
    code, _, stderr = run(["train", text, "--resume", "--out", out, "--cell", other], capsys)
    assert code == 2
    assert f"it has '{cell}', not '{other}'" in stderr


def test_what_is_held_out_is_not_learnt(tmp_path, capsys):
    text = tmp_path / "text"
    learnt = "ab" * 950
    results = []
    for held_out in ("ab" * 50, "ba" * 25 + "ab" * 25):
        text.write_text(learnt + held_out)
        assert run(["train", text, *SMALL, "--out", tmp_path / "model"], capsys)[0] == 0
        results.append(models.load(tmp_path / "model").state_dict())
    for name, array in results[0].items():
        assert array.tobytes() == results[1][name].tobytes(), name


def test_without_a_file_it_learns_the_language_reference(tmp_path, capsys, monkeypatch):
    lengths = []
    monkeypatch.setattr(cli, "_run", lambda trainer, out, every: lengths.append(trainer.total) is not None)
    code, stdout, stderr = run(["train", "--out", tmp_path / "m", "--hidden", 4], capsys)
    assert code == 130
    assert int(re.match(r"([\d,]+) characters to learn", stdout)[1].replace(",", "")) > 300_000
    assert f"--resume --out {tmp_path}/m continues" in stderr


def whole_run(text, out, capsys, options=()):
    code, stdout, _ = run(["train", text, *SMALL, *options, "--out", out], capsys)
    assert code == 0
    return stdout[stdout.index("validation") :], models.load(out).state_dict()


def assert_same_run(result, out, unbroken):
    assert result[result.index("validation") :] == unbroken[0]
    for name, array in models.load(out).state_dict().items():
        assert array.tobytes() == unbroken[1][name].tobytes(), name


LONG = ["--epochs", 60, "--dropout", 0.1, "--every", 0]


def test_survives_kill(text, tmp_path, capsys):
    """Killed at some moments, with a checkpoint written after every update, and continued to the same end."""
    unbroken = whole_run(text, tmp_path / "unbroken", capsys, LONG)
    out = tmp_path / "broken"
    argv = ["train", text, *SMALL, *LONG, "--out", out]
    killed = 0
    for seconds in (0.0, 0.15, 0.4):
        process = start([*argv, "--resume"] if killed else argv)
        before = out.stat().st_mtime_ns if out.exists() else 0
        while process.poll() is None and not (out.exists() and out.stat().st_mtime_ns > before):
            time.sleep(0.01)
        time.sleep(seconds)
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        models.load(out)
    assert killed >= 2
    # The rest's settings come from the checkpoint.
    code, stdout, _ = run(["train", text, "--resume", "--out", out], capsys)
    assert code == 0
    assert_same_run(stdout, out, unbroken)
    # And a run that has ended only shows its end again.
    assert_same_run(run(["train", text, "--resume", "--out", out], capsys)[1], out, unbroken)


def test_survives_ctrl_c(text, tmp_path, capsys):
    options = [*LONG[:-1], 1000]
    unbroken = whole_run(text, tmp_path / "unbroken", capsys, options)
    out = tmp_path / "broken"
    process = start(["train", text, *SMALL, *options, "--out", out])
    # The first checkpoint, at the first epoch's end, says that it is under way.
    while process.poll() is None and not out.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "stopping after this update" in stderr
    code, stdout, _ = run(["train", text, "--resume", "--out", out], capsys)
    assert code == 0
    assert_same_run(stdout, out, unbroken)


def test_resume_without_a_checkpoint_begins(text, tmp_path, capsys):
    code, _, stderr = run(["train", text, *SMALL, "--resume", "--out", tmp_path / "model"], capsys)
    assert code == 0
    assert "training begins" in stderr


def test_info(capsys):
    code, stdout, _ = run(["info"], capsys)
    assert code == 0
    for line in (r"fastrnn \d", r"Python 3\.", r"numpy \d", r"numba \d", r"llvmlite \d", r"CPU: .+ \(.*\w.*\)"):
        assert re.search(f"^{line}", stdout, re.M), line
    assert re.search(r"^vectors: (16|32|64) bytes", stdout, re.M)
    for dtype in ("float32", "float64"):
        assert re.search(rf"^tile of {dtype}: \d rows x \d vectors of \d+$", stdout, re.M)
    assert f"threads: {batching.get_num_threads()}\n" in stdout


def test_info_knows_the_cpu_that_numba_was_told(tmp_path):
    process = start(["info"], env={**os.environ, "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"})
    stdout, _ = process.communicate(timeout=60)
    assert "CPU: haswell (avx2, fma)\n" in stdout


@pytest.fixture
def model(text, tmp_path, capsys):
    out = tmp_path / "model"
    assert run(["train", text, *SMALL, "--epochs", 1, "--out", out], capsys)[0] == 0
    return out


ERRORS = {
    "no command": ([], "required: COMMAND"),
    "unknown command": (["fly"], "invalid choice: 'fly'"),
    "unknown option": (["train", "--fly"], "unrecognized arguments: --fly"),
    "no number": (["train", "--hidden", "many"], "argument --hidden: invalid int value: 'many'"),
    "cell": (["train", "{text}", "--cell", "lstn"], "argument --cell: invalid choice: 'lstn'"),
    "picture nowhere": (
        ["train", "{text}", "--diagnose", "{text}/none/a.png"],
        "--diagnose: expected a file in a folder",
    ),
    "picture of no kind": (["train", "{text}", "--diagnose", "a.txt"], r"--diagnose: expected a file named \*.png"),
    "bidirectional": (["train", "{text}", "--bidirectional"], "--bidirectional: .* language model may not look ahead"),
    "hidden": (["train", "{text}", "--hidden", 0], "hidden_size: expected at least 1, got 0"),
    "dropout": (["train", "{text}", "--dropout", 1], "dropout: expected a probability less than 1"),
    "lr": (["train", "{text}", "--lr", "nan"], "lr: expected a number from 0"),
    "batch": (["train", "{text}", "--batch", 0], "batch: expected at least 1, got 0"),
    "epochs": (["train", "{text}", "--epochs", -1], "epochs: expected at least 1, got -1"),
    "seed": (["train", "{text}", "--seed", -1], "seed: expected at least 0, got -1"),
    "threads": (["train", "{text}", "--threads", 0], "--threads: expected at least 1, got 0"),
    "no file": (["train", "{tmp}/none"], "No such file"),
    "folder": (["train", "{tmp}"], "Is a directory"),
    "not UTF-8": (["train", "{latin}"], "latin: expected UTF-8 text, got byte 0xfc at position 1"),
    "short": (["train", "{short}"], "text: expected at least 66 characters for --batch 32, got 9"),
    "empty": (["train", "{empty}"], "text: expected at least 66 characters for --batch 32, got 0"),
    "no folder for it": (["train", "{text}", "--out", "{tmp}/none/x"], "--out: expected a file in a folder"),
    "settings": (["train", "{text}", "--resume", "--out", "{model}", "--hidden", 9], "hidden: .* other settings"),
    "another text": (["train", "{other}", "--resume", "--out", "{model}"], "is of other settings"),
    "no checkpoint": (["train", "{text}", "--resume", "--out", "{text}"], "expected a whole safetensors file"),
    "no model": (["generate", "{tmp}/none"], "path: expected a safetensors file, found none"),
    "text for a model": (["generate", "{text}"], "path: expected a whole safetensors file"),
    "unknown character": (["generate", "{model}", "--prompt", "1€"], "vocabulary, got '€' at position 1"),
    "no prompt": (["generate", "{model}", "--prompt", ""], "--prompt: expected at least one character"),
    "length": (["generate", "{model}", "--length", -1], "length: expected at least 0, got -1"),
    "temperature": (["generate", "{model}", "--temperature", -1], "temperature: expected a number from 0"),
    "generate's seed": (["generate", "{model}", "--seed", -1], "seed: expected at least 0, got -1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(name, text, tmp_path, capsys, request):
    argv, message = ERRORS[name]
    (tmp_path / "latin").write_bytes(b"s\xfc\xdf")
    (tmp_path / "short").write_text("too short")
    (tmp_path / "empty").write_text("")
    (tmp_path / "other").write_bytes(text.read_bytes()[::-1].replace(b"\xbc\xc3", b"").replace(b"\x9f\xc3", b""))
    names = {n: tmp_path / n for n in ("latin", "short", "empty", "other")} | {"text": text, "tmp": tmp_path}
    if "{model}" in argv:
        names["model"] = request.getfixturevalue("model")
    argv = [str(a).format(**names) for a in argv]
    if argv[:1] == ["train"] and "--out" not in argv:
        argv += ["--out", str(tmp_path / "out")]
    code, stdout, stderr = run(argv, capsys)
    assert code == 2, stderr
    assert re.fullmatch(r"fastrnn.*error: .*\n", stderr)
    assert re.search(message, stderr)
    assert stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_diagnose_draws_a_picture(cell, text, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "model", tmp_path / "flow.png"
    options = [*SMALL, "--epochs", 1, "--layers", 2, "--cell", cell]
    code, _, stderr = run(["train", text, *options, "--out", out, "--diagnose", picture], capsys)
    assert code == 0, stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
