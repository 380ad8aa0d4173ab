"""The ledger: list, records, code, outputs and prose agree.

Each way of disagreeing is noticed, on a doctored copy of the notebooks and records.
"""

import ast
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import execute
import quotes
import records
import stamps
from cells import code_of, fingerprint, notebook_paths, read_cells, tree
from conftest import ROOT
from transformer_course.course.ledger import CLAIMS, Entry, ledger, overall
from transformer_course.course.records import Table, line, load_records


@pytest.fixture
def copy(tmp_path):
    "The notebooks and records, to be doctored."
    skip = shutil.ignore_patterns('_proc', '.ipynb_checkpoints')
    shutil.copytree(ROOT / 'nbs', tmp_path / 'nbs', ignore=skip)
    shutil.copytree(ROOT / 'results' / 'claims', tmp_path / 'results' / 'claims')
    return tmp_path


def doctor(path, old, new, count=1):
    "Replace text in a file, which must be there."
    text = path.read_text(encoding='utf-8')
    assert old in text, f'{path.name} has no {old!r}: change this test along with it'
    path.write_text(text.replace(old, new, count), encoding='utf-8')


def rewrite(path, change):
    "Pass each record of a file through `change`; None drops it."
    rows = [change(json.loads(row)) for row in path.read_text(encoding='utf-8').splitlines()]
    text = ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows if r)
    path.write_text(text, encoding='utf-8')


def altered(which, **change):
    "A function for `rewrite` that changes the records for which `which` is true."
    return lambda r: {**r, **change} if which(r) else r


def insert_code(root, name, source, at=2):
    "Put a code cell into a notebook."
    path = root / 'nbs' / f'{name}.ipynb'
    nb = json.loads(path.read_text(encoding='utf-8'))
    cell = dict(cell_type='code', id='inserted', metadata={}, outputs=[], source=source)
    nb['cells'].insert(at, {**cell, 'execution_count': None})
    path.write_text(json.dumps(nb), encoding='utf-8')


def prose(root, name, text, at=2):
    "Put a text into a Markdown cell of a notebook, in place of what it says."
    path = root / 'nbs' / f'{name}.ipynb'
    nb = json.loads(path.read_text(encoding='utf-8'))
    assert nb['cells'][at]['cell_type'] == 'markdown'
    nb['cells'][at]['source'] = text
    path.write_text(json.dumps(nb), encoding='utf-8')


def jsonl(root, name):
    return root / 'results' / 'claims' / f'{name}.jsonl'


def is_bigram(record):
    return record['name'].startswith('counted bigram')


# ---------------------------------------------------------------- as committed


def test_everything_agrees():
    assert records.problems(ROOT) == []


def test_copy_agrees(copy):
    assert records.problems(copy) == []


def test_planned_claims_have_no_notebook_yet():
    built = {p.stem for p in (ROOT / 'nbs').glob('[0-9][0-9]_*.ipynb')}
    for entry in ledger(load_records(ROOT / 'results' / 'claims')):
        assert not built & set(entry.planned)


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    'held, short, said',
    [
        (3, 0, 'holds here'),
        (3, 1, 'weak'),
        (2, 2, 'weak'),
        (2, 3, 'does not hold at this size'),
        (0, 1, 'does not hold at this size'),
    ],
)
def test_the_verdict_on_a_claim_counts_its_records(held, short, said):
    claim = next(c for c in CLAIMS if c.here)
    blank = dict(threshold={'at_least': 1}, worst=None, name='x')
    rows = [dict(blank, value=2, verdict='holds')] * held
    rows += [dict(blank, value=0.5, verdict='weak')] * short
    assert overall(Entry(claim, tuple(('03_attention', r) for r in rows))) == said


# ---------------------------------------------------------------- a claim without a record


def test_record_removed(copy):
    rewrite(jsonl(copy, '03_attention'), lambda r: None if r['claim'] == 'A2' else r)
    said = 'claim A2 has no record in 03_attention'
    assert any(p.startswith(said) for p in records.problems(copy))


def test_all_records_removed(copy):
    jsonl(copy, '03_attention').unlink()
    found = records.problems(copy)
    assert any(p.startswith('nbs/03_attention.ipynb has no records') for p in found)
    assert any(p.startswith('claim A2 has no record') for p in found)


def test_chapter_without_records_added(copy):
    jsonl(copy, '25_experts').unlink()  # the only chapter of its claim
    found = records.problems(copy)
    assert any(p.startswith('nbs/25_experts.ipynb has no records') for p in found)
    assert any('claim M8 has no record in 25_experts' in p for p in found)
    assert any('nbs/index.ipynb does not show the records' in p for p in found)  # one more planned


def test_strangers(copy):
    rewrite(jsonl(copy, '04_multihead'), altered(lambda r: r['claim'] == 'A5', claim='Z9'))
    jsonl(copy, '03_attention').rename(jsonl(copy, '03_atention'))
    found = '\n'.join(records.problems(copy))
    assert 'records a claim Z9' in found and '03_atention.jsonl has no notebook' in found


# ---------------------------------------------------------------- a record older than its chapter


def test_code_changed(copy):
    insert_code(copy, '01_bigram', 'x = 1')
    again = 'run `python tools/execute.py --record nbs/01_bigram.ipynb`'
    assert [p for p in records.problems(copy) if 'older' in p] == [
        f'the records of 01_bigram are older than its code: {again}'
    ]


def test_what_does_not_run_may_change(copy):
    prose(copy, '01_bigram', 'Other words.')
    insert_code(copy, '01_bigram', '#| eval: false\nprint(1)')
    insert_code(copy, '01_bigram', '# only a comment')
    assert records.problems(copy) == []


@pytest.mark.parametrize('path', notebook_paths(), ids=lambda p: p.stem)
def test_layout_does_not_count(path):
    "Code that is written out anew, without its comments and line breaks, has the same stamp."
    before = read_cells(path)
    after = [dict(c) for c in before]
    for cell in code_of(after):
        lines = [l for l in cell['source'].splitlines() if l.startswith('#|')]
        cell['source'] = '\n'.join([*lines, ast.unparse(tree(cell['source']))])
    assert fingerprint(before) == fingerprint(after)


@pytest.mark.parametrize(
    'old, new',
    [
        ('x = 1', 'x = 1.0'),
        ('x = 1', 'y = 1'),
        ('x = 1', 'x = True'),
        ('x + y', 'x - y'),
        ("'one'", "'two'"),
        ("f'{x}'", "f'{x:.2f}'"),
        ('f(a, b)', 'f(b, a)'),
        ('f(a=1)', 'f(b=1)'),
        ('def f(a): return a', 'def f(a): pass'),
        ('!ls', '!ls -l'),
        ('%time x', '%time y'),
    ],
)
def test_every_change_of_meaning_counts(old, new):
    stamp = lambda source: fingerprint([dict(cell_type='code', source=source)])
    assert stamp(old) != stamp(new)
    assert stamp(old) == stamp(f'# as before\n{old}\n\n')


def test_docstrings_do_not_count():
    "What a function says of itself may be written better; a string that is a value may not."
    stamp = lambda source: fingerprint([dict(cell_type='code', source=source)])
    assert stamp('def f():\n    "a"\n    return 1') == stamp('def f():\n    "b"\n    return 1')
    assert stamp('def f():\n    return "a"') != stamp('def f():\n    return "b"')


def test_stamp_missing(copy):
    doctor(copy / 'results' / 'claims' / 'fingerprints.json', '"05_positions"', '"55_positions"')
    assert records.problems(copy) == [
        'the records of 05_positions have no stamp: run `python tools/records.py --stamp`'
    ]
    assert stamps.stamp(copy) == [] == records.problems(copy)
    assert stamps.stamps(copy) == stamps.stamps(ROOT)


def test_stamp_replaces_nothing(copy):
    "A chapter that changed after its records were made is not stamped; one that has just run is."
    insert_code(copy, '01_bigram', 'x = 1')
    before = stamps.stamps(copy)
    assert 'has changed since its records were made' in stamps.stamp(copy, ['01_bigram'])[0]
    assert stamps.stamps(copy) == before
    assert stamps.stamp(copy, ['01_bigram'], fresh=True) == []
    after = stamps.stamps(copy)
    assert {n for n in before if before[n] != after[n]} == {'01_bigram'}


def test_stamp_needs_agreement(copy):
    rewrite(jsonl(copy, '01_bigram'), altered(is_bigram, value=2.4))
    (copy / 'results' / 'claims' / 'fingerprints.json').unlink()
    assert 'do not print the record' in stamps.stamp(copy)[0]
    assert '01_bigram' not in stamps.stamps(copy) and '03_attention' in stamps.stamps(copy)
    assert stamps.stamp(copy, ['99_nothing']) == ['99_nothing has no records to stamp']


def test_stamps_are_merged(copy):
    "Processes that stamp at the same time lose nothing, and leave nothing behind."
    (copy / 'results' / 'claims' / 'fingerprints.json').unlink()
    names = sorted(load_records(copy / 'results' / 'claims'))
    threads = [threading.Thread(target=stamps.write_stamps, args=(copy, {n: n})) for n in names]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert stamps.stamps(copy) == {n: n for n in names}
    assert {p.suffix for p in (copy / 'results' / 'claims').iterdir()} == {'.jsonl', '.json'}


TINY = [
    'from transformer_course.course.claims import Claims',
    "claims = Claims('98_tiny')",
    "claims.measured('A1', 'one', 1, equals=1);",
    'claims.show()',
]


def test_execute_records_and_stamps(tmp_path, monkeypatch, capsys):
    "A notebook that runs with --record gets records and a stamp; one without claims, neither."
    nbformat = pytest.importorskip('nbformat')
    (tmp_path / 'settings.ini').touch()
    (tmp_path / 'nbs').mkdir()
    books = {'98_tiny': TINY, '99_other': [c.replace('98_tiny', 'elsewhere') for c in TINY]}
    for name, sources in books.items():
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in sources])
        nbformat.write(nb, tmp_path / 'nbs' / f'{name}.ipynb')
    monkeypatch.setattr(execute, 'ROOT', tmp_path)
    args = type('Args', (), dict(record=True, check=False, timeout=120))
    # in a thread: a browser test of this session may have left an event loop in the main one
    with ThreadPoolExecutor(1) as thread:
        for name in books:
            path = tmp_path / 'nbs' / f'{name}.ipynb'
            assert thread.submit(execute.execute, path, args).result(), capsys.readouterr().err
    claims = tmp_path / 'results' / 'claims'
    assert sorted(p.name for p in claims.iterdir()) == ['98_tiny.jsonl', 'fingerprints.json']
    assert not list(stamps.stale(tmp_path, load_records(claims), stamps.notebooks(tmp_path)))


# ---------------------------------------------------------------- outputs without the record


def test_other_outputs(copy):
    doctor(copy / 'nbs' / '07_gpt2.ipynb', '124,439,808', '124,439,809', count=-1)
    found = records.problems(copy)
    assert any(p.startswith('nbs/07_gpt2.ipynb: its outputs do not') for p in found)


def test_record_not_in_the_table(copy):
    path = jsonl(copy, '00_data')
    rows = path.read_text(encoding='utf-8').splitlines()
    path.write_text('\n'.join(rows[:-1]) + '\n', encoding='utf-8')
    assert any('do not show the table' in p for p in records.problems(copy))


# ---------------------------------------------------------------- a record that no longer holds


@pytest.mark.parametrize(
    'change',
    [
        dict(value=2.6),
        dict(threshold={'at_most': 2.0}),
        dict(value=None),
        dict(verdict='does not hold'),
        dict(verdict='weak'),
        dict(verdict=None),
        dict(worst=2.6),
        dict(threshold={'at_most': 2.0}, null=2.9),
    ],
    ids=str,
)
def test_broken_record(copy, change):
    rewrite(jsonl(copy, '01_bigram'), altered(is_bigram, **change))
    said = [p for p in records.problems(copy) if 'its numbers say' in p]
    assert len(said) == 1 and 'H3' in said[0] and 'counted bigram' in said[0]


def test_a_record_may_fall_short(copy):
    "What is red is a record that disagrees with its numbers, not one that is unwelcome."
    missed = dict(threshold={'at_most': 2.0}, null=None, verdict='does not hold')
    rewrite(jsonl(copy, '01_bigram'), altered(is_bigram, **missed))
    assert list(records.broken(load_records(copy / 'results' / 'claims'))) == []


def test_a_threshold_needs_a_reason(copy):
    rewrite(jsonl(copy, '01_bigram'), altered(is_bigram, why=''))
    said = [p for p in records.problems(copy) if 'without a reason' in p]
    assert len(said) == 1 and 'H3' in said[0] and 'counted bigram' in said[0]


# ---------------------------------------------------------------- prose that quotes another number

BIGRAM = '<!-- record: counted bigram, held-out loss -->'
SHARE = "<!-- record 00_data: share of text read in one pass' worth of draws -->"
TWO_AND_A_HALF = '<!-- record: counted bigram, held-out loss; 2.4 to 2.6 -->'
THREE = '<!-- record: counted bigram, held-out loss; 2.9 to 3.1 -->'


@pytest.mark.parametrize(
    'text, problem',
    [
        (f'The loss is **2.48 nats**{BIGRAM}.', None),
        (f'The loss is **2.5 nats**{BIGRAM}.', None),
        (f'The loss is 2.482{BIGRAM}, not 7.', None),
        (f'The loss is **2.47 nats**{BIGRAM}.', 'quotes 2.47'),
        (f'The loss is −2.48{BIGRAM}.', 'quotes −2.48'),
        (f'The loss is 2.6, or 2.49{BIGRAM}.', 'quotes 2.49'),
        (f'The loss{BIGRAM} is 2.4 nats.', 'no number in front'),
        (f'`2.48`{BIGRAM}', 'no number in front'),
        (f'Of the text, 63 %{SHARE}.', None),
        (f'Of the text, 63.1 percent{SHARE}, or 0.631{SHARE}.', None),
        (f'Of the text, 64 %{SHARE}.', 'quotes 64'),
        (f'Of the text, 63{SHARE}.', 'quotes 63'),
        (f'It is two and a half nats{TWO_AND_A_HALF}.', None),
        (f'It is three nats{THREE}.', 'speaks of 2.9 to 3.1'),
        ('It is 2.48<!-- record: counted trigram, loss -->.', 'has not recorded'),
        ('It is 2.48<!-- record 02_before: counted bigram, held-out loss -->.', 'has not recorded'),
        ('It is 2.48 nats.', 'has the number 2.48'),
        ('GPT-2 has 124,439,808 parameters.', 'has the number 124,439,808'),
        ('At 2.48<!-- no record --> francs the pound.', None),
        ('A code: `2.48`, $2.48$.\n```\n2.48\n```\n', None),
        ('arXiv 2105.02482, 248, 2.4 and 1,024.', None),
    ],
)
def test_quotes(copy, text, problem):
    prose(copy, '01_bigram', text)
    said = [p for p in records.problems(copy) if 'cell 2 ' in p and '01_bigram' in p]
    assert (len(said) == 1 and problem in said[0]) if problem else said == []


def committed_marks():
    "Every mark in the course's own prose: (notebook, the mark, the text that it stands behind)."
    books = {name: cells for name, (_, cells) in stamps.notebooks(ROOT).items()}
    books['index'] = read_cells(ROOT / 'nbs' / 'index.ipynb')
    for name, cells in books.items():
        for cell in cells:
            text = quotes.blanked(cell['source']) if cell['cell_type'] == 'markdown' else ''
            for mark in quotes.MARK.finditer(text):
                if not mark['none']:
                    yield name, mark, text[: mark.start()]


def test_committed_quotes_follow_their_records():
    "Each mark goes red when its record moves, and there are marks in most chapters."
    marked, recorded = set(), load_records(ROOT / 'results' / 'claims')
    for name, mark, before in committed_marks():
        chapter = mark['chapter'] or name
        moved = [{**r, 'value': float(r['value']) * 1.5 + 10} for r in recorded[chapter]]
        assert quotes.check_mark(mark, before, name, recorded) is None
        assert quotes.check_mark(mark, before, name, {chapter: moved}), f'{name}: {mark[0]} stays'
        marked.add(name)
    assert len(marked) >= 10


# ---------------------------------------------------------------- pages that were not made again


def test_pages_show_the_records(copy):
    rewrite(jsonl(copy, '06_depth'), altered(lambda r: r['claim'] == 'B4', value=12.5))
    found = '\n'.join(records.problems(copy))
    assert 'nbs/ledger.ipynb does not show the records' in found


def test_the_columns_of_a_printed_record_may_be_of_another_width():
    "Words and figures are what a notebook has to show; another figure is noticed."
    rows = load_records(ROOT / 'results' / 'claims')['03_attention']
    printed = '\n'.join(line(r).replace('  ', '     ') for r in rows)
    table = {'data': {'text/markdown': Table(rows)._repr_markdown_()}}
    shown = lambda text: [{'cell_type': 'code', 'outputs': [{'text': text}, table]}]
    assert stamps.disagreements('03_attention', shown(printed), rows) == []
    wrong = printed.replace(line(rows[0]).split('  ')[-1].strip(), 'fails', 1)
    assert len(stamps.disagreements('03_attention', shown(wrong), rows)) == 1
