"Fixtures that the tests share: where things are, and a browser if there is one."

import os
import shutil
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tools'))
os.environ.setdefault('OMP_NUM_THREADS', str(os.cpu_count() or 1))
os.environ.setdefault('PYDEVD_DISABLE_FILE_VALIDATION', '1')
os.environ.pop('TRANSFORMER_COURSE_RECORD', None)  # tests leave the recorded results as they are
BROWSERS = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome'
CHROMIUM_ARGS = (
    '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
    '--disable-component-update --disable-sync'
).split()


def missing(what):
    "Skip the test, or fail it where REQUIRE_BROWSER says that everything must be there."
    if os.environ.get('REQUIRE_BROWSER', '') not in ('', '0'):
        pytest.fail(f'{what}, and REQUIRE_BROWSER is set')
    pytest.skip(what)


def typed(words, capsys):
    "Exit status, output and errors of a command line, in this process; never a traceback."
    from transformer_course import cli

    capsys.readouterr()
    try:
        code = cli.main(words)
    except SystemExit as e:
        code = e.code
    said = capsys.readouterr()
    assert 'Traceback' not in said.err
    return code, said.out, said.err


@pytest.fixture(autouse=True)
def same_luck_every_time():
    "Peers' models draw their weights from torch's global generator."
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope='session')
def wheel(tmp_path_factory):
    "The package as a wheel, built once."
    import as_wheel

    return as_wheel.build(tmp_path_factory.mktemp('source'))


@pytest.fixture(scope='session')
def package(wheel, tmp_path_factory):
    "A folder for PYTHONPATH into which the wheel is installed."
    import as_wheel

    folder = tmp_path_factory.mktemp('package')
    as_wheel.install(wheel, folder)
    return folder


@pytest.fixture(scope='session')
def root():
    "The repository's root."
    return ROOT


@pytest.fixture(scope='session')
def shakespeare():
    "A copy of tiny shakespeare: what TRANSFORMER_COURSE_TEXT names, or one beside the repository."
    places = [
        os.environ.get('TRANSFORMER_COURSE_TEXT', ''),
        *sorted(ROOT.parent.glob('shared/data/tinyshakespeare/*.txt')),
    ]
    found = [Path(p) for p in places if p and Path(p).is_file()]
    if not found:
        pytest.skip('no local copy of tiny shakespeare; name one with TRANSFORMER_COURSE_TEXT')
    return found[0]


@pytest.fixture(scope='session')
def chromium_path():
    "An installed Chromium or Chrome."
    places = [os.environ.get('CHROMIUM_PATH'), *map(shutil.which, BROWSERS)]
    found = next(filter(None, places), None)
    if not found:
        missing('no Chromium found: install it or name it with CHROMIUM_PATH')
    return found


@pytest.fixture(scope='session')
def browser(chromium_path):
    "A headless browser."
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing('playwright is not installed')
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path, args=CHROMIUM_ARGS)
        yield browser
        browser.close()


def pytest_terminal_summary(terminalreporter):
    "Under tools/test.py, the time of all its stages."
    began = os.environ.get('COURSE_TESTS_BEGAN')
    if began:
        seconds = time.time() - float(began)
        terminalreporter.write_line(f'sync, notebooks and pytest together: {seconds:.0f} s')
