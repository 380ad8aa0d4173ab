"""Prose that quotes a record says so behind the number, in a comment that no reader sees.

    It ends at **1.77 nats**<!-- record: Witten–Bell 4-gram, held-out loss -->.
    The bigram has 2.48<!-- record 01_bigram: counted bigram, held-out loss -->.
    It gains about half a nat<!-- record: gain, held out; 0.45 to 0.6 -->.
    A die has 1.67<!-- no record --> on it.

CONTRIBUTING.md has the rules.
"""

import re

from cells import read_cells

RECORD = r'record(?:[ \t]+(?P<chapter>\w+))?:\s*(?P<name>.*?)'
MARK = re.compile(rf'<!--\s*(?:{RECORD}|(?P<none>no record))\s*-->', re.S)
SPAN = re.compile(r'(?P<name>.*);\s*(?P<low>[−-]?[\d.,e-]+) to (?P<high>[−-]?[\d.,e-]+)', re.S)
DIGITS = r'(?P<number>[−-]?\d[\d,]*(?:\.\d+)?(?:e[−+-]?\d+)?)'
NUMBER = re.compile(
    rf'(?<![\w.,]){DIGITS}(?![\w]|[.,]\d)'  # stands alone, not in a word or a longer number
    r'(?P<percent>\s?(?:%|per ?cent))?'
)
CODE = re.compile(r'^```.*?^```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$', re.M | re.S)


def blanked(text):
    "Markdown with code and mathematics blanked out, everything else where it was."
    return CODE.sub(lambda m: re.sub(r'[^\n]', ' ', m[0]), text)


def number(text):
    "The number that is written like this, and half a unit of its last digit."
    plain = text.replace(',', '').replace('−', '-')
    mantissa, _, power = plain.partition('e')
    return float(plain), 0.5 * 10.0 ** (int(power or 0) - len(mantissa.partition('.')[2]))


def quotes(match, value):
    "True if the number found in the text is the figure `value`, rounded as the text rounds it."
    x, half = number(match['number'])
    value = value * 100 if match['percent'] else value
    value = value if x < 0 else abs(value)
    return abs(x - value) <= half * (1 + 1e-9)


def check_mark(mark, before, name, records):
    "What is wrong with one mark, or None. `before` is the text that it stands behind."
    chapter, wanted = mark['chapter'] or name, mark['name']
    rows = {r['name']: r['value'] for r in records.get(chapter, [])}
    span = SPAN.fullmatch(wanted) if wanted not in rows else None
    if span:
        wanted = span['name'].strip()
    if wanted not in rows:
        return f'refers to "{wanted}", which {chapter} has not recorded'
    value, recorded = rows[wanted], f'and the record "{wanted}" of {chapter} is {rows[wanted]}'
    if value is None:
        return f'quotes "{wanted}", which was not finite'
    if span:
        low, high = number(span['low'])[0], number(span['high'])[0]
        return None if low <= value <= high else f'speaks of {low:g} to {high:g}, {recorded}'
    numbers = list(NUMBER.finditer(before))
    if not numbers:
        return f'has no number in front of the mark of "{wanted}"'
    last = numbers[-1]
    return None if quotes(last, value) else f'quotes {last["number"]}, {recorded}'


def check_marks(text, name, records):
    "What is wrong with the marks of a text, and where the numbers stand that are marked."
    wrong, marked, end = [], set(), 0
    for mark in MARK.finditer(text):
        before = text[end : mark.start()]
        marked |= {end + m.start() for m in list(NUMBER.finditer(before))[-1:]}
        found = None if mark['none'] else check_mark(mark, before, name, records)
        if found:
            wrong.append(found)
        end = mark.end()
    return wrong, marked


def unmarked(text, marked, values, name):
    "Numbers that equal a record, three digits or more, without a mark: (number, chapter, record)."
    plain = MARK.sub(lambda m: ' ' * len(m[0]), text)
    for m in NUMBER.finditer(plain):
        digits = re.sub(r'\D', '', m['number']).lstrip('0')
        if m.start() in marked or len(digits) < 3 or not re.search(r'[.,]\d', m['number']):
            continue
        same = [(chapter, record) for chapter, record, value in values if quotes(m, value)]
        same.sort(key=lambda pair: pair[0] != name)
        if same:
            yield m['number'], *same[0]


def misquoted(root, records, books):
    "Prose that quotes another number than the record, or quotes a record without a mark."
    pages = {n: root / 'nbs' / f'{n}.ipynb' for n in ('index', 'ledger')}
    values = [(c, r['name'], r['value']) for c, rows in records.items() for r in rows]
    values = [figure for figure in values if type(figure[2]) in (int, float)]
    for name, (path, cells) in {
        **books,
        **{n: (p, read_cells(p)) for n, p in pages.items()},
    }.items():
        for i, cell in enumerate(cells):
            if cell['cell_type'] != 'markdown':
                continue
            where, text = f'{path.relative_to(root)} cell {i}', blanked(cell['source'])
            wrong, marked = check_marks(text, name, records)
            yield from (f'{where} {problem}' for problem in wrong)
            if path.parent.name == 'support' and name not in records:
                continue
            for shown, chapter, record in unmarked(text, marked, values, name):
                same = f'has the number {shown}, which is the record "{record}" of {chapter}'
                yield f'{where} {same}: mark it as that, or as <!-- no record -->'
