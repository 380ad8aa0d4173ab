"`tools/run_all.py` notices a notebook that does not keep its word."

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import run_all
from conftest import ROOT

LATE = '''import time
while time.process_time() < 3:
    pass'''
WORK = "import transformer_course\nassert 'package' in transformer_course.__file__"
ASKS = """from transformer_course.course.missing import at_hand, rest_needs
from transformer_course.wheels import Wheel, wheel_bytes
found = at_hand(wheel_bytes, Wheel('a-lost-package', '1.0', sha256='0' * 64), offline=True)
"""
WRITES = "from pathlib import Path\nPath('{}').write_text('x')"


def notebook(path, *code, takes='ten seconds'):
    "A notebook that states a time, with these cells of code."
    said = f'It takes {takes} on two CPU cores.'
    cell = dict(cell_type='code', execution_count=None, metadata={}, outputs=[])
    cells = [dict(cell_type='markdown', metadata={}, source=said, id='0')]
    cells += [dict(cell, source=source, id=str(i)) for i, source in enumerate(code, 1)]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return path


def git(folder, *command):
    "Run git in a folder, as somebody."
    somebody = '-c', 'user.name=somebody', '-c', 'user.email=somebody@localhost'
    subprocess.run(['git', *somebody, *command], cwd=folder, check=True)


@pytest.fixture
def tried(tmp_path, package, monkeypatch, capfd):
    "A function that runs a small notebook; whether it kept its word, and what was said."
    repository, installed = tmp_path / 'repository', tmp_path / 'package'
    repository.mkdir()
    git(repository, 'init', '-q')
    shutil.copytree(package, installed)
    monkeypatch.setattr(run_all, 'ROOT', repository)

    def run(*code, **kw):
        path = notebook(tmp_path / 'small.ipynb', *code, **kw)
        given = path, tmp_path / 'work', installed, sys.executable, 60
        # in a thread: a browser test of this session may have left an event loop in the main one
        with ThreadPoolExecutor(1) as thread:
            good = thread.submit(run_all.run, *given).result()
        return good, ''.join(capfd.readouterr())

    run.places = {'its folder': '.', 'the package': installed, 'the repository': repository}
    return run


def test_a_good_notebook(tried):
    good, said = tried(WORK, 'print(1)')
    assert good and 'states 10 s: ok' in said


def test_a_notebook_without_its_model(tried):
    "What comes after the line that asks for it is left out; without that line it fails."
    needs = 'raise ValueError("this cell needs the package")'
    good, said = tried(WORK, ASKS + 'rest_needs(found)', needs)
    assert good and 'ok' in said
    good, said = tried(WORK, ASKS, needs)
    assert not good and 'this cell needs the package' in said


def test_the_kernel_is_gone_afterwards(tried, monkeypatch):
    "A hundred notebooks would otherwise leave a hundred kernels in memory."
    managers, make = [], run_all.kernel_client

    def noted(*args):
        client = make(*args)
        managers.append(client.km)
        return client

    monkeypatch.setattr(run_all, 'kernel_client', noted)
    assert tried('1')[0]
    [manager] = managers
    assert not manager.has_kernel


def test_a_cell_that_fails_whatever_its_directive(tried):
    good, said = tried(WORK, '#| slow\n1 / 0')
    assert not good and 'cell 2 fails' in said and 'ZeroDivisionError' in said


def test_a_notebook_that_takes_longer_than_it_says(tried):
    good, said = tried(LATE, takes='one second')
    assert not good and 'takes more than 1.3 times as long as it says' in said


@pytest.mark.parametrize('place', ['its folder', 'the package', 'the repository'])
def test_a_notebook_that_writes(tried, place):
    good, said = tried(WRITES.format(f'{tried.places[place]}/new.txt'))
    assert not good and f'it writes in {place}: new.txt' in said


def test_a_file_of_the_repository_that_changes_twice(tried):
    "It was changed before, so git's status alone stays the same."
    file = tried.places['the repository'] / 'new.txt'
    file.write_text('a')
    git(file.parent, 'add', 'new.txt')
    git(file.parent, 'commit', '-q', '-m', 'a file')
    file.write_text('b')
    good, said = tried(WRITES.format(file))
    assert not good and 'it writes in the repository: the changes' in said


def test_without_a_network():
    "The loopback stays, which kernels need; nothing else does."
    code = '''import socket, sys, run_all
try:
    run_all.cut_network()
except (OSError, AttributeError) as e:
    sys.exit(f'skip: {e}')
here = socket.create_server(('127.0.0.1', 0))
socket.create_connection(here.getsockname()).close()
try:
    socket.create_connection(('192.0.2.1', 80), timeout=5)
except OSError as e:
    print('unreachable' in str(e))'''
    command = [sys.executable, '-c', code]
    done = subprocess.run(command, cwd=ROOT / 'tools', capture_output=True, text=True)
    if done.stderr.startswith('skip'):
        pytest.skip(done.stderr)
    assert done.stdout.strip() == 'True', done.stderr


def test_an_unknown_name():
    command = [sys.executable, ROOT / 'tools' / 'run_all.py', '99_nothing']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no notebook '99_nothing'" in done.stderr
