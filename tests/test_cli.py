"""The command line: runs, errors, and that a run survives Ctrl-C and kill -9."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

from fastrnn import batching, models, seq2seq
from fastrnn.cli import main
from fastrnn.models import LanguageModel
from fastrnn.tasks import TASKS
from fastrnn.training import Trainer

SMALL_TASK = ["--hidden", "8", "--embed", "4", "--examples", "100", "--batch", "10", "--epochs", "2", "--lr", "0.02"]
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


@pytest.mark.parametrize("task", TASKS)
def test_train_on_a_task(task, tmp_path, capsys):
    out = tmp_path / "model"
    options = ["--cell", "gru", "--no-attention"] if task == "sort" else ["--no-bidirectional"]
    argv = ["train", "--task", task, *SMALL_TASK, *options, "--out", out, "--seed", 5, "--threads", 1]
    code, stdout, stderr = run(argv, capsys)
    assert code == 0, stderr
    assert re.match(r"100 pairs to learn, 1,000 held out; [\d,]+ parameters, 20 updates, 1 threads\n", stdout)
    assert "pairs/s" in stderr
    model = seq2seq.load(out)
    expected = {"cell": "lstm", "attention": True, "bidirectional": task == "sort", "hidden_size": 8}
    expected |= {"cell": "gru", "attention": False} if task == "sort" else {}
    assert {name: model.config[name] for name in expected} == expected

    _, held_out = TASKS[task].pairs(100, 1000, 5)
    for name, beam in (("greedy", 1), ("beam of 8", 8)):
        answers = model.translate([source for source, _ in held_out], beam)
        right = np.mean([answer == expected for answer, (_, expected) in zip(answers, held_out)])
        assert f"held out, {name}: {right:.2%} right\n" in stdout
    lines = stdout.splitlines()[3:]
    assert lines == [
        f"{source} -> {answer}{'' if answer == right else f', not {right}'}"
        for (source, right), answer in zip(held_out[:5], answers)
    ]
    assert run(argv, capsys)[1] == stdout


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
    monkeypatch.setattr(Trainer, "run", lambda trainer, path, every, progress: False)
    code, stdout, stderr = run(["train", "--out", tmp_path / "m", "--hidden", 4], capsys)
    assert code == 130
    assert int(re.match(r"([\d,]+) characters to learn", stdout)[1].replace(",", "")) > 300_000
    assert f"--resume --out {tmp_path}/m continues" in stderr


def whole_run(text, out, capsys, options=()):
    code, stdout, _ = run(["train", text, *SMALL, *options, "--out", out], capsys)
    assert code == 0
    return stdout[stdout.index("validation") :], models.load(out).state_dict()


def assert_same_run(result, out, unbroken, begins="validation"):
    assert result[result.index(begins) :] == unbroken[0]
    for name, array in seq2seq.load(out).state_dict().items():
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


def test_a_task_survives_ctrl_c(tmp_path, capsys):
    options = ["--task", "sort", *SMALL_TASK, "--epochs", 60, "--dropout", 0.1, "--every", 1000]
    out = tmp_path / "unbroken"
    code, stdout, _ = run(["train", *options, "--out", out], capsys)
    assert code == 0
    unbroken = stdout[stdout.index("held out, greedy") :], seq2seq.load(out).state_dict()
    out = tmp_path / "broken"
    process = start(["train", *options, "--out", out])
    while process.poll() is None and not out.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert f"stopped; --task sort --resume --out {out} continues" in stderr
    # The rest's settings come from the checkpoint.
    code, stdout, _ = run(["train", "--task", "sort", "--resume", "--out", out], capsys)
    assert code == 0
    assert_same_run(stdout, out, unbroken, "held out, greedy")


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


@pytest.fixture
def solver(tmp_path, capsys):
    out = tmp_path / "solver"
    assert run(["train", "--task", "reverse", *SMALL_TASK, "--out", out], capsys)[0] == 0
    return out


@pytest.mark.parametrize("options", [[], ["--beam", 2], ["--beam", 2, "--json"]], ids=str)
def test_without_a_prompt(options, model, tmp_path, capsys):
    """A new line, and of a model that knows none its first character."""
    for first, lm in {"\n": models.load(model), "é": LanguageModel(3, 4, 5, seed=0, vocabulary="éab")}.items():
        lm.save(tmp_path / "lm")
        code, stdout, _ = run(["generate", tmp_path / "lm", "--length", 5, *options], capsys)
        assert code == 0
        if "--json" in options:
            assert json.loads(stdout)["prompt"] == first
            assert stdout.isascii()
        elif not options:
            assert stdout.startswith(first)


def test_a_wrong_number_of_threads_in_the_environment(capsys, monkeypatch):
    monkeypatch.setattr(batching, "_num_threads", None)
    monkeypatch.setenv("FASTRNN_NUM_THREADS", "two")
    code, _, stderr = run(["info"], capsys)
    assert code == 2
    assert stderr == "fastrnn: error: FASTRNN_NUM_THREADS: expected a whole number of at least 1, got 'two'\n"


def test_search_of_a_language_model(model, capsys):
    argv = ["generate", model, "--prompt", "1 is", "--length", 12, "--beam", 5]
    trained = models.load(model)
    vocabulary = trained.vocabulary
    prompt = vocabulary.encode("1 is")
    _, state = trained(prompt[:-1, None])
    options = {"bos": prompt[-1], "beam_size": 5, "max_length": 12}
    best = trained.beam_search(state, eos=None, num_return=3, **options)
    texts = [vocabulary.decode(tokens) for tokens in best.tokens[0]]

    code, stdout, stderr = run([*argv, "-n", 3], capsys)
    assert code == 0, stderr
    shown = [text.replace("\n", "\\n").replace("\r", "\\r") for text in texts]
    assert stdout.split("\n") == [*[f"{score:9.4f}  1 is{text}" for score, text in zip(best.scores[0], shown)], ""]
    assert run(argv, capsys)[1] == stdout.splitlines()[0] + "\n"
    code, stdout, _ = run([*argv, "-n", 3, "--json"], capsys)
    result = json.loads(stdout)
    assert result["prompt"] == "1 is"
    assert [text["text"] for text in result["texts"]] == texts
    assert [text["score"] for text in result["texts"]] == best.scores[0].tolist()
    assert [text["log_prob"] for text in result["texts"]] == best.log_probs[0].tolist()

    # Of one character, ending at another, with another model's temperature.
    options = {"bos": prompt[0], "eos": vocabulary.encode(" ")[0], "beam_size": 5, "max_length": 12}
    best = trained.beam_search(None, num_return=5, length_penalty=0.5, temperature=2.0, **options)
    argv = ["generate", model, "--prompt", "1", "--length", 12, "--beam", 5, "-n", 5, "--json"]
    code, stdout, stderr = run([*argv, "--end", " ", "--length-penalty", 0.5, "--temperature", 2], capsys)
    assert code == 0, stderr
    for i, text in enumerate(json.loads(stdout)["texts"]):
        assert text["text"] == vocabulary.decode(best.tokens[0, i, : best.lengths[0, i]])
        assert text["score"] == best.scores[0, i]

    argv = [*argv[:-3], "--stochastic", "--seed", 3]
    code, stdout, stderr = run([*argv, "--json"], capsys)
    assert code == 0, stderr
    drawn = trained.stochastic_beam_search(
        None, bos=prompt[0], eos=None, beam_size=5, max_length=12, rng=np.random.default_rng(3)
    )
    texts = json.loads(stdout)["texts"]
    assert [text["text"] for text in texts] == [vocabulary.decode(tokens) for tokens in drawn.tokens[0]]
    assert [text["perturbed_log_prob"] for text in texts] == drawn.perturbed[0].tolist()
    _, stdout, _ = run([*argv, "-n", 2], capsys)
    assert [float(line[:9]) for line in stdout.splitlines()] == drawn.log_probs[0, :2].round(4).tolist()


def test_search_of_a_task(solver, capsys):
    argv = ["generate", solver, "--prompt", "123"]
    trained = seq2seq.load(solver)
    source = trained.source_vocabulary.encode("123")[:, None]
    best = trained.beam_search(source, beam_size=6, num_return=6, length_penalty=0.6)
    texts = [trained.decode(tokens) for tokens in best.tokens[0]]
    code, stdout, stderr = run([*argv, "--beam", 6, "-n", 6, "--length-penalty", 0.6], capsys)
    assert code == 0, stderr
    assert stdout.splitlines() == [f"{score:9.4f}  {text}" for score, text in zip(best.scores[0], texts)]
    _, stdout, _ = run([*argv, "--beam", 6, "--json"], capsys)
    best = trained.beam_search(source, beam_size=6)
    text = {"text": trained.decode(best.tokens[0, 0]), "log_prob": best.log_probs[0, 0], "score": best.scores[0, 0]}
    assert json.loads(stdout) == {"prompt": "123", "texts": [text]}
    drawn = trained.stochastic_beam_search(source, beam_size=6, rng=np.random.default_rng(3))
    code, stdout, _ = run([*argv, "--beam", 6, "--stochastic", "--seed", 3], capsys)
    assert [line[11:] for line in stdout.splitlines()] == [trained.decode(tokens) for tokens in drawn.tokens[0]]

    code, stdout, _ = run([*argv, "--seed", 3], capsys)
    sample = trained.sample(source, temperature=0.8, rng=np.random.default_rng(3))
    assert stdout == trained.decode(sample.tokens[0, 0]) + "\n"
    code, stdout, _ = run([*argv, "--temperature", 0], capsys)
    assert stdout == trained.decode(trained.greedy(source).tokens[0, 0]) + "\n"
    assert len(run([*argv, "--beam", 3, "--length", 2], capsys)[1].split()[1:]) <= 1
    texts = json.loads(run([*argv, "--beam", 3, "-n", 3, "--length", 2, "--json"], capsys)[1])["texts"]
    assert all(len(text["text"]) <= 2 for text in texts)


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
    "more than fits in memory": (["generate", "{model}", "--length", 3, "--beam", 10**12], "allocate"),
    "larger than any array": (["train", "{text}", "--hidden", 10**23], "hidden|large|dimension"),
    "no prompt": (["generate", "{model}", "--prompt", ""], "--prompt: expected at least one character"),
    "length": (["generate", "{model}", "--length", -1], "length: expected at least 0, got -1"),
    "temperature": (["generate", "{model}", "--temperature", -1], "temperature: expected a number from 0"),
    "nothing to search for": (["generate", "{model}", "--beam", 0], "--beam: expected at least 1, got 0"),
    "no text": (["generate", "{model}", "--beam", 2, "-n", 0], "-n: expected at least 1, got 0"),
    "too many texts": (["generate", "{model}", "--beam", 2, "-n", 3], "-n: expected at most --beam, 2, got 3"),
    "no search": (["generate", "{model}", "-n", 3], "-n: expected only with --beam"),
    "penalty, no search": (["generate", "{model}", "--length-penalty", 1], "--length-penalty: .* only with --beam"),
    "stochastic, no search": (["generate", "{model}", "--stochastic"], "--stochastic: expected only with --beam"),
    "end, no search": (["generate", "{model}", "--end", "."], "--end: expected only with --beam"),
    "JSON, no search": (["generate", "{model}", "--json"], "--json: expected only with --beam"),
    "seed for a search": (["generate", "{model}", "--beam", 2, "--seed", 1], "--seed: .* --stochastic, .* got 1"),
    "penalty of no use": (["generate", "{model}", "--beam", 2, "--length-penalty", 1], "expected only with --end"),
    "penalty for samples": (
        ["generate", "{model}", "--beam", 2, "--stochastic", "--length-penalty", 1],
        "--length-penalty: expected only without --stochastic",
    ),
    "penalty": (["generate", "{solver}", "--prompt", "1", "--beam", 2, "--length-penalty", "nan"], "length_penalty: "),
    "search's temperature": (
        ["generate", "{model}", "--beam", 2, "--temperature", 0],
        "temperature: expected a number",
    ),
    "ends": (["generate", "{model}", "--beam", 2, "--end", "is"], "--end: expected one character, got 'is'"),
    "unknown end": (["generate", "{model}", "--beam", 2, "--end", "€"], "vocabulary, got '€' at position 0"),
    "another end": (["generate", "{solver}", "--prompt", "1", "--beam", 2, "--end", "1"], "--end: expected only for a"),
    "no source": (["generate", "{solver}"], "--prompt: expected the source, .* got none"),
    "unknown character of a source": (["generate", "{solver}", "--prompt", "1a"], "vocabulary, got 'a' at position 1"),
    "length of an answer": (["generate", "{solver}", "--prompt", "1", "--length", 0], "--length: expected at least 1"),
    "unknown task": (["train", "--task", "fly"], "argument --task: invalid choice: 'fly'"),
    "text and task": (["train", "{text}", "--task", "sort"], "FILE: expected nothing with --task, got .*text.txt"),
    "task's windows": (["train", "--task", "sort", "--seq-len", 3], "--seq-len: expected nothing with --task, got 3"),
    "task's picture": (["train", "--task", "sort", "--diagnose", "a.png"], "--diagnose: expected nothing with --task"),
    "text's examples": (["train", "{text}", "--examples", 3], "--examples: expected only with --task, got 3"),
    "text's attention": (["train", "{text}", "--no-attention"], "--attention: expected only with --task, got False"),
    "examples": (["train", "--task", "sort", "--examples", 0], "--examples: expected at least 1, got 0"),
    "odd size": (["train", "--task", "sort", "--hidden", 7], "hidden_size: expected an even number"),
    "task's folder": (["train", "--task", "sort", "--out", "{tmp}/none/x"], "--out: expected a file in a folder"),
    "task's settings": (
        ["train", "--task", "reverse", "--resume", "--out", "{solver}", "--hidden", 10],
        "hidden: the checkpoint .* it has 8, not 10",
    ),
    "another task": (
        ["train", "--task", "sort", "--resume", "--out", "{solver}"],
        "task: .* has 'reverse', not 'sort'",
    ),
    "a text's model": (["train", "--task", "sort", "--resume", "--out", "{model}"], "class: .* 'LanguageModel', not"),
    "a task's model": (["train", "{text}", "--resume", "--out", "{solver}"], "class: .* has 'Seq2Seq', not"),
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
    names |= {n: request.getfixturevalue(n) for n in ("model", "solver") if f"{{{n}}}" in argv}
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
