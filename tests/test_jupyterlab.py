"""Notebooks are run in JupyterLab, in a real browser, as a learner would: Run All Cells, save.

They are run as they are, all cells, in a folder that is not the repository, with the package
installed from a wheel. Two chapters always, and two more that each commit draws anew;
`COURSE_LAB=all` runs every notebook, `COURSE_LAB="03_attention support/ledger"` only these.
Jupyter gets folders of its own: nothing of the user's configuration is read or written.
"""

import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest
from cells import code_of, notebook_paths, read_cells
from conftest import ROOT
from execute import cpu_seconds
from run_all import UNSTATED, changed, contents, known, late, learner, status
from times import stated

ALWAYS = ['09_training', '20_induction']  # they had the longest cells
MOST = 2  # times the stated time: `tools/run_all.py` has the strict factor, on a machine at rest


def drawn(number):
    "Some more chapters: the same for a commit, others for the next."
    chapters = [p.stem for p in (ROOT / 'nbs').glob('[0-9][0-9]_*.ipynb')]
    git = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True)
    texts = b''.join(p.read_bytes() for p in notebook_paths()) if git.returncode else git.stdout
    seed = hashlib.sha256(texts).hexdigest()
    return random.Random(seed).sample(sorted(set(chapters) - set(ALWAYS)), number)


def wanted(asked):
    "The notebooks to run, by name."
    every = {known(path): path for path in notebook_paths()}
    names = list(every) if asked == 'all' else asked.split() or [*ALWAYS, *drawn(2)]
    return {name: every[name] for name in names}


WANTED = wanted(os.environ.get('COURSE_LAB', ''))
SETTINGS = {
    # cells off the screen stay in the page
    'notebook-extension/tracker': {'windowingMode': 'none'},
    'apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False},
}
FOLDERS = {
    'JUPYTER_CONFIG_DIR': 'config',
    'JUPYTER_DATA_DIR': 'data',
    'JUPYTER_RUNTIME_DIR': 'runtime',
    'IPYTHONDIR': 'ipython',
    'JUPYTERLAB_SETTINGS_DIR': 'settings',
    'JUPYTERLAB_WORKSPACES_DIR': 'workspaces',
}
OPTIONS = (
    '--no-browser --allow-root --ip=127.0.0.1 --ServerApp.port_retries=0 '
    '--IdentityProvider.token=t --LabApp.news_url=None --LabApp.extension_manager=readonly '
    '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate'
).split()
# the status bar's "| Idle": the toolbar says idle before there is a kernel
STATUS = "document.querySelector('#jp-bottom-panel, #jp-main-statusbar')?.textContent || ''"
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.textContent)"
FAILED = "document.querySelector('[data-mime-type=\"application/vnd.jupyter.error\"]')"
ALL_RAN = rf'p.length && (p.every(t => /\[\d+\]/.test(t)) || {FAILED})'
DONE = f'(() => {{ const p = {PROMPTS}; return {ALL_RAN} }})()'


def free_port():
    "A port that nobody listens on."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def start(work, package, port, log):
    "Start JupyterLab on the notebooks in `work`, for somebody who has installed the package."
    for name, values in SETTINGS.items():
        path = work / 'settings' / '@jupyterlab' / f'{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    env = learner(work, package) | {name: str(work / folder) for name, folder in FOLDERS.items()}
    env['JUPYTER_PREFER_ENV_PATH'] = '1'
    where = [f'--port={port}', f'--ServerApp.root_dir={work / "nbs"}']
    command = [sys.executable, '-m', 'jupyter', 'lab', *OPTIONS, *where]
    with open(log, 'w') as out:
        pipes = dict(stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        return subprocess.Popen(command, env=env, cwd=work, **pipes)


def wait_for(server, port, log, seconds=120):
    "Wait until the server answers."
    begun = time.time()
    while True:
        try:
            urllib.request.urlopen(f'http://127.0.0.1:{port}/api/status?token=t', timeout=1)
            return
        except OSError:
            assert server.poll() is None and time.time() - begun < seconds, log.read_text()
            time.sleep(0.2)


def ask(url, method='GET'):
    "What JupyterLab's server answers."
    request = urllib.request.Request(url, method=method, headers={'Authorization': 'token t'})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read() or 'null')


class Lab:
    "A JupyterLab server, the folder it serves, and the kernels it has started."

    def __init__(self, server, address, folder):
        self.server, self.address, self.folder = server, address, folder

    def place(self, name):
        "The folder of a notebook, which holds nothing else: (folder, file's name)."
        folder = self.folder / name.replace('/', '-')
        folder.mkdir()
        shutil.copy(WANTED[name], folder)
        return folder, WANTED[name].name

    def end_kernels(self):
        "End all kernels; CPU seconds that they have used."
        seconds = 0
        for session in ask(f'{self.address}/api/sessions'):
            mark = session['kernel']['id']
            children = psutil.Process(self.server.pid).children(recursive=True)
            kernels = [p for p in children if any(mark in part for part in p.cmdline())]
            seconds += sum(cpu_seconds(p.pid) for p in kernels)
            ask(f'{self.address}/api/sessions/{session["id"]}', 'DELETE')
        return seconds


@pytest.fixture(scope='module')
def lab(tmp_path_factory, package):
    "JupyterLab, in an empty folder outside the repository."
    pytest.importorskip('jupyterlab')
    work = tmp_path_factory.mktemp('lab')
    (work / 'nbs').mkdir()
    port, log = free_port(), work / 'lab.log'
    server = start(work, package, port, log)
    try:
        wait_for(server, port, log)
        yield Lab(server, f'http://127.0.0.1:{port}', work / 'nbs')
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def run_all_cells(browser, url):
    "Open a notebook, choose Run All Cells, save; the seconds until the last cell ended or failed."
    context = browser.new_context(viewport={'width': 1400, 'height': 1000})
    page = context.new_page()
    page.goto(url, wait_until='domcontentloaded')
    page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=90_000)
    page.wait_for_function(rf'/\| Idle/.test({STATUS})', timeout=120_000)
    begun = time.time()
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
    page.wait_for_function(DONE, timeout=600_000)
    seconds = time.time() - begun
    page.keyboard.press('Control+s')
    page.wait_for_function("!document.querySelector('.lm-TabBar-tab.jp-mod-dirty')", timeout=30_000)
    context.close()
    return seconds


def check_cells(path):
    "Every cell of a saved notebook ran, in order, and none failed."
    code = code_of(read_cells(path))
    errors = [o for c in code for o in c['outputs'] if o['output_type'] == 'error']
    assert not errors, errors[0]['evalue']
    counts = [c['execution_count'] for c in code]
    assert counts == sorted(counts) and all(counts), 'every cell ran, in order'
    assert len(code) == len(set(counts)) and not any(
        o.get('name') == 'stderr' for c in code for o in c['outputs']
    ), 'a cell warns'


@pytest.mark.parametrize('name', WANTED)
def test_run_all(lab, browser, package, name):
    "No error, no warning, in the time that the notebook states, and nothing written."
    folder, file = lab.place(name)
    before = contents(package), status()
    seconds = run_all_cells(browser, f'{lab.address}/lab/tree/{folder.name}/{file}?token=t&reset')
    cpu = lab.end_kernels()
    check_cells(folder / file)
    left = {p.name for p in folder.iterdir()} - {file, '.ipynb_checkpoints'}
    assert not left, f'{name} leaves {left} beside itself'
    after = contents(package), status()
    assert not [changed(*pair) for pair in zip(before, after) if pair[0] != pair[1]]
    promised = stated(read_cells(folder / file)) or UNSTATED
    took = f'{name}: {seconds:.0f} s, CPU {cpu:.0f} s, of {promised:g} s that it states'
    print(took)
    assert cpu, 'the kernel was not found'
    assert not late(seconds, cpu, promised, MOST), took
