"The wheel works outside the repository, and all places agree on the version."

import configparser, re, shutil, subprocess, sys, sysconfig, venv, zipfile
import pytest
from conftest import ROOT


def settings():
    config = configparser.ConfigParser(delimiters=['='])
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def run(*command, **kw):
    done = subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
        **kw,
    )
    assert done.returncode == 0, f'{command}\n{done.stdout}\n{done.stderr}'
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "A wheel built from a copy of the sources, so that no build folder is left in the repository."
    source = tmp_path_factory.mktemp('source')
    for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    shutil.copytree(
        ROOT / 'transformer_course',
        source / 'transformer_course',
        ignore=shutil.ignore_patterns('__pycache__'),
    )
    run(
        sys.executable,
        '-m',
        'pip',
        'wheel',
        '--quiet',
        '--disable-pip-version-check',
        '--no-deps',
        '--no-build-isolation',
        '-w',
        source / 'dist',
        source,
    )
    return next((source / 'dist').glob('*.whl'))


@pytest.fixture(scope='module')
def python(wheel, tmp_path_factory):
    "A fresh environment with the wheel in it; the requirements are borrowed from this environment, the editable install is not."
    home = tmp_path_factory.mktemp('elsewhere')
    venv.EnvBuilder(with_pip=False, symlinks=True).create(home / 'venv')
    python = home / 'venv' / 'bin' / 'python'
    run(
        sys.executable,
        '-m',
        'pip',
        '--python',
        python,
        'install',
        '--quiet',
        '--disable-pip-version-check',
        '--no-deps',
        '--no-index',
        wheel,
    )
    site = run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip()
    # a path in a .pth file is searched, but the .pth files in it (the editable install's among them) are not read
    with open(f'{site}/borrowed.pth', 'w') as f:
        f.write(
            '\n'.join(dict.fromkeys([sysconfig.get_path('purelib'), sysconfig.get_path('platlib')]))
        )
    return python


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f'transformer_course/{p.name}' for p in (ROOT / 'transformer_course').glob('*.py')}
    assert modules <= set(names)
    assert all(n.startswith(('transformer_course/', 'transformer_course-')) for n in names)
    assert any(n.endswith('LICENSE') for n in names)


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    text = archive.read(next(n for n in archive.namelist() if n.endswith('METADATA'))).decode()
    needed = re.findall(r'^Requires-Dist: ([\w-]+)[^;\n]*$', text, re.M)
    assert {'torch', 'numpy', 'safetensors', 'tiktoken'} <= set(needed)
    assert not {'nbdev', 'fastcore', 'execnb', 'jupyterlab', 'pytest'} & set(needed), (
        'development tools are extras'
    )


def test_versions_agree(wheel, python, tmp_path):
    code = 'import transformer_course, importlib.metadata as m; print(transformer_course.__version__, m.version("transformer_course"))'
    version = settings()['version']
    assert run(python, '-c', code, cwd=tmp_path).split() == [version, version]
    assert wheel.name.startswith(f'transformer_course-{version}-')


def test_every_module_imports_elsewhere(python, tmp_path):
    modules = sorted(
        p.stem
        for p in (ROOT / 'transformer_course').glob('*.py')
        if p.stem not in ('__init__', '_modidx')
    )
    code = f'''
import importlib, sys
for name in {modules}:
    module = importlib.import_module('transformer_course.' + name)
    assert module.__file__.startswith(sys.prefix), module.__file__
heavy = sorted({{'nbdev', 'fastcore', 'IPython', 'matplotlib', 'transformers'}} & set(sys.modules))
assert not heavy, f'imported without need: {{heavy}}'
'''
    run(python, '-W', 'error::DeprecationWarning:transformer_course', '-c', code, cwd=tmp_path)


def test_command(python, tmp_path):
    command = python.parent / 'transformer-course'
    assert 'train' in run(command, '--help', cwd=tmp_path)
    done = subprocess.run(
        [command, 'sample', '--out_dir', 'nowhere'],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 2 and 'nowhere' in done.stderr and 'Traceback' not in done.stderr
