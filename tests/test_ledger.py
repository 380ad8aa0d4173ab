"The ledger: list, records, code, outputs and prose agree, and each way of disagreeing is noticed on a doctored copy."

import json, re, shutil, threading
from concurrent.futures import ThreadPoolExecutor
import pytest
import execute, records
from conftest import ROOT
from transformer_course.course.claims import load_records
from transformer_course.course.ledger import CLAIMS, GROUPS, ledger


@pytest.fixture
def copy(tmp_path):
    "The notebooks and records, to be doctored."
    shutil.copytree(
        ROOT / 'nbs', tmp_path / 'nbs', ignore=shutil.ignore_patterns('_proc', '.ipynb_checkpoints')
    )
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
    path.write_text(
        ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows if r), encoding='utf-8'
    )


def prose(root, name, text, at=2):
    "Put a text into a Markdown cell of a notebook, in place of what it says."
    path = root / 'nbs' / f'{name}.ipynb'
    nb = json.loads(path.read_text(encoding='utf-8'))
    assert nb['cells'][at]['cell_type'] == 'markdown'
    nb['cells'][at]['source'] = text
    path.write_text(json.dumps(nb), encoding='utf-8')


def jsonl(root, name):
    return root / 'results' / 'claims' / f'{name}.jsonl'


# ---------------------------------------------------------------- as committed


def test_everything_agrees():
    assert records.problems(ROOT) == []


def test_copy_agrees(copy):
    assert records.problems(copy) == []


def test_list():
    "Ids count up within their group, chapters are chapters of the course, and a planned one has no notebook yet."
    for letter in GROUPS:
        ids = [c.id for c in CLAIMS if c.id[0] == letter]
        assert ids == [f'{letter}{n}' for n in range(1, len(ids) + 1)]
    for claim in CLAIMS:
        assert all(re.fullmatch(r'\d\d_[a-z_]+', name) for name in claim.chapters) and len(
            set(claim.chapters)
        ) == len(claim.chapters)
    built = {p.stem for p in (ROOT / 'nbs').glob('[0-9][0-9]_*.ipynb')}
    for entry in ledger(load_records(ROOT / 'results' / 'claims')):
        assert not built & set(entry.planned)


# ---------------------------------------------------------------- a claim of a built chapter without a record


def test_record_removed(copy):
    rewrite(jsonl(copy, '02_before'), lambda r: None if r['claim'] == 'H4' else r)
    assert any(p.startswith('claim H4 has no record in 02_before') for p in records.problems(copy))


def test_all_records_removed(copy):
    jsonl(copy, '03_attention').unlink()
    found = records.problems(copy)
    assert any(p.startswith('nbs/03_attention.ipynb has no records') for p in found) and any(
        p.startswith('claim A2 has no record') for p in found
    )


def test_chapter_without_records_added(copy):
    shutil.copy(copy / 'nbs' / '03_attention.ipynb', copy / 'nbs' / '14_vision.ipynb')
    found = records.problems(copy)
    assert any(p.startswith('nbs/14_vision.ipynb has no records') for p in found) and any(
        'claim M1 has no record in 14_vision' in p for p in found
    )


def test_strangers(copy):
    rewrite(
        jsonl(copy, '04_multihead'), lambda r: {**r, 'claim': 'Z9'} if r['claim'] == 'A5' else r
    )
    jsonl(copy, '03_attention').rename(jsonl(copy, '03_atention'))
    found = '\n'.join(records.problems(copy))
    assert 'records a claim Z9' in found and '03_atention.jsonl has no notebook' in found


def test_headline_renamed(copy):
    rewrite(
        jsonl(copy, '06_block'),
        lambda r: {
            **r,
            'name': r['name'].replace('attention only: loss above both', 'attention alone'),
        },
    )
    assert any(
        p.startswith('claim B1: no record is called "attention only')
        for p in records.problems(copy)
    )


# ---------------------------------------------------------------- a record older than its chapter


def test_code_changed(copy):
    doctor(copy / 'nbs' / '02_before.ipynb', 'at_least=0.6', 'at_least=0.5')
    assert [p for p in records.problems(copy) if 'older' in p] == [
        'the records of 02_before are older than its code: run `python tools/execute.py --record nbs/02_before.ipynb`'
    ]


def test_what_does_not_run_may_change(copy):
    path = copy / 'nbs' / '03_attention.ipynb'
    nb = json.loads(path.read_text(encoding='utf-8'))
    nb['cells'].insert(
        3,
        dict(
            cell_type='code',
            id='slow',
            metadata={},
            outputs=[],
            execution_count=None,
            source='#| slow\nprint(1)',
        ),
    )
    nb['cells'][2].update(id='other', metadata={'tags': ['x']})
    path.write_text(json.dumps(nb), encoding='utf-8')
    prose(copy, '03_attention', 'Other words.', at=6)
    assert records.problems(copy) == []


def test_stamp_missing(copy):
    doctor(copy / 'results' / 'claims' / 'fingerprints.json', '"05_positions"', '"55_positions"')
    assert [p for p in records.problems(copy)] == [
        'the records of 05_positions have no stamp: run `python tools/records.py --stamp`'
    ]
    assert records.stamp(copy) == [] == records.problems(copy)
    assert records.stamps(copy) == records.stamps(ROOT)


def test_stamp_replaces_nothing(copy):
    "A chapter that changed after its records were made is not stamped on request; one that has just run is."
    doctor(copy / 'nbs' / '02_before.ipynb', 'at_least=0.6', 'at_least=0.5')
    before = records.stamps(copy)
    assert 'has changed since its records were made' in records.stamp(copy, ['02_before'])[0]
    assert records.stamps(copy) == before
    assert records.stamp(copy, ['02_before'], fresh=True) == []
    after = records.stamps(copy)
    assert {n for n in before if before[n] != after[n]} == {'02_before'}


def test_stamp_needs_agreement(copy):
    rewrite(
        jsonl(copy, '01_bigram'),
        lambda r: (
            {**r, 'value': r['value'] + 0.01} if r['name'].startswith('counted bigram') else r
        ),
    )
    (copy / 'results' / 'claims' / 'fingerprints.json').unlink()
    assert 'do not print the record' in records.stamp(copy)[0]
    assert '01_bigram' not in records.stamps(copy) and '02_before' in records.stamps(copy)
    assert records.stamp(copy, ['24_pretrained']) == ['24_pretrained has no records to stamp']


def test_stamps_are_merged(copy):
    "Processes that stamp at the same time lose nothing, and leave nothing behind."
    (copy / 'results' / 'claims' / 'fingerprints.json').unlink()
    names = sorted(load_records(copy / 'results' / 'claims'))
    threads = [threading.Thread(target=records.write_stamps, args=(copy, {n: n})) for n in names]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert records.stamps(copy) == {n: n for n in names}
    assert {p.suffix for p in (copy / 'results' / 'claims').iterdir()} == {'.jsonl', '.json'}


def test_execute_records_and_stamps(tmp_path, monkeypatch, capsys):
    "A notebook that runs with --record gets records and a stamp; one without claims of its own gets neither."
    (tmp_path / 'settings.ini').touch()
    (tmp_path / 'nbs').mkdir()
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    code = [
        'from transformer_course import claims',
        "claims.chapter('98_tiny')",
        "claims.measured('A1', 'one', 1, equals=1);",
        'claims.show()',
    ]
    for name, cells in (
        ('98_tiny', code),
        ('99_other', [c.replace("claims.chapter('98_tiny')", 'chapter = 1') for c in code]),
    ):
        nbformat.write(
            new_notebook(cells=[new_code_cell(c) for c in cells]),
            tmp_path / 'nbs' / f'{name}.ipynb',
        )
    monkeypatch.setattr(execute, 'ROOT', tmp_path)
    monkeypatch.setattr(records, 'ROOT', tmp_path)
    args = type('Args', (), dict(record=True, check=False, flags='', timeout=120))
    with ThreadPoolExecutor(
        1
    ) as thread:  # a browser test of this session may have left an event loop in the main one
        for name in ('98_tiny', '99_other'):
            assert thread.submit(
                execute.execute, tmp_path / 'nbs' / f'{name}.ipynb', args, ['slow', 'cuda']
            ).result(), capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / 'results' / 'claims').iterdir()) == [
        '98_tiny.jsonl',
        'fingerprints.json',
    ]
    assert (
        list(
            records.stale(
                tmp_path, load_records(tmp_path / 'results' / 'claims'), records.notebooks(tmp_path)
            )
        )
        == []
    )


# ---------------------------------------------------------------- outputs that do not show the record


def test_other_outputs(copy):
    doctor(copy / 'nbs' / '07_gpt.ipynb', '124,439,808', '124,439,809', count=-1)
    assert any(p.startswith('nbs/07_gpt.ipynb: its outputs do not') for p in records.problems(copy))


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
        dict(holds=False),
        dict(holds=None),
        dict(threshold={'at_most': 2.0, 'weak': True}),
        dict(value=2.6, holds=False),
    ],
    ids=str,
)
def test_broken_record(copy, change):
    rewrite(
        jsonl(copy, '01_bigram'),
        lambda r: {**r, **change} if r['name'].startswith('counted bigram') else r,
    )
    said = [p for p in records.problems(copy) if 'no longer holds' in p or 'say otherwise' in p]
    assert len(said) == 1 and 'H3' in said[0] and 'counted bigram' in said[0]


def test_weak_record_may_fall_short(copy):
    rewrite(
        jsonl(copy, '01_bigram'),
        lambda r: (
            {**r, 'threshold': {'at_most': 2.0, 'weak': True}, 'holds': False}
            if r['name'].startswith('counted bigram')
            else r
        ),
    )
    assert list(records.broken(load_records(copy / 'results' / 'claims'))) == []


# ---------------------------------------------------------------- prose that quotes another number

BIGRAM = '<!-- record: counted bigram, held-out loss -->'
SHARE = "<!-- record 00_data: share of text read in one pass' worth of draws -->"


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
        (f'Of the text, 63.2 percent{SHARE}, or 0.632{SHARE}.', None),
        (f'Of the text, 64 %{SHARE}.', 'quotes 64'),
        (f'Of the text, 63{SHARE}.', 'quotes 63'),
        (
            'It is two and a half nats<!-- record: counted bigram, held-out loss; 2.4 to 2.6 -->.',
            None,
        ),
        (
            'It is three nats<!-- record: counted bigram, held-out loss; 2.9 to 3.1 -->.',
            'speaks of 2.9 to 3.1',
        ),
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


def test_committed_quotes_follow_their_records(copy):
    "Each mark in the course's own prose goes red when its record moves, and there are marks in most chapters."
    marked = set()
    recorded = load_records(copy / 'results' / 'claims')
    for name, (path, cells) in {
        **records.notebooks(copy),
        'index': (
            copy / 'nbs' / 'index.ipynb',
            json.loads((copy / 'nbs' / 'index.ipynb').read_text())['cells'],
        ),
    }.items():
        for cell in cells:
            if cell['cell_type'] != 'markdown':
                continue
            text = records.blanked(''.join(cell['source']))
            for mark in records.MARK.finditer(text):
                if mark['none']:
                    continue
                chapter = mark['chapter'] or name
                moved = {
                    chapter: [
                        {**r, 'value': float(r['value']) * 1.5 + 10} for r in recorded[chapter]
                    ]
                }
                assert records.check_mark(mark, text[: mark.start()], name, recorded) is None
                assert records.check_mark(mark, text[: mark.start()], name, moved), (
                    f'{name}: {mark[0]} does not notice'
                )
                marked.add(name)
    assert len(marked) >= 10


# ---------------------------------------------------------------- pages that were not made again


def test_pages_show_the_records(copy):
    rewrite(
        jsonl(copy, '06_block'),
        lambda r: (
            {**r, 'value': r['value'] * 1.5}
            if r['name'] == 'lead of the silent start over 40 updates'
            else r
        ),
    )
    found = '\n'.join(records.problems(copy))
    assert (
        'nbs/ledger.ipynb does not show the records' in found
        and 'nbs/index.ipynb does not show the records' in found
    )
