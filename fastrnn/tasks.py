"""Sequence-to-sequence tasks that are made on the spot and have one right answer: reversing, sorting, reading dates.

Sources that are held out for a test never stand in the training set, nor do others with the same answer: whether an
answer is held out depends on the answer alone.
"""

import datetime
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .checks import as_seed, describe, integer, positive
from .models import Vocabulary
from .parameters import Array
from .seq2seq import Seq2Seq

DIGITS = "0123456789"
# One answer in so many is held out.
ONE_HELD_OUT_IN = 8
# A test set of different sources gives up after so many draws for each.
DRAWS = 1000

Pair = tuple[str, str]
Pairs = list[Pair]


@dataclass(frozen=True)
class Task:
    """A task: the characters of its sources and of its answers, and how one of each is drawn.

    ``draw(rng)`` returns ``source, answer``.

    >>> from fastrnn import tasks
    >>> training, held_out = tasks.TASKS["dates"].pairs(1000, 10, seed=3)
    >>> training[0]
    ('...', '...-...-...')
    >>> {answer for _, answer in training} & {answer for _, answer in held_out}
    set()
    """

    name: str
    help: str
    source_vocabulary: Vocabulary
    target_vocabulary: Vocabulary
    draw: Callable[[np.random.Generator], Pair]

    def pairs(self, training: int, held_out: int, seed: int | None = 0) -> tuple[Pairs, Pairs]:
        """So many pairs (source, answer) to learn, and so many different ones for a test; None takes the system's seed.

        Raises TypeError or ValueError for a wrong argument, or if there are not so many different ones.
        """
        training, held_out = integer(training, "training", 0), integer(held_out, "held_out", 0)
        learn_rng, test_rng = np.random.default_rng(as_seed(seed)).spawn(2)
        learnt: Pairs = []
        while len(learnt) < training:
            pair = self.draw(learn_rng)
            if not is_held_out(pair[1]):
                learnt.append(pair)
        test: dict[str, str] = {}
        for _ in range(DRAWS * held_out):
            if len(test) == held_out:
                break
            source, answer = self.draw(test_rng)
            if is_held_out(answer):
                test[source] = answer
        else:
            if len(test) < held_out:
                raise ValueError(f"held_out: expected at most about {len(test)} different sources, got {held_out}")
        return learnt, list(test.items())


def is_held_out(answer: str) -> bool:
    """Whether sources with this answer are for tests only: one in eight, by a hash."""
    return hashlib.blake2b(answer.encode(), digest_size=1).digest()[0] % ONE_HELD_OUT_IN == 0


def reverse(length: int = 10) -> Task:
    """Reversing strings of 1 to ``length`` digits: 1952 -> 2591.

    >>> import numpy as np
    >>> from fastrnn import tasks
    >>> source, answer = tasks.reverse().draw(np.random.default_rng(0))
    >>> source[::-1] == answer
    True
    """
    return _of_digits("reverse", "reverse a string of digits", length, lambda digits: digits[::-1])


def sort(length: int = 10) -> Task:
    """Sorting strings of 1 to ``length`` digits: 1952 -> 1259.

    >>> import numpy as np
    >>> from fastrnn import tasks
    >>> source, answer = tasks.sort().draw(np.random.default_rng(0))
    >>> "".join(sorted(source)) == answer
    True
    """
    return _of_digits("sort", "sort a string of digits", length, lambda digits: "".join(sorted(digits)))


def _of_digits(name: str, help: str, length: int, answer: Callable[[str], str]) -> Task:
    length, vocabulary = positive(length, "length"), Vocabulary(DIGITS)

    def draw(rng: np.random.Generator) -> Pair:
        digits = vocabulary.decode(rng.integers(0, 10, rng.integers(1, length + 1)))
        return digits, answer(digits)

    return Task(name, help, vocabulary, vocabulary, draw)


# How a date may be written. What stands for what: `_spell`.
FORMS = (
    "{day} {month} {year}",
    "{day} {mon} {year}",
    "{day}. {month} {year}",
    "{weekday}, {day} {month} {year}",
    "{wd} {day} {mon} {year}",
    "{nth} {month} {year}",
    "{nth} of {month}, {year}",
    "the {nth} of {month} {year}",
    "{weekday}, the {nth} of {month}, {year}",
    "the {ordinal} of {month} {year}",
    "the {ordinal} of {month}, {year}",
    "{month} {day}, {year}",
    "{mon} {day}, {year}",
    "{mon} {day} {year}",
    "{weekday}, {month} {day}, {year}",
    "{wd}, {mon} {day}, {year}",
    "{month} {nth}, {year}",
    "{month} the {nth}, {year}",
    "{month} the {ordinal}, {year}",
    "{year} {month} {day}",
    "{year}, {month} {nth}",
)
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
UNITS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
TEENS = (
    "tenth", "eleventh", "twelfth", "thirteenth", "fourteenth",
    "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth",
)  # fmt: skip
ORDINALS = (*UNITS, *TEENS, "twentieth", *[f"twenty-{n}" for n in UNITS], "thirtieth", "thirty-first")
FIRST_DATE, LAST_DATE = datetime.date(1800, 1, 1), datetime.date(2199, 12, 31)


def dates() -> Task:
    """Dates from 1800 to 2199, in words of many kinds, to ISO 8601: the 3rd of March 1987 -> 1987-03-03.

    >>> import numpy as np
    >>> from fastrnn import tasks
    >>> source, answer = tasks.dates().draw(np.random.default_rng(0))
    >>> len(answer), "1800" <= answer[:4] <= "2199"
    (10, True)
    """
    first, last = FIRST_DATE.toordinal(), LAST_DATE.toordinal()
    words = "".join([*MONTHS, *WEEKDAYS, *ORDINALS, DIGITS, "st nd rd th of the ,."])
    vocabulary = Vocabulary.of(words + words.lower())

    def draw(rng: np.random.Generator) -> Pair:
        date = datetime.date.fromordinal(int(rng.integers(first, last + 1)))
        source = spell(date, FORMS[rng.integers(len(FORMS))])
        return source.lower() if rng.random() < 0.25 else source, date.isoformat()

    return Task("dates", "turn a date in words into ISO 8601", vocabulary, Vocabulary(DIGITS + "-"), draw)


def spell(date: datetime.date, form: str) -> str:
    """A date in words: ``form`` with its fields filled in.

    >>> import datetime
    >>> from fastrnn import tasks
    >>> tasks.spell(datetime.date(1987, 3, 3), "{wd}, the {nth} of {month} {year}; {ordinal}")
    'Tue, the 3rd of March 1987; third'
    """
    month, weekday = MONTHS[date.month - 1], WEEKDAYS[date.weekday()]
    ending = "th" if 10 < date.day < 20 else {1: "st", 2: "nd", 3: "rd"}.get(date.day % 10, "th")
    return form.format(
        day=date.day,
        nth=f"{date.day}{ending}",
        ordinal=ORDINALS[date.day - 1],
        month=month,
        mon=month[:3],
        year=date.year,
        weekday=weekday,
        wd=weekday[:3],
    )


TASKS = {task.name: task for task in (reverse(), sort(), dates())}


def exact_matches(model: Seq2Seq, pairs: Sequence[Pair], beam_size: int = 8) -> Array:
    """Whether the model's likeliest answer (`Seq2Seq.translate`) is the right one, for each pair: an array of bool.

    >>> from fastrnn import tasks
    >>> from fastrnn.seq2seq import Seq2Seq
    >>> model = Seq2Seq(10, 10, 4, 4, source_vocabulary=tasks.DIGITS, target_vocabulary=tasks.DIGITS)
    >>> tasks.exact_matches(model, [("123", "321"), ("4", "4")], beam_size=2).shape
    (2,)
    """
    if not isinstance(model, Seq2Seq):
        raise TypeError(f"model: expected a Seq2Seq, got {describe(model)}")
    answers = model.translate([source for source, _ in pairs], beam_size)
    return np.array([answer == right for answer, (_, right) in zip(answers, pairs)], bool)
