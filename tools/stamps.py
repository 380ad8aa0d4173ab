"""Which code a chapter's records were made by: stamps in `results/claims/fingerprints.json`.

`tools/execute.py --record` stamps what it has run. `tools/records.py --stamp` is for records that
came another way; it stamps only where the committed outputs agree with the records, and it never
replaces a stamp.
"""

import json
import os
import re
import sys
from contextlib import contextmanager

from cells import ROOT, code_of, fingerprint, read_cells

sys.path.insert(0, str(ROOT))
from transformer_course.course.records import Table, line, load_records
from transformer_course.files import write_file

MEND = 'run `python tools/execute.py --record {}`'


def notebooks(root):
    "Chapters and support as {name: (path, cells)}; not the pages index and ledger."
    nbs = root / 'nbs'
    paths = [*nbs.glob('[0-9][0-9]_*.ipynb'), *nbs.glob('support/[!._]*.ipynb')]
    return {path.stem: (path, read_cells(path)) for path in sorted(paths)}


def keeps_records(name, cells):
    "True for a notebook that opens the list of claims under its own name."
    opens = re.compile(rf"""\bClaims\(['"]{name}['"]\)""")
    return any(opens.search(c['source']) for c in code_of(cells))


def outputs(cells, kind=None):
    "What the cells printed, or their outputs of a MIME type."
    every = [out for c in cells if c['cell_type'] == 'code' for out in c['outputs']]
    if kind is None:
        return ''.join(''.join(out.get('text', '')) for out in every)
    return [''.join(out['data'][kind]).strip() for out in every if kind in out.get('data', {})]


def disagreements(path, cells, rows):
    "Records of a chapter that its committed outputs do not show."
    words = lambda text: ' '.join(text.split())  # a printed line's columns may be of another width
    printed, again = {words(text) for text in outputs(cells).splitlines()}, MEND.format(path)
    found = [
        f'{path}: its outputs do not print the record "{line(r)}": {again}'
        for r in rows
        if words(line(r)) not in printed
    ]
    if Table(rows)._repr_markdown_() not in outputs(cells, 'text/markdown'):
        found.append(f'{path}: its outputs do not show the table of its records: {again}')
    return found


# ---------------------------------------------------------------- the file of stamps


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
        kept = {n: merged[n] for n in sorted(merged) if (folder / f'{n}.jsonl').exists()}
        write_file(folder / 'fingerprints.json', json.dumps(kept, indent=1) + '\n')


def stamp(root, names=(), fresh=False):
    "Stamp chapters whose outputs agree with their records, and say what stands against it."
    records, old, books = load_records(root / 'results' / 'claims'), stamps(root), notebooks(root)
    new, problems = {}, []
    for name in names or records:
        if name not in records or name not in books:
            problems.append(f'{name} has no records to stamp')
            continue
        path, cells = books[name]
        path, code = path.relative_to(root), fingerprint(cells)
        against = disagreements(path, cells, records[name])
        if not fresh and old.get(name, code) != code:
            changed = f'{path} has changed since its records were made'
            against.append(f'{changed}: {MEND.format(path)}')
        problems += against
        if not against:
            new[name] = code
    if new:
        write_stamps(root, new)
    return problems


def stale(root, records, books):
    "Records that were made by other code than the chapter's."
    known = stamps(root)
    for name in sorted(records.keys() & books.keys()):
        path, cells = books[name]
        if name not in known:
            yield f'the records of {name} have no stamp: run `python tools/records.py --stamp`'
        elif known[name] != fingerprint(cells):
            again = MEND.format(path.relative_to(root))
            yield f'the records of {name} are older than its code: {again}'
