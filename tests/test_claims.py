"What the notebooks of claims and plots cannot show of themselves: records on disk, fresh processes, saved outputs."

import json
import os
import subprocess
import sys

import pytest

from transformer_course.course import claims


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A folder that looks like a clone, with the chapter's notebook folder as working directory"
    (tmp_path / 'settings.ini').touch()
    (tmp_path / 'nbs').mkdir()
    monkeypatch.chdir(tmp_path / 'nbs')
    monkeypatch.delenv('TRANSFORMER_COURSE_RECORD', raising=False)
    claims._now.update(chapter=None, records=[])
    yield tmp_path
    claims._now.update(chapter=None, records=[])


def files(project):
    return sorted(str(p.relative_to(project)) for p in project.rglob('*') if p.is_file())


def run(code, **env):
    "Standard output of `code` in a fresh Python"
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ('IN_TEST', 'TRANSFORMER_COURSE_PROGRESS', 'TQDM_DISABLE')
    } | env
    return subprocess.run(
        [sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True
    )


def test_nothing_is_written_unasked(project):
    claims.chapter('03_attention')
    claims.measured('A2', 'variance', 1.01, within=(0.85, 1.15))
    claims.show()
    assert files(project) == ['settings.ini']


def test_record_and_read_back(project, monkeypatch):
    monkeypatch.setenv('TRANSFORMER_COURSE_RECORD', '1')
    claims.chapter('03_attention')
    claims.measured(
        'A2',
        'variance of q·k',
        1.01,
        within=(0.85, 1.15),
        unit='ratio',
        seed=0,
        seconds=0.5,
        reference='AIAYN 3.2.1',
    )
    claims.measured('A3', 'line\u2028separator | <|endoftext|>', True, equals=True)
    claims.measured('M4', 'gain', float('nan'), at_least=1, weak=True)
    table = claims.show()
    assert files(project) == ['results/claims/03_attention.jsonl', 'settings.ini']
    lines = (project / 'results/claims/03_attention.jsonl').read_text(encoding='utf-8').split('\n')
    assert json.loads(lines[0]) == dict(
        claim='A2',
        name='variance of q·k',
        value=1.01,
        unit='ratio',
        seed=0,
        seconds=0.5,
        threshold={'within': [0.85, 1.15]},
        holds=True,
        reference='AIAYN 3.2.1',
    )
    assert 'NaN' not in lines[2]
    back = claims.load_records(project / 'results/claims')['03_attention']
    assert back[:2] == claims.records()[:2]
    assert back[2]['value'] is None and claims.verdict(back[2]) == 'weak'
    assert 'not finite' in repr(claims.Table(back)) and 'weak' in repr(table)


def test_a_second_run_replaces_the_file(project, monkeypatch):
    monkeypatch.setenv('TRANSFORMER_COURSE_RECORD', '1')
    for names in (['one', 'two'], ['three']):
        claims.chapter('03_attention')
        for name in names:
            claims.measured('A2', name, 1)
        claims.show()
    assert [r['name'] for r in claims.load_records(project / 'results/claims')['03_attention']] == [
        'three'
    ]


def test_chapters_do_not_mix(project, monkeypatch):
    monkeypatch.setenv('TRANSFORMER_COURSE_RECORD', '1')
    for name in ('04_multihead', '03_attention'):
        claims.chapter(name)
        claims.measured('A2', f'in {name}', 1)
        claims.show()
    found = claims.load_records(project / 'results/claims')
    assert {c: [r['name'] for r in rs] for c, rs in found.items()} == {
        c: [f'in {c}'] for c in ('03_attention', '04_multihead')
    }
    assert list(found) == ['03_attention', '04_multihead']


def test_a_failed_write_leaves_the_old_file(project, monkeypatch):
    monkeypatch.setenv('TRANSFORMER_COURSE_RECORD', '1')
    claims.chapter('03_attention')
    claims.measured('A2', 'old', 1)
    claims.show()
    before = files(project)

    def full(fd):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(claims.os, 'fsync', full)
    claims.measured('A2', 'new', 2)
    with pytest.raises(OSError):
        claims.show()
    assert files(project) == before
    assert [r['name'] for r in claims.load_records(project / 'results/claims')['03_attention']] == [
        'old'
    ]


def test_a_record_needs_a_chapter_and_a_clone(project, monkeypatch, tmp_path):
    monkeypatch.setenv('TRANSFORMER_COURSE_RECORD', '1')
    claims.measured('A2', 'variance', 1.0)
    with pytest.raises(ValueError, match=r'claims\.chapter'):
        claims.show()
    claims.chapter('03_attention')
    (project / 'settings.ini').unlink()
    with pytest.raises(ValueError, match='clone'):
        claims.show()
    assert files(project) == []


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match='is not there'):
        claims.load_records(tmp_path / 'nowhere')
    assert claims.load_records(tmp_path) == {}


@pytest.mark.parametrize(
    'threshold, value, holds',
    [
        (dict(at_least=1), 1, True),
        (dict(at_least=1), 0.999999, False),
        (dict(at_most=1), 1, True),
        (dict(at_most=1), 1.000001, False),
        (dict(within=(1, 2)), 1, True),
        (dict(within=(1, 2)), 2, True),
        (dict(within=(1, 2)), 2.1, False),
        (dict(within=(1, 2)), 0.9, False),
        (dict(equals=0), 0.0, True),
        (dict(equals=0), 1e-300, False),
        (dict(equals=True), True, True),
        (dict(equals=False), True, False),
        (dict(at_least=1, at_most=2), 3, False),
        (dict(at_least=1, at_most=2), 0, False),
        (dict(at_least=0), 5, True),
        (dict(at_least=0), float('inf'), False),
        (dict(at_most=0), float('-inf'), False),
        (dict(equals=float('inf')), float('inf'), False),
    ],
)
def test_thresholds(project, capsys, threshold, value, holds):
    if holds:
        assert claims.measured('X', 'figure', value, **threshold) == value
    else:
        with pytest.raises(AssertionError, match='Claim X does not hold: figure came out at'):
            claims.measured('X', 'figure', value, **threshold)
        assert claims.records()[-1]['holds'] is False
        claims.measured('X', 'figure', value, weak=True, **threshold)
        assert claims.verdict(claims.records()[-1]) == 'weak'
    assert len(claims.records()) == 1
    assert capsys.readouterr().out.splitlines()[0].endswith('holds' if holds else 'does not hold')


def test_imports_are_light():
    out = run(
        'import sys, transformer_course.course.claims, transformer_course.plots; print({"torch", "matplotlib", "fastcore", "nbdev", "tqdm", "IPython"} & sys.modules.keys())'
    )
    assert out.stdout == 'set()\n'


def test_progress_is_silent_outside_a_terminal():
    code = 'from transformer_course.plots import progress\nfor _ in progress(range(3), desc="steps", mininterval=0): pass'
    assert (
        run(code).stderr
        == run(code, IN_TEST='1').stderr
        == run(code, TRANSFORMER_COURSE_PROGRESS='0').stderr
        == ''
    )


def test_progress_leaves_nothing_in_a_saved_notebook(monkeypatch, tmp_path):
    "In a kernel: a short loop shows no bar at all, a long one leaves an empty element, and prints stay"
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    for name in ('IN_TEST', 'TRANSFORMER_COURSE_PROGRESS', 'TQDM_DISABLE'):
        monkeypatch.delenv(name, raising=False)
    cell = nbformat.v4.new_code_cell
    nb = nbformat.v4.new_notebook(
        cells=[
            cell('from transformer_course.plots import progress\nimport time'),
            cell('for i in progress(range(3), desc="short"): print(i)'),
            cell('for i in progress(range(3), desc="long", delay=0, mininterval=0): print(i)'),
            cell(
                'with progress(total=2, desc="by hand", delay=0, mininterval=0) as bar:\n    bar.update(1); bar.set_postfix(loss=2.5)'
            ),
            cell(
                'try:\n    for i in progress(range(3), delay=0): raise RuntimeError\nexcept RuntimeError: pass'
            ),
        ]
    )
    seen, plain = [], nbclient.NotebookClient.process_message
    monkeypatch.setattr(
        nbclient.NotebookClient,
        'process_message',
        lambda self, msg, *rest: (seen.append(msg), plain(self, msg, *rest))[1],
    )
    nbclient.NotebookClient(
        nb, timeout=120, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}}
    ).execute()
    outputs = [c.outputs for c in nb.cells]
    assert [o.text for o in outputs[1]] == ['0\n1\n2\n']
    for out in outputs[2:]:
        shown = [o for o in out if o.output_type == 'display_data']
        assert len(shown) == 1 and set(shown[0].data.values()) == {''}
        assert ''.join(o.get('text', '') for o in out) == ('0\n1\n2\n' if out is outputs[2] else '')
    assert '\\r' not in json.dumps(nb) and not any(
        o.get('name') == 'stderr' for out in outputs for o in out
    )
    drawn = [
        m['content']['data']['text/html']
        for m in seen
        if m['msg_type'] in ('display_data', 'update_display_data')
    ]
    assert any('<progress' in d and 'long' in d for d in drawn) and any(
        'loss=2.5' in d for d in drawn
    )
