"""Two chapters are run in JupyterLab, in a real browser, as a learner would: Run All Cells, save.

Slow and GPU cells are left out, as nbdev_test leaves them out. Jupyter gets folders of its own:
nothing of the user's configuration is read or written.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from cells import code_of, read_cells, skips
from conftest import ROOT

WANTED = ['00_data.ipynb', '03_attention.ipynb']
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


def copy_notebook(name, folder):
    "A copy of a notebook without outputs and without the cells that are not for every machine."
    nb = json.loads((ROOT / 'nbs' / name).read_text(encoding='utf-8'))
    nb['cells'] = [c for c in nb['cells'] if not skips(''.join(c['source']))]
    for cell in nb['cells']:
        if cell['cell_type'] == 'code':
            cell['outputs'] = []
    (folder / name).write_text(json.dumps(nb), encoding='utf-8')


def free_port():
    "A port that nobody listens on."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def start(work, port, log):
    "Start JupyterLab on the notebooks in `work`."
    for name, values in SETTINGS.items():
        path = work / 'settings' / '@jupyterlab' / f'{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    env |= {name: str(work / folder) for name, folder in FOLDERS.items()}
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


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A JupyterLab server: its address and the folder it serves."
    pytest.importorskip('jupyterlab')
    work = tmp_path_factory.mktemp('lab')
    (work / 'nbs').mkdir()
    for name in WANTED:
        copy_notebook(name, work / 'nbs')
    port, log = free_port(), work / 'lab.log'
    server = start(work, port, log)
    try:
        wait_for(server, port, log)
        yield f'http://127.0.0.1:{port}', work / 'nbs'
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.mark.parametrize('name', WANTED)
def test_run_all_cells(lab, browser, name):
    address, folder = lab
    context = browser.new_context(viewport={'width': 1400, 'height': 1000})
    page = context.new_page()
    page.goto(f'{address}/lab/tree/{name}?token=t&reset', wait_until='domcontentloaded')
    page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=90_000)
    page.wait_for_function(rf'/\| Idle/.test({STATUS})', timeout=120_000)
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
    page.wait_for_function(DONE, timeout=600_000)
    page.keyboard.press('Control+s')
    page.wait_for_function("!document.querySelector('.lm-TabBar-tab.jp-mod-dirty')", timeout=30_000)
    code = code_of(read_cells(folder / name))
    errors = [o for c in code for o in c['outputs'] if o['output_type'] == 'error']
    assert not errors, errors[0]['evalue']
    counts = [c['execution_count'] for c in code]
    assert counts == sorted(counts) and all(counts), 'every cell ran, in order'
    assert sum(bool(c['outputs']) for c in code) >= 3
    context.close()
