"What the notebooks of claims and progress cannot show: fresh processes, saved outputs."

import json
import os
import struct
import subprocess
import sys

import pytest

from transformer_course import files
from transformer_course.course.claims import Claims
from transformer_course.course.records import Table, load_records, verdict

SILENCED = 'IN_TEST', 'TRANSFORMER_COURSE_PROGRESS', 'TQDM_DISABLE'


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A folder that looks like a clone, with the chapter's notebook folder as working directory."
    (tmp_path / 'settings.ini').touch()
    (tmp_path / 'nbs').mkdir()
    monkeypatch.chdir(tmp_path / 'nbs')
    monkeypatch.delenv('TRANSFORMER_COURSE_RECORD', raising=False)
    return tmp_path


@pytest.fixture
def recording(project, monkeypatch):
    "The same folder, with records asked for; the folder that they go to."
    monkeypatch.setenv('TRANSFORMER_COURSE_RECORD', '1')
    return project / 'results' / 'claims'


def listed(project):
    "All files of the folder, hidden ones too."
    return sorted(str(p.relative_to(project)) for p in project.rglob('*') if p.is_file())


def run(code, env=(), stderr=subprocess.PIPE):
    "A fresh Python that runs `code`, with nothing that silences a progress bar but `env`."
    env = {k: v for k, v in os.environ.items() if k not in SILENCED} | dict(env)
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr)
    return subprocess.run([sys.executable, '-c', code], env=env, text=True, check=True, **pipes)


# ---------------------------------------------------------------- records on disk


def test_nothing_is_written_unasked(project):
    claims = Claims('03_attention')
    claims.measured('A2', 'variance', 1.01, within=(0.85, 1.15))
    claims.show()
    assert listed(project) == ['settings.ini']


def test_record_and_read_back(project, recording):
    claims = Claims('03_attention')
    known = dict(unit='ratio', seed=0, seconds=0.5, reference='AIAYN 3.2.1')
    claims.measured('A2', 'variance of q·k', 1.01, within=(0.85, 1.15), **known)
    claims.measured('A3', 'line\u2028separator | <|endoftext|>', True, equals=True)
    claims.measured('M4', 'gain', float('nan'), at_least=1, verdict='does not hold')
    table = claims.show()
    assert listed(project) == ['results/claims/03_attention.jsonl', 'settings.ini']
    lines = (recording / '03_attention.jsonl').read_text(encoding='utf-8').split('\n')
    wanted = dict(claim='A2', name='variance of q·k', value=1.01, verdict='holds', **known)
    wanted |= dict(worst=None, null=None, why='')
    assert json.loads(lines[0]) == {**wanted, 'threshold': {'within': [0.85, 1.15]}}
    assert 'NaN' not in lines[2]
    back = load_records(recording)['03_attention']
    assert back[:2] == claims.records[:2]
    assert back[2]['value'] is None and verdict(back[2]) == 'does not hold'
    assert 'not finite' in repr(Table(back)) and 'does not hold' in repr(table)


def test_a_second_run_replaces_the_file(recording):
    for names in (['one', 'two'], ['three']):
        claims = Claims('03_attention')
        for name in names:
            claims.measured('A2', name, 1)
        claims.show()
    assert [r['name'] for r in load_records(recording)['03_attention']] == ['three']


def test_chapters_do_not_mix(recording):
    "Two chapters that measure in turn, in one process, keep their records apart."
    later, earlier = Claims('04_multihead'), Claims('03_attention')
    for claims in (later, earlier, later):
        claims.measured('A2', f'in {claims.chapter}, {len(claims.records)}', 1)
    later.show()
    earlier.show()
    found = load_records(recording)
    assert list(found) == ['03_attention', '04_multihead']
    names = {chapter: [r['name'] for r in rows] for chapter, rows in found.items()}
    assert names['03_attention'] == ['in 03_attention, 0']
    assert names['04_multihead'] == ['in 04_multihead, 0', 'in 04_multihead, 1']


def test_a_failed_write_leaves_the_old_file(project, recording, monkeypatch):
    claims = Claims('03_attention')
    claims.measured('A2', 'old', 1)
    claims.show()
    before = listed(project)

    def full(fd):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(files.os, 'fsync', full)
    claims.measured('A2', 'new', 2)
    with pytest.raises(OSError, match='No space'):
        claims.show()
    assert listed(project) == before
    assert [r['name'] for r in load_records(recording)['03_attention']] == ['old']


def test_a_record_needs_a_clone(project, recording):
    (project / 'settings.ini').unlink()
    with pytest.raises(ValueError, match='clone'):
        Claims('03_attention').show()
    assert listed(project) == []


# ---------------------------------------------------------------- thresholds

INFINITY = float('inf')


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
        (dict(at_least=0), INFINITY, False),
        (dict(at_most=0), -INFINITY, False),
        (dict(equals=INFINITY), INFINITY, False),
    ],
)
def test_thresholds(capsys, threshold, value, holds):
    claims = Claims('03_attention')
    if holds:
        assert claims.measured('X', 'figure', value, **threshold) == value
    else:
        with pytest.raises(AssertionError, match='Claim X: figure came out at .* chapter says'):
            claims.measured('X', 'figure', value, **threshold)
        assert claims.records == []
        claims.measured('X', 'figure', value, verdict='does not hold', **threshold)
    assert len(claims.records) == 1
    said = 'holds' if holds else 'does not hold'
    assert verdict(claims.records[0]) == said
    with pytest.raises(AssertionError, match='the chapter says'):
        claims.measured('X', 'figure', value, verdict='weak', **threshold)
    assert capsys.readouterr().out.splitlines()[0].endswith(said)


# ---------------------------------------------------------------- fresh processes


def test_imports_are_light():
    "What every chapter imports first loads nothing that is slow to load."
    rooms = 'course.claims', 'course.walk', 'figures', 'graphs', 'matrices', 'plots', 'progress'
    imports = '\n'.join(f'import transformer_course.{room}' for room in rooms)
    slow = {'torch', 'matplotlib', 'fastcore', 'nbdev', 'tqdm', 'IPython'}
    out = run(f'{imports}\nimport sys; print({slow} & sys.modules.keys())')
    assert out.stdout == 'set()\n'


LOOP = '''from transformer_course.progress import progress
for _ in progress(range(3), desc="steps", mininterval=0): pass'''


SWITCHES = {'IN_TEST': '1'}, {'TRANSFORMER_COURSE_PROGRESS': '0'}


def test_progress_is_silent_outside_a_terminal():
    assert run(LOOP).stderr == ''


@pytest.mark.parametrize('env', [{}, *SWITCHES])
def test_progress_on_a_terminal(env):
    "A bar is drawn, unless one of the switches asks for silence."
    fcntl, pty, termios = map(pytest.importorskip, ('fcntl', 'pty', 'termios'))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))  # rows, columns
    try:
        run(LOOP, env, stderr=theirs)
        os.set_blocking(ours, False)
        try:
            shown = os.read(ours, 10_000).decode()
        except BlockingIOError:
            shown = ''
    finally:
        os.close(ours)
        os.close(theirs)
    assert ('steps' in shown) == (not env)


# ---------------------------------------------------------------- progress in a kernel

CELLS = [
    'from transformer_course.progress import progress\nimport time',
    'for i in progress(range(3), desc="short"): print(i)',
    'for i in progress(range(3), desc="long", delay=0, mininterval=0): print(i)',
    '''with progress(total=2, desc="by hand", delay=0, mininterval=0) as bar:
    bar.update(1); bar.set_postfix(loss=2.5)''',
    '''try:
    for i in progress(range(3), delay=0): raise RuntimeError
except RuntimeError: pass''',
]


def executed(cells, folder, monkeypatch):
    "Run cells in a kernel: the outputs that each keeps, and the HTML that was drawn meanwhile."
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    seen, plain = [], nbclient.NotebookClient.process_message

    def noted(self, msg, *rest):
        seen.append(msg)
        return plain(self, msg, *rest)

    monkeypatch.setattr(nbclient.NotebookClient, 'process_message', noted)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    where = {'metadata': {'path': str(folder)}}
    client = nbclient.NotebookClient(nb, timeout=120, kernel_name='python3', resources=where)
    client.execute()
    drawn = [m for m in seen if m['msg_type'] in ('display_data', 'update_display_data')]
    return [c.outputs for c in nb.cells], [m['content']['data']['text/html'] for m in drawn]


def test_progress_leaves_nothing_in_a_saved_notebook(monkeypatch, tmp_path):
    "A short loop shows no bar at all, a long one leaves an empty element, and prints stay."
    for name in SILENCED:
        monkeypatch.delenv(name, raising=False)
    outputs, drawn = executed(CELLS, tmp_path, monkeypatch)
    assert [o.text for o in outputs[1]] == ['0\n1\n2\n']
    for out in outputs[2:]:
        shown = [o for o in out if o.output_type == 'display_data']
        assert len(shown) == 1 and set(shown[0].data.values()) == {''}
        printed = ''.join(o.get('text', '') for o in out)
        assert printed == ('0\n1\n2\n' if out is outputs[2] else '')
    assert '\\r' not in json.dumps(outputs)
    assert not any(o.get('name') == 'stderr' for out in outputs for o in out)
    assert any('<progress' in d and 'long' in d for d in drawn)
    assert any('loss=2.5' in d for d in drawn)


WATCHED = 'from transformer_course.progress import watched_notebook\nprint(watched_notebook())'


@pytest.mark.parametrize('env', [{}, *SWITCHES])
def test_progress_can_be_silenced_in_a_kernel(monkeypatch, tmp_path, env):
    for name in SILENCED:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    outputs, drawn = executed([CELLS[0], CELLS[2], WATCHED], tmp_path, monkeypatch)
    assert bool(drawn) == (not env)
    assert outputs[2][0].text == f'{not env}\n'
