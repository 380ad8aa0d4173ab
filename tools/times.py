"""How long a notebook says that it takes, read from its opening.

A chapter says so in one sentence of its first cells: "It takes about a minute and a half on two CPU
cores." The amount may be written in figures ("90 seconds") or in words ("half a minute", "a minute
and a quarter", "between one and two minutes": the longer one counts).
"""

import re

OPENING = 8  # cells
WORDS = (
    'one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen '
    'sixteen seventeen eighteen nineteen twenty'
).split()
NUMBERS = {word: i for i, word in enumerate(WORDS, 1)}
TENS = {'thirty': 30, 'forty': 40, 'fifty': 50, 'sixty': 60, 'seventy': 70, 'eighty': 80}
NUMBERS |= TENS | {'ninety': 90, 'a hundred': 100, 'a few': 5, 'half a': 0.5, 'a': 1, 'an': 1}
PARTS = {'half': 0.5, 'quarter': 0.25, 'third': 1 / 3}
N = rf'(\d+(?:\.\d+)?|{"|".join(sorted(NUMBERS, key=len, reverse=True))})'
HALVES = r'(?: and a (half|quarter|third))?'
AMOUNT = re.compile(
    rf'\b{N}{HALVES}[ -](second|minute|hour)s?{HALVES}(?: and {N} seconds?)?', re.IGNORECASE
)
SENTENCE = re.compile(
    r'\b(?:It|(?:The|This) (?:notebook|page)|Running all of it|Executing the page) '
    r'(?:takes|runs in)\b(?P<amount>[^.;:]*?)'
    r'(?P<cores>\bon (?:one|two|2|a) (?:CPU )?cores?)?(?=[.,;:])'
)


def number(word):
    "What a number is, written in figures or as a word."
    return NUMBERS[word.lower()] if word.lower() in NUMBERS else float(word)


def amount(text):
    "Seconds in the last amount of time that a text names, or None: 'a minute and a half' is 90."
    found = [m for m in AMOUNT.finditer(text)]
    if not found:
        return None
    many, before, unit, after, more = found[-1].groups()
    whole = number(many) + sum(PARTS[part] for part in (before, after) if part)
    seconds = whole * {'second': 1, 'minute': 60, 'hour': 3600}[unit.lower()]
    return seconds + (number(more) if more else 0)


def stated(cells, cores=False):
    "Seconds that a notebook's opening says it takes, or None; `cores`: only where it names those."
    for cell in cells[:OPENING]:
        if cell['cell_type'] != 'markdown':
            continue
        for m in SENTENCE.finditer(' '.join(cell['source'].split()) + '.'):
            seconds = amount(m['amount'])
            if seconds is not None and (m['cores'] or not cores):
                return seconds
    return None
