"The wheel works outside the repository, and all places agree on the version."

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
from as_wheel import QUIET
from cells import settings
from conftest import ROOT
from release_notes import section
from release_notes import wrong as wrong_with

PACKAGE = ROOT / 'transformer_course'
ALONE = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}  # nothing but the wheel


def run(*command, **kw):
    "What a command prints; it must succeed."
    command = [str(part) for part in command]
    quiet = dict(capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    done = subprocess.run(command, env=ALONE, **quiet, **kw)
    assert done.returncode == 0, f'{command}\n{done.stdout}\n{done.stderr}'
    return done.stdout


def modules():
    "Every module of the package, as its name says it: 'transformer_course.course.claims'."
    paths = [p for p in PACKAGE.rglob('*.py') if p.stem not in ('__init__', '_modidx')]
    return sorted('.'.join(p.relative_to(ROOT).with_suffix('').parts) for p in paths)


@pytest.fixture(scope='module')
def python(wheel, tmp_path_factory):
    """A fresh environment with the wheel in it.

    The requirements are borrowed from this environment, the editable install is not.
    """
    home = tmp_path_factory.mktemp('elsewhere')
    venv.EnvBuilder(with_pip=False, symlinks=True).create(home / 'venv')
    python = home / 'venv' / 'bin' / 'python'
    pip = sys.executable, '-m', 'pip', '--python', python
    run(*pip, 'install', *QUIET, '--no-index', wheel)
    site = run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip()
    # a path in a .pth file is searched, but the .pth files in it are not read, and the editable
    # install is one of them
    borrowed = {sysconfig.get_path('purelib'): 1, sysconfig.get_path('platlib'): 1}
    with open(f'{site}/borrowed.pth', 'w') as f:
        f.write('\n'.join(borrowed))
    return python


def test_contents(wheel):
    "Every module, every file of data, the licence, and nothing else."
    names = set(zipfile.ZipFile(wheel).namelist())
    kept = [p for p in PACKAGE.rglob('*') if p.suffix in ('.py', '.json')]
    assert {p.relative_to(ROOT).as_posix() for p in kept} <= names
    assert 'transformer_course/course/claims.json' in names
    assert all(n.startswith(('transformer_course/', 'transformer_course-')) for n in names)
    assert any(n.endswith('LICENSE') for n in names)


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    text = archive.read(next(n for n in archive.namelist() if n.endswith('METADATA'))).decode()
    needed = set(re.findall(r'^Requires-Dist: ([\w-]+)[^;\n]*$', text, re.M))
    assert {'torch', 'numpy', 'safetensors', 'tiktoken'} <= needed
    tools = {'nbdev', 'fastcore', 'execnb', 'jupyterlab', 'pytest', 'ruff'}
    assert not tools & needed, 'development tools are extras'


def test_versions_agree(wheel, python, tmp_path):
    code = '''import importlib.metadata, transformer_course
print(transformer_course.__version__, importlib.metadata.version("transformer_course"))'''
    version = settings()['version']
    assert run(python, '-c', code, cwd=tmp_path).split() == [version, version]
    assert wheel.name.startswith(f'transformer_course-{version}-')


def test_a_release_of_this_version_may_go_out():
    tell = sys.executable, ROOT / 'tools' / 'release_notes.py'
    assert len(run(*tell).splitlines()) > 5
    wrong = subprocess.run([*tell, 'v0.0.1'], capture_output=True, text=True)
    assert wrong.returncode == 1 and f"tag it v{settings()['version']}" in wrong.stderr
    text = '# Changelog\n\n## 0.2\n\nnew\n\n## 0.1\n\nold\n'
    assert [section(text, v) for v in ('0.2', '0.1', '0.3', '0')] == ['new', 'old', '', '']
    assert len(list(wrong_with('v1', '2', 'version: 3\n', ''))) == 3


def test_every_module_imports_elsewhere(python, tmp_path):
    code = f'''
import importlib, sys
for name in {modules()}:
    module = importlib.import_module(name)
    assert module.__file__.startswith(sys.prefix), module.__file__
heavy = sorted({{'nbdev', 'fastcore', 'IPython', 'matplotlib', 'transformers'}} & set(sys.modules))
assert not heavy, f'imported without need: {{heavy}}'
'''
    run(python, '-W', 'error::DeprecationWarning:transformer_course', '-c', code, cwd=tmp_path)


def test_the_list_of_claims_is_there(python, tmp_path):
    "A list is data: without it in the wheel, the ledger could not be imported."
    code = 'from transformer_course.course.ledger import CLAIMS; print(len(CLAIMS))'
    assert int(run(python, '-c', code, cwd=tmp_path)) >= 45


def test_command(python, tmp_path):
    command = python.parent / 'transformer-course'
    assert 'train' in run(command, '--help', cwd=tmp_path)
    done = subprocess.run(
        [command, 'sample', '--out_dir', 'nowhere'],
        capture_output=True,
        text=True,
        env=ALONE,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 2 and 'nowhere' in done.stderr and 'Traceback' not in done.stderr
