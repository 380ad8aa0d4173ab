"The package as a wheel, built and unpacked outside the repository, as its users have it."

import os
import shutil
import subprocess
import sys

from cells import ROOT

SOURCES = 'settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in'
SOURCES += 'README.md', 'CHANGELOG.md', 'CITATION.cff', 'LICENSE'
QUIET = '--quiet', '--disable-pip-version-check', '--no-deps'


def call(command, **kw):
    "What a command prints; a RuntimeError where it fails."
    quiet = dict(capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    done = subprocess.run([str(part) for part in command], **quiet, **kw)
    if done.returncode:
        raise RuntimeError(f'{command}\n{done.stdout}\n{done.stderr}')
    return done.stdout


def build(folder):
    "A wheel, as a release has it: from an archive of the sources, made in an empty folder."
    for name in SOURCES:
        shutil.copy(ROOT / name, folder / name)
    skip = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / 'transformer_course', folder / 'transformer_course', ignore=skip)
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    pack = 'from setuptools.build_meta import build_sdist; build_sdist("dist")'
    call([sys.executable, '-c', pack], cwd=folder, env=env)
    sources = next((folder / 'dist').glob('*.tar.gz'))
    make = sys.executable, '-m', 'pip', 'wheel', *QUIET, '--no-build-isolation'
    call([*make, '-w', folder / 'dist', sources], env=env)
    return next((folder / 'dist').glob('*.whl'))


def install(wheel, folder):
    "Put the wheel, and none of its requirements, into a folder for PYTHONPATH."
    put = sys.executable, '-m', 'pip', 'install', *QUIET, '--no-index', '--no-compile'
    call([*put, '--target', folder, wheel])
