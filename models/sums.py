"""Arithmetic and algebra with worked solutions, generated from a seed.

Every problem is made here from templates and random numbers, so that the ``math`` domain of the
embedded model needs no text from elsewhere and can be as long as training wants.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import gcd
from random import Random

NAMES = [
    "Ada",
    "Ben",
    "Cara",
    "Dana",
    "Eli",
    "Finn",
    "Grace",
    "Hugo",
    "Ines",
    "Jack",
    "Kira",
    "Liam",
    "Maya",
    "Noah",
    "Olga",
    "Paul",
    "Quinn",
    "Rosa",
    "Sam",
    "Tara",
    "Uma",
    "Victor",
    "Wendy",
    "Xena",
    "Yusuf",
    "Zoe",
    "Anna",
    "Boris",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Gina",
    "Hana",
    "Ivan",
    "Jenny",
]
THINGS = [
    "apples",
    "books",
    "pencils",
    "stamps",
    "marbles",
    "coins",
    "cookies",
    "tickets",
    "eggs",
    "flowers",
    "cards",
    "shells",
    "stickers",
    "bottles",
    "chairs",
    "oranges",
    "candles",
    "buttons",
    "bricks",
    "cups",
]
PLACES = [
    "shop",
    "market",
    "school",
    "library",
    "bakery",
    "farm",
    "garden",
    "station",
    "museum",
    "office",
    "kitchen",
]
JOBS = [
    "washing cars",
    "walking dogs",
    "painting fences",
    "selling cakes",
    "mowing lawns",
    "tutoring",
]

Problem = tuple[str, list[str], str]  # question, steps of the solution, answer


def _signed(number: int) -> str:
    return f"+ {number}" if number >= 0 else f"- {-number}"


def _term(factor: int, name: str) -> str:
    return {1: name, -1: f"-{name}"}.get(factor, f"{factor}{name}")


def _addition(r: Random) -> Problem:
    a, b, name, thing = r.randint(3, 400), r.randint(3, 400), r.choice(NAMES), r.choice(THINGS)
    place = r.choice(PLACES)
    question = f"{name} has {a} {thing}. At the {place} {name} gets {b} more. How many {thing} does {name} have now?"
    return question, [f"{name} starts with {a} {thing}.", f"{a} + {b} = {a + b}."], f"{a + b}"


def _giving(r: Random) -> Problem:
    a = r.randint(20, 500)
    b, c = r.randint(2, a // 2), r.randint(2, 60)
    name, other, thing = r.choice(NAMES), r.choice(NAMES), r.choice(THINGS)
    question = (
        f"{name} had {a} {thing}, gave {b} of them to {other} and then bought {c} more. How many {thing} are left?"
    )
    steps = [f"After giving away: {a} - {b} = {a - b}.", f"After buying: {a - b} + {c} = {a - b + c}."]
    return question, steps, f"{a - b + c}"


def _shopping(r: Random) -> Problem:
    n, m, p, q = r.randint(2, 12), r.randint(2, 12), r.randint(2, 20), r.randint(2, 20)
    name, (x, y) = r.choice(NAMES), r.sample(THINGS, 2)
    paid = (n * p + m * q) // 50 * 50 + 50
    question = (
        f"{name} buys {n} {x} at ${p} each and {m} {y} at ${q} each, and pays with ${paid}. "
        f"How much change does {name} get?"
    )
    steps = [
        f"The {x} cost {n} * {p} = {n * p} dollars.",
        f"The {y} cost {m} * {q} = {m * q} dollars.",
        f"Together {n * p} + {m * q} = {n * p + m * q} dollars.",
        f"The change is {paid} - {n * p + m * q} = {paid - n * p - m * q} dollars.",
    ]
    return question, steps, f"{paid - n * p - m * q}"


def _wages(r: Random) -> Problem:
    hours, days, rate, spent = r.randint(2, 9), r.randint(2, 7), r.randint(6, 30), r.randint(5, 24)
    name, job = r.choice(NAMES), r.choice(JOBS)
    total = hours * days * rate
    question = (
        f"{name} earns ${rate} an hour {job}. {name} works {hours} hours a day for {days} days and "
        f"then spends ${spent}. How much money does {name} have?"
    )
    steps = [
        f"{name} works {hours} * {days} = {hours * days} hours.",
        f"{name} earns {hours * days} * {rate} = {total} dollars.",
        f"{name} keeps {total} - {spent} = {total - spent} dollars.",
    ]
    return question, steps, f"{total - spent}"


def _sharing(r: Random) -> Problem:
    people, each, rest = r.randint(3, 15), r.randint(2, 40), r.randint(0, 2)
    total, thing = people * each + rest, r.choice(THINGS)
    question = (
        f"{total} {thing} are shared equally among {people} children. How many does each child get, "
        "and how many are left over?"
    )
    steps = [f"{total} / {people} = {each} remainder {rest}, because {people} * {each} = {people * each}."]
    return question, steps, f"{each} each, {rest} left over"


def _percent(r: Random) -> Problem:
    share, base = r.choice((5, 10, 15, 20, 25, 30, 40, 50, 60, 75)), 20 * r.randint(2, 60)
    part, thing = base * share // 100, r.choice(THINGS)
    if r.random() < 0.5:
        question = f"What is {share}% of {base}?"
        return question, [f"{share}% is {share}/100.", f"{base} * {share} / 100 = {part}."], f"{part}"
    question = f"A box of {thing} costs ${base}. In a sale the price falls by {share}%. What is the new price?"
    steps = [f"The discount is {base} * {share} / 100 = {part} dollars.", f"{base} - {part} = {base - part}."]
    return question, steps, f"{base - part}"


def _speed(r: Random) -> Problem:
    speed, first, second = r.randint(20, 90), r.randint(2, 6), r.randint(1, 5)
    question = (
        f"A train travels at {speed} km per hour for {first} hours, stops, and travels {second} hours "
        f"more at {speed + 10} km per hour. How far does it travel in all?"
    )
    a, b = speed * first, (speed + 10) * second
    steps = [
        f"First part: {speed} * {first} = {a} km.",
        f"Second part: {speed + 10} * {second} = {b} km.",
        f"{a} + {b} = {a + b}.",
    ]
    return question, steps, f"{a + b} km"


def _rectangle(r: Random) -> Problem:
    w, h = r.randint(2, 60), r.randint(2, 60)
    question = f"A rectangle is {w} cm wide and {h} cm high. Find its area and its perimeter."
    steps = [
        f"Area = {w} * {h} = {w * h} square cm.",
        f"Perimeter = 2 * ({w} + {h}) = 2 * {w + h} = {2 * (w + h)} cm.",
    ]
    return question, steps, f"area {w * h}, perimeter {2 * (w + h)}"


def _ages(r: Random) -> Problem:
    young, gap, later = r.randint(3, 20), r.randint(2, 30), r.randint(2, 15)
    a, b = r.sample(NAMES, 2)
    total = 2 * young + gap + 2 * later
    question = (
        f"{a} is {gap} years older than {b}. In {later} years the sum of their ages will be {total}. "
        f"How old is {b} now?"
    )
    steps = [
        f"Let x be the age of {b}. Then {a} is x + {gap}.",
        f"(x + {later}) + (x + {gap} + {later}) = {total}.",
        f"2x + {gap + 2 * later} = {total}.",
        f"2x = {2 * young}, so x = {young}.",
    ]
    return question, steps, f"{young}"


def _linear(r: Random) -> Problem:
    a, x, b = r.choice((2, 3, 4, 5, 6, 7, 8, 9, 11, 12)), r.randint(-20, 20), r.randint(-50, 50)
    c = a * x + b
    question = r.choice(("Solve for x: ", "Find x if ")) + f"{_term(a, 'x')} {_signed(b)} = {c}."
    steps = [f"{_term(a, 'x')} = {c} {_signed(-b)} = {c - b}.", f"x = {c - b} / {a} = {x}."]
    return question, steps, f"x = {x}"


def _two_sides(r: Random) -> Problem:
    a, c, x, b = r.randint(4, 12), r.randint(1, 3), r.randint(-12, 12), r.randint(-30, 30)
    d = (a - c) * x + b
    question = f"Solve {_term(a, 'x')} {_signed(b)} = {_term(c, 'x')} {_signed(d)}."
    steps = [
        f"{_term(a, 'x')} - {_term(c, 'x')} = {d} {_signed(-b)}.",
        f"{_term(a - c, 'x')} = {d - b}.",
        f"x = {d - b} / {a - c} = {x}.",
    ]
    return question, steps, f"x = {x}"


def _system(r: Random) -> Problem:
    x, y, a, b = r.randint(-9, 9), r.randint(-9, 9), r.randint(2, 6), r.randint(2, 6)
    s, t = x + y, a * x - b * y
    question = f"Solve the system: x + y = {s}, {_term(a, 'x')} - {_term(b, 'y')} = {t}."
    steps = [
        f"From the first equation, y = {s} - x.",
        f"{_term(a, 'x')} - {b}({s} - x) = {t}.",
        f"{_term(a + b, 'x')} = {t} {_signed(b * s)} = {t + b * s}.",
        f"x = {x} and y = {s} {_signed(-x)} = {y}.",
    ]
    return question, steps, f"x = {x}, y = {y}"


def _quadratic(r: Random) -> Problem:
    p, q = r.randint(-12, 12), r.randint(-12, 12)
    b, c = -(p + q), p * q
    middle = f" {_signed(b)}x" if b else ""
    question = f"Find the roots of x^2{middle} {_signed(c)} = 0."
    steps = [
        f"We need two numbers with sum {p + q} and product {c}: {p} and {q}.",
        f"(x {_signed(-p)})(x {_signed(-q)}) = 0.",
    ]
    return question, steps, f"x = {min(p, q)} or x = {max(p, q)}"


def _expand(r: Random) -> Problem:
    a, b = r.randint(-9, 9) or 1, r.randint(-9, 9) or 2
    question = f"Expand (x {_signed(a)})(x {_signed(b)})."
    steps = [f"x*x = x^2, the middle term is ({a} + {b})x = {a + b}x, the last is {a} * {b} = {a * b}."]
    return question, steps, f"x^2 {_signed(a + b)}x {_signed(a * b)}"


def _derivative(r: Random) -> Problem:
    a, b, c, n = r.randint(2, 9), r.randint(-9, 9), r.randint(-20, 20), r.randint(3, 6)
    question = f"Differentiate f(x) = {a}x^{n} {_signed(b)}x^2 {_signed(c)}x."
    steps = ["Use the power rule: the derivative of x^n is n x^(n-1).", f"{a} * {n} = {a * n}, 2 * {b} = {2 * b}."]
    return question, steps, f"f'(x) = {a * n}x^{n - 1} {_signed(2 * b)}x {_signed(c)}"


def _fractions(r: Random) -> Problem:
    a, b, c, d = r.randint(1, 9), r.randint(2, 12), r.randint(1, 9), r.randint(2, 12)
    total = Fraction(a, b) + Fraction(c, d)
    common = b * d // gcd(b, d)
    up, down = a * common // b, c * common // d
    question = f"Compute {a}/{b} + {c}/{d}."
    steps = [
        f"The common denominator is {common}.",
        f"{a}/{b} = {up}/{common} and {c}/{d} = {down}/{common}.",
        f"{up}/{common} + {down}/{common} = {up + down}/{common}.",
    ]
    return question, steps, f"{total}"


def _product(r: Random) -> Problem:
    a, b = r.randint(12, 99), r.randint(12, 99)
    tens, ones = b // 10 * 10, b % 10
    steps = [
        f"{a} * {b} = {a} * {tens} + {a} * {ones}.",
        f"{a} * {tens} = {a * tens} and {a} * {ones} = {a * ones}.",
        f"{a * tens} + {a * ones} = {a * b}.",
    ]
    return f"Calculate {a} * {b}.", steps, f"{a * b}"


def _brackets(r: Random) -> Problem:
    a, b, c, d = (r.randint(2, 20) for _ in range(4))
    steps = [f"{a} + {b} = {a + b}.", f"{a + b} * {c} = {(a + b) * c}.", f"{(a + b) * c} - {d} = {(a + b) * c - d}."]
    return f"What is ({a} + {b}) * {c} - {d}?", steps, f"{(a + b) * c - d}"


def _sequence(r: Random) -> Problem:
    start, step = r.randint(-20, 50), r.choice((-9, -7, -4, -3, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13))
    terms = [start + step * i for i in range(7)]
    question = f"What comes next in the sequence {', '.join(map(str, terms[:5]))}, ...?"
    steps = [
        f"Each term is {abs(step)} {'more' if step > 0 else 'less'} than the one before.",
        f"{terms[4]} {_signed(step)} = {terms[5]}.",
    ]
    return question, steps, f"{terms[5]}"


def _divisor(r: Random) -> Problem:
    g, a, b = r.randint(2, 15), r.randint(2, 15), r.randint(2, 15)
    x, y = g * a, g * b
    steps, u, v = [], max(x, y), min(x, y)
    while v:
        steps.append(f"{u} = {v} * {u // v} + {u % v}.")
        u, v = v, u % v
    return f"Find the greatest common divisor of {x} and {y}.", steps, f"{u}"


def _mean(r: Random) -> Problem:
    size = r.randint(3, 6)
    values = [r.randint(1, 40) for _ in range(size - 1)]
    values.append((-sum(values)) % size + size)
    total = sum(values)
    question = f"Find the mean of {', '.join(map(str, values))}."
    steps = [f"The sum is {' + '.join(map(str, values))} = {total}.", f"{total} / {size} = {total // size}."]
    return question, steps, f"{total // size}"


def _ratio(r: Random) -> Problem:
    a, b, unit = r.randint(1, 7), r.randint(1, 7), r.randint(2, 25)
    x, y = r.sample(THINGS, 2)
    total = (a + b) * unit
    question = f"The ratio of {x} to {y} is {a}:{b}. There are {total} in all. How many {x} are there?"
    steps = [
        f"There are {a} + {b} = {a + b} parts.",
        f"One part is {total} / {a + b} = {unit}.",
        f"{a} * {unit} = {a * unit}.",
    ]
    return question, steps, f"{a * unit}"


TEMPLATES: tuple[Callable[[Random], Problem], ...] = (
    _addition, _giving, _shopping, _wages, _sharing, _percent, _speed, _rectangle, _ages, _linear, _two_sides,
    _system, _quadratic, _expand, _derivative, _fractions, _product, _brackets, _sequence, _divisor, _mean, _ratio,
)  # fmt: skip


def problem(random: Random) -> tuple[str, str]:
    """One problem of a random kind: its question, and its solution with the answer in the end."""
    question, steps, answer = random.choice(TEMPLATES)(random)
    return question, " ".join(steps) + f"\nAnswer: {answer}"


def document(random: Random) -> str:
    """One to four problems, written out in one of three ways."""
    style, parts = random.randrange(3), []
    for _ in range(random.randint(1, 4)):
        question, solution = problem(random)
        parts.append(
            (f"Problem: {question}\nSolution: {solution}", f"{question}\n{solution}", f"Q: {question}\nA: {solution}")[
                style
            ]
        )
    return "\n\n".join(parts) + "\n"
