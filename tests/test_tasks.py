"""The tasks' answers against the standard library's; held-out pairs; and that models learn them."""

import datetime
import re

import numpy as np
import pytest

from fastrnn import batching, tasks
from fastrnn.models import LanguageModel
from fastrnn.optim import Adam
from fastrnn.seq2seq import Seq2Seq
from fastrnn.tasks import FORMS, TASKS, exact_matches, is_held_out, spell
from fastrnn.training import PairTrainer


@pytest.mark.parametrize("name", TASKS)
def test_nothing_of_the_test_is_learnt(name):
    training, held_out = TASKS[name].pairs(3000, 300, seed=1)
    assert (len(training), len(held_out)) == (3000, 300)
    assert not {answer for _, answer in training} & {answer for _, answer in held_out}
    assert not {source for source, _ in training} & {source for source, _ in held_out}
    assert len({source for source, _ in held_out}) == 300
    # Nor under another seed.
    others = TASKS[name].pairs(3000, 300, seed=2)
    assert not {answer for _, answer in others[0]} & {answer for _, answer in held_out}
    assert others[0] != training
    assert others[1] != held_out
    assert TASKS[name].pairs(3000, 300, seed=1) == (training, held_out)
    assert TASKS[name].pairs(10, 0, seed=1) == (training[:10], [])
    for source, answer in training + held_out:
        TASKS[name].source_vocabulary.encode(source)
        TASKS[name].target_vocabulary.encode(answer)


def test_one_answer_in_eight_is_held_out():
    count = sum(is_held_out(str(n)) for n in range(4000))
    assert abs(count - 500) < 5 * np.sqrt(4000 / 8 * 7 / 8)


@pytest.mark.parametrize("length", [1, 3, 17])
def test_digits_have_their_answers(length, rng):
    drawn = {"reverse": [], "sort": []}
    for name, make in (("reverse", tasks.reverse), ("sort", tasks.sort)):
        task = make(length)
        drawn[name] = [task.draw(rng) for _ in range(500)]
    assert all(answer == "".join(reversed(source)) for source, answer in drawn["reverse"])
    assert all(list(answer) == sorted(source) for source, answer in drawn["sort"])
    for pairs in drawn.values():
        assert {len(source) for source, _ in pairs} == set(range(1, length + 1))
        assert set("".join(source for source, _ in pairs)) == set("0123456789")


# What `strptime` reads once the ordinals are numbers.
PATTERNS = {
    "{day}": "%d",
    "{nth}": "%dth",
    "{ordinal}": "%dth",
    "{month}": "%B",
    "{mon}": "%b",
    "{year}": "%Y",
    "{weekday}": "%A",
    "{wd}": "%a",
}


@pytest.mark.parametrize("form", FORMS)
def test_dates_are_what_the_standard_library_reads(form, rng):
    pattern = re.sub(r"\{\w+\}", lambda field: PATTERNS[field[0]], form)
    first = datetime.date(2023, 12, 1)
    for day in range(400):
        date = first + datetime.timedelta(day + 400 * int(rng.integers(0, 100)))
        text = spell(date, form)
        if "ordinal" in form:
            for number in range(31, 0, -1):  # the twenty-first before the first
                text = text.replace(tasks.ORDINALS[number - 1], f"{number}th")
        text = re.sub(r"(\d)(st|nd|rd|th)\b", r"\1th", text)
        parsed = datetime.datetime.strptime(text, pattern)
        assert parsed.date() == date
        if "%a" in pattern.lower():
            assert date.strftime("%a") in text


def test_dates_are_drawn_in_all_forms_and_years(rng):
    pairs = [TASKS["dates"].draw(rng) for _ in range(5000)]
    for source, answer in pairs:
        date = datetime.date.fromisoformat(answer)
        assert source in {text for form in FORMS for text in (spell(date, form), spell(date, form).lower())}
    years = [int(answer[:4]) for _, answer in pairs]
    assert 1800 <= min(years) < 1805
    assert 2195 < max(years) <= 2199
    assert 0.2 < np.mean([source == source.lower() for source, _ in pairs]) < 0.4
    assert [spell(datetime.date(1987, 3, d), "{nth}") for d in (1, 2, 3, 4, 11, 12, 13, 21, 22, 23, 31)] == [
        "1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "23rd", "31st",
    ]  # fmt: skip


# A fraction of what the command line takes, and seconds.
SIZES = {"reverse": (64, 12_000), "sort": (64, 12_000), "dates": (64, 12_000)}


@pytest.mark.parametrize("name", TASKS)
def test_a_model_learns_the_task(name):
    batching.set_num_threads(1)
    task, (hidden_size, examples) = TASKS[name], SIZES[name]
    training, held_out = task.pairs(examples, 500, seed=0)
    sources, targets = task.source_vocabulary, task.target_vocabulary
    options = {"source_vocabulary": sources, "target_vocabulary": targets, "bidirectional": True, "seed": 0}
    model = Seq2Seq(len(sources), len(targets), 32, hidden_size, **options)
    pairs = [sources.encode(source) for source, _ in training], [targets.encode(answer) for _, answer in training]
    optimizer = Adam(model.parameters, 5e-3)
    PairTrainer(model, optimizer, *pairs, batch=32, epochs=3, clip=1.0, schedule="cosine", seed=0).run()
    assert exact_matches(model, held_out, 1).mean() >= 0.98
    matches = exact_matches(model, held_out, 8)
    assert matches.mean() >= 0.99
    wrong = [(source, answer + answer[0]) for source, answer in held_out]
    assert not exact_matches(model, wrong, 8)[matches].any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tasks.reverse(0), ValueError, "length: expected at least 1, got 0"),
        (lambda: tasks.sort("3"), TypeError, "length: expected an int, got '3'"),
        (lambda: TASKS["sort"].pairs(-1, 2), ValueError, "training: expected at least 0, got -1"),
        (lambda: TASKS["sort"].pairs(1, 2.5), TypeError, "held_out: expected an int, got 2.5"),
        (lambda: TASKS["sort"].pairs(1, 2, seed=-1), ValueError, "seed: expected at least 0, got -1"),
        (lambda: tasks.sort(1).pairs(1, 11), ValueError, r"held_out: expected at most about \d different sources"),
        (lambda: exact_matches(LanguageModel(3, 2, 4), []), TypeError, "model: expected a Seq2Seq, got LanguageModel"),
    ],
)  # fmt: skip
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()
