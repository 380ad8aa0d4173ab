"""Hold the ledger together: the list of claims, the records, the chapters' code, outputs and prose.

    python tools/records.py                        report what does not fit; exit 1 if anything does not
    python tools/records.py --stamp                stamp the records of chapters that have no stamp yet
    python tools/records.py --stamp 03_attention   only of these chapters

A stamp says which code a chapter's records were made by: `results/claims/fingerprints.json` holds a sha256 of the code
cells that run. `tools/execute.py --record` stamps what it has run. `--stamp` is for records that came another way; it
stamps only where the committed outputs agree with the records, and it never replaces a stamp.

Prose that quotes a record says so behind the number, in a comment that no reader sees (see CONTRIBUTING.md):

    It ends at **1.77 nats**<!-- record: Witten–Bell 4-gram, held-out loss -->.
    The bigram has 2.48<!-- record 01_bigram: counted bigram, held-out loss -->.
    It gains about half a nat<!-- record: gain, held out; 0.45 to 0.6 -->.
    A die has 1.67<!-- no record --> on it.
"""

import argparse, hashlib, json, os, re, sys, tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / 'tools'), str(ROOT)]
MARK = re.compile(
    r'<!--\s*(?:record(?:[ \t]+(?P<chapter>\w+))?:\s*(?P<name>.*?)|(?P<none>no record))\s*-->', re.S
)
SPAN = re.compile(r'(?P<name>.*);\s*(?P<low>[−-]?[\d.,e-]+) to (?P<high>[−-]?[\d.,e-]+)', re.S)
NUMBER = re.compile(
    r'(?<![\w.,])(?P<number>[−-]?\d[\d,]*(?:\.\d+)?(?:e[−+-]?\d+)?)(?![\w]|[.,]\d)(?P<percent>\s?(?:%|per ?cent))?'
)
CODE = re.compile(r'^```.*?^```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$', re.M | re.S)
MEND = 'run `python tools/execute.py --record {}`'


# ---------------------------------------------------------------- notebooks and their records


def notebooks(root):
    "The course's notebooks as {name: (path, cells)}, chapters and support; the pages index and ledger are not among them."
    found = {}
    for path in sorted(
        [*(root / 'nbs').glob('[0-9][0-9]_*.ipynb'), *(root / 'nbs' / 'support').glob('*.ipynb')]
    ):
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        for cell in cells:
            cell['source'] = ''.join(cell['source'])
        found[path.stem] = path, cells
    return found


def keeps_records(name, cells):
    "True for a notebook that opens the list of claims under its own name."
    return any(
        re.search(rf"\bclaims\.chapter\('{name}'\)", c['source'])
        for c in cells
        if c['cell_type'] == 'code'
    )


def fingerprint(cells):
    "A sha256 of the code that a run of these cells executes, in order; prose, outputs and ids do not count."
    from execute import skips

    code = [c['source'].strip() for c in cells if c['cell_type'] == 'code']
    return hashlib.sha256(
        '\n\0\n'.join(s for s in code if s and not skips(s, ('slow', 'cuda'), ())).encode()
    ).hexdigest()


def outputs(cells, kind=None):
    "What the cells printed, or their outputs of a MIME type."
    every = [out for c in cells if c['cell_type'] == 'code' for out in c['outputs']]
    if kind is None:
        return ''.join(''.join(out.get('text', '')) for out in every)
    return [''.join(out['data'][kind]).strip() for out in every if kind in out.get('data', {})]


# ---------------------------------------------------------------- stamps


def stamps(root):
    "The stamps as {chapter: sha256}."
    path = root / 'results' / 'claims' / 'fingerprints.json'
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}


@contextmanager
def alone(folder):
    "Keep other processes out of `folder` that ask in the same way, where the system can."
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_stamps(root, new):
    "Merge `new` into the stamps, all or nothing; stamps of chapters without records go."
    folder = root / 'results' / 'claims'
    with alone(folder):
        merged = {**stamps(root), **new}
        text = (
            json.dumps(
                {
                    name: merged[name]
                    for name in sorted(merged)
                    if (folder / f'{name}.jsonl').exists()
                },
                indent=1,
            )
            + '\n'
        )
        with tempfile.NamedTemporaryFile(
            'w', encoding='utf-8', dir=folder, suffix='.tmp', delete=False
        ) as f:
            f.write(text)
        os.chmod(f.name, 0o644)
        os.replace(f.name, folder / 'fingerprints.json')


def stamp(root, names=(), fresh=False):
    "Stamp chapters whose outputs agree with their records; what stands against it. `fresh`: they have just been run."
    from transformer_course.course.claims import load_records

    records, old, new, problems = load_records(root / 'results' / 'claims'), stamps(root), {}, []
    books = notebooks(root)
    for name in names or records:
        if name not in records or name not in books:
            problems.append(f'{name} has no records to stamp')
            continue
        path, cells = books[name]
        against = disagreements(path.relative_to(root), cells, records[name])
        code = fingerprint(cells)
        if not fresh and old.get(name, code) != code:
            against.append(
                f'{path.relative_to(root)} has changed since its records were made: {MEND.format(path.relative_to(root))}'
            )
        problems += against
        if not against:
            new[name] = code
    if new:
        write_stamps(root, new)
    return problems


# ---------------------------------------------------------------- what can be wrong


def disagreements(path, cells, rows):
    "Records of a chapter that its committed outputs do not show."
    from transformer_course.course.claims import Table, line

    printed, again = outputs(cells).splitlines(), MEND.format(path)
    found = [
        f'{path}: its outputs do not print the record "{line(r)}": {again}'
        for r in rows
        if line(r) not in printed
    ]
    if Table(rows)._repr_markdown_() not in outputs(cells, 'text/markdown'):
        found.append(f'{path}: its outputs do not show the table of its records: {again}')
    return found


def missing(root, records, books):
    "Claims of chapters that are there and have not recorded them; records of claims, or of notebooks, that are not there."
    from transformer_course.course.ledger import CLAIMS, ledger

    for name, (path, cells) in books.items():
        if (name[:2].isdigit() or keeps_records(name, cells)) and not records.get(name):
            yield f'{path.relative_to(root)} has no records: {MEND.format(path.relative_to(root))}'
    for name in sorted(records.keys() - books.keys()):
        yield f'results/claims/{name}.jsonl has no notebook'
    ids = {claim.id for claim in CLAIMS}
    for name, rows in records.items():
        for strange in sorted({r['claim'] for r in rows} - ids):
            yield f'{name} records a claim {strange}, which is not in the list of claims'
    for entry in ledger(records):
        claim = entry.claim
        for name in entry.planned:
            if name in books:
                yield f'claim {claim.id} has no record in {name}: measure it there, or take the chapter off the list of claims'
        if (
            claim.headline
            and set(claim.chapters) <= records.keys()
            and not any(r['name'] == claim.headline for _, r in entry.found)
        ):
            yield f'claim {claim.id}: no record is called "{claim.headline}", which the list of claims names as its headline'


def stale(root, records, books):
    "Records that were made by other code than the chapter's."
    known = stamps(root)
    for name in sorted(records.keys() & books.keys()):
        path = books[name][0].relative_to(root)
        if name not in known:
            yield f'the records of {name} have no stamp: run `python tools/records.py --stamp`'
        elif known[name] != fingerprint(books[name][1]):
            yield f'the records of {name} are older than its code: {MEND.format(path)}'


def broken(records):
    "Records that do not hold, whatever they say of themselves."
    from transformer_course.course.claims import judge, verdict

    for name, rows in records.items():
        for r in rows:
            holds = judge(float('nan') if r['value'] is None else r['value'], r['threshold'])
            if holds is False and not (r['threshold'] or {}).get('weak'):
                yield f'{name}: {r["claim"]} no longer holds: {r["name"]} is {r["value"]}, threshold {r["threshold"]}'
            elif holds != r['holds']:
                yield f'{name}: {r["claim"]}, {r["name"]}: the record says {verdict(r)}, its numbers say otherwise'


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
    return abs(x - (value if x < 0 else abs(value))) <= half * (1 + 1e-9)


def check_mark(mark, before, name, records):
    "What is wrong with one mark, or None. `before` is the text that it stands behind."
    chapter, wanted = mark['chapter'] or name, mark['name']
    rows = {r['name']: r['value'] for r in records.get(chapter, [])}
    span = SPAN.fullmatch(wanted) if wanted not in rows else None
    if span:
        wanted = span['name'].strip()
    if wanted not in rows:
        return f'refers to "{wanted}", which {chapter} has not recorded'
    value = rows[wanted]
    if value is None:
        return f'quotes "{wanted}", which was not finite'
    if span:
        (low, _), (high, _) = number(span['low']), number(span['high'])
        return (
            None
            if low <= value <= high
            else f'speaks of {low:g} to {high:g}, and the record "{wanted}" of {chapter} is {value}'
        )
    numbers = list(NUMBER.finditer(before))
    if not numbers:
        return f'has no number in front of the mark of "{wanted}"'
    return (
        None
        if quotes(numbers[-1], value)
        else f'quotes {numbers[-1]["number"]}, and the record "{wanted}" of {chapter} is {value}'
    )


def misquoted(root, records, books):
    "Prose that quotes another number than the record, or quotes a record without a mark."
    pages = {
        n: (
            root / 'nbs' / f'{n}.ipynb',
            json.loads((root / 'nbs' / f'{n}.ipynb').read_text(encoding='utf-8'))['cells'],
        )
        for n in ('index', 'ledger')
    }
    values = [
        (c, r['name'], r['value'])
        for c, rows in records.items()
        for r in rows
        if type(r['value']) in (int, float)
    ]
    for name, (path, cells) in {**books, **pages}.items():
        for i, cell in enumerate(cells):
            if cell['cell_type'] != 'markdown':
                continue
            text, end, marked = blanked(''.join(cell['source'])), 0, set()
            where = f'{path.relative_to(root)} cell {i}'
            for mark in MARK.finditer(text):
                before = text[end : mark.start()]
                marked |= {end + m.start() for m in list(NUMBER.finditer(before))[-1:]}
                wrong = None if mark['none'] else check_mark(mark, before, name, records)
                if wrong:
                    yield f'{where} {wrong}'
                end = mark.end()
            if path.parent.name == 'support' and name not in records:
                continue
            plain = MARK.sub(lambda m: ' ' * len(m[0]), text)
            for m in NUMBER.finditer(plain):
                digits = re.sub(r'\D', '', m['number']).lstrip('0')
                if m.start() in marked or len(digits) < 3 or not re.search(r'[.,]\d', m['number']):
                    continue
                same = [(c, n) for c, n, v in values if quotes(m, v)]
                same.sort(key=lambda pair: pair[0] != name)
                if same:
                    yield (
                        f'{where} has the number {m["number"]}, which is the record "{same[0][1]}" of {same[0][0]}: '
                        'mark it as that, or as <!-- no record -->'
                    )


def outdated(root, records):
    "Pages made from list and records that show something else than these."
    from transformer_course.course.ledger import GROUPS, group_text, ledger, summary, tally

    entries = ledger(records)
    for page, texts in {
        'ledger': [tally(entries), *(group_text(entries, g) for g in GROUPS)],
        'index': [summary(entries)],
    }.items():
        path = root / 'nbs' / f'{page}.ipynb'
        shown = outputs(json.loads(path.read_text(encoding='utf-8'))['cells'], 'text/markdown')
        if any(t.strip() not in shown for t in texts):
            yield (
                f'nbs/{page}.ipynb does not show the records: run `python tools/execute.py nbs/{page}.ipynb`'
                + (' and `python tools/build_readme.py`' if page == 'index' else '')
            )


def problems(root):
    "Everything that does not fit, as sentences."
    from transformer_course.course.claims import load_records

    root = Path(root)
    records, books = load_records(root / 'results' / 'claims'), notebooks(root)
    agreed = [
        p
        for name in sorted(records.keys() & books.keys())
        for p in disagreements(books[name][0].relative_to(root), books[name][1], records[name])
    ]
    return [
        *missing(root, records, books),
        *stale(root, records, books),
        *broken(records),
        *agreed,
        *misquoted(root, records, books),
        *outdated(root, records),
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'chapters', nargs='*', help='with --stamp: only these; default: all that have records'
    )
    parser.add_argument(
        '--stamp', action='store_true', help='stamp records whose chapter has no stamp yet'
    )
    args = parser.parse_args()
    if args.chapters and not args.stamp:
        parser.error('chapters are for --stamp')
    found = stamp(ROOT, [Path(c).stem for c in args.chapters]) if args.stamp else problems(ROOT)
    for problem in found:
        print(f'records: {problem}', file=sys.stderr)
    if not found:
        print('stamped' if args.stamp else 'list, records, code, outputs and prose agree')
    sys.exit(bool(found))


if __name__ == '__main__':
    main()
