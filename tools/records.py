"""Hold the ledger together: the list of claims, the records, the chapters' code, outputs and prose.

    python tools/records.py                        report what does not fit; exit 1 if there is any
    python tools/records.py --stamp                stamp records that have no stamp yet
    python tools/records.py --stamp 03_attention   only of these chapters

Stamps, which say which code made the records, are explained in stamps.py; how prose quotes a
record, in quotes.py.
"""

import argparse
import sys
from pathlib import Path

from cells import ROOT, read_cells
from quotes import misquoted
from stamps import MEND, disagreements, keeps_records, notebooks, outputs, stale, stamp

sys.path.insert(0, str(ROOT))
from transformer_course.course.claims import judge
from transformer_course.course.ledger import CLAIMS, GROUPS, ledger
from transformer_course.course.pages import group_text, summary, tally
from transformer_course.course.records import load_records, verdict


def without_records(root, records, books):
    "Chapters that have recorded nothing; records of claims, or of notebooks, that are not there."
    for name, (path, cells) in books.items():
        if (name[:2].isdigit() or keeps_records(name, cells)) and not records.get(name):
            path = path.relative_to(root)
            yield f'{path} has no records: {MEND.format(path)}'
    for name in sorted(records.keys() - books.keys()):
        yield f'results/claims/{name}.jsonl has no notebook'
    ids = {claim.id for claim in CLAIMS}
    for name, rows in records.items():
        for strange in sorted({r['claim'] for r in rows} - ids):
            yield f'{name} records a claim {strange}, which is not in the list of claims'


def unmeasured(records, books):
    "Claims that a chapter is there for and has not recorded."
    for entry in ledger(records):
        for name in entry.planned:
            if name in books:
                mend = 'measure it there, or take the chapter off the list of claims'
                yield f'claim {entry.claim.id} has no record in {name}: {mend}'


def broken(records):
    "Records whose verdict is not the one that their numbers give."
    for name, rows in records.items():
        for r in rows:
            judged = judge(r['value'], r['threshold'], r['worst'], r['null'])
            if judged != r['verdict']:
                says = f'the record says {verdict(r)}, its numbers say {judged or "recorded"}'
                yield f'{name}: {r["claim"]}, {r["name"]}: {says}'


def unreasoned(records):
    "Thresholds that could be otherwise and come without a reason."
    for name, rows in records.items():
        for r in rows:
            threshold = r['threshold'] or dict(equals=None)
            exact = 'equals' in threshold or 0 <= threshold.get('at_most', 1) <= 1e-3
            if not exact and not r['why']:
                mend = 'say why this was asked, with why='
                about = f'{name}: {r["claim"]}, {r["name"]}'
                yield f'{about}: {threshold} is asked without a reason: {mend}'


def outdated(root, records):
    "Pages made from list and records that show something else than these."
    entries = ledger(records)
    groups = [group_text(entries, letter) for letter in GROUPS]
    pages = {'ledger': [tally(entries), summary(entries), *groups], 'index': [tally(entries)]}
    for page, texts in pages.items():
        shown = outputs(read_cells(root / 'nbs' / f'{page}.ipynb'), 'text/markdown')
        if any(text.strip() not in shown for text in texts):
            mend = f'run `python tools/execute.py nbs/{page}.ipynb`'
            mend += ' and `python tools/build_readme.py`' if page == 'index' else ''
            yield f'nbs/{page}.ipynb does not show the records: {mend}'


def problems(root):
    "Everything that does not fit, as sentences."
    root = Path(root)
    records, books = load_records(root / 'results' / 'claims'), notebooks(root)
    unshown = []
    for name in sorted(records.keys() & books.keys()):
        path, cells = books[name]
        unshown += disagreements(path.relative_to(root), cells, records[name])
    return [
        *without_records(root, records, books),
        *unmeasured(records, books),
        *stale(root, records, books),
        *broken(records),
        *unreasoned(records),
        *unshown,
        *misquoted(root, records, books),
        *outdated(root, records),
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('chapters', nargs='*', help='with --stamp: only these; default: all')
    parser.add_argument('--stamp', action='store_true', help='stamp records that have no stamp yet')
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
