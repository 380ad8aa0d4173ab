"""Two chapters are run in JupyterLab, in a real browser, as a learner would: Run All Cells, save.

Slow and GPU cells are left out, as nbdev_test leaves them out. Jupyter gets folders of its own: nothing of the user's
configuration is read or written.
"""

import json, os, re, shutil, socket, subprocess, sys, time, urllib.request
import pytest
from conftest import ROOT

WANTED = ['00_data.ipynb', '03_attention.ipynb']
SETTINGS = {
    'notebook-extension/tracker': {
        'windowingMode': 'none'
    },  # cells off the screen stay in the page
    'apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False},
}
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.textContent)"


def copy_notebook(name, folder):
    "A copy of a notebook without outputs and without the cells that are not for every machine."
    nb = json.loads((ROOT / 'nbs' / name).read_text(encoding='utf-8'))
    nb['cells'] = [
        c
        for c in nb['cells']
        if not re.search(
            r'^#\|\s*(slow|cuda)\b|^#\|\s*eval:\s*false|nbdev_export\(', ''.join(c['source']), re.M
        )
    ]
    for cell in nb['cells']:
        if cell['cell_type'] == 'code':
            cell['outputs'] = []
    (folder / name).write_text(json.dumps(nb), encoding='utf-8')


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A JupyterLab server: its address and the folder it serves."
    pytest.importorskip('jupyterlab')
    work = tmp_path_factory.mktemp('lab')
    (work / 'nbs').mkdir()
    for name in WANTED:
        if (ROOT / 'nbs' / name).exists():
            copy_notebook(name, work / 'nbs')
    for name, values in SETTINGS.items():
        path = work / 'settings' / '@jupyterlab' / f'{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    env.update(
        JUPYTER_CONFIG_DIR=str(work / 'config'),
        JUPYTER_DATA_DIR=str(work / 'data'),
        JUPYTER_RUNTIME_DIR=str(work / 'runtime'),
        IPYTHONDIR=str(work / 'ipython'),
        JUPYTERLAB_SETTINGS_DIR=str(work / 'settings'),
        JUPYTERLAB_WORKSPACES_DIR=str(work / 'workspaces'),
        JUPYTER_PREFER_ENV_PATH='1',
    )
    log = work / 'lab.log'
    command = [
        sys.executable,
        '-m',
        'jupyter',
        'lab',
        '--no-browser',
        '--allow-root',
        '--ip=127.0.0.1',
        f'--port={port}',
        '--ServerApp.port_retries=0',
        '--IdentityProvider.token=t',
        f'--ServerApp.root_dir={work / "nbs"}',
        '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate',
        '--LabApp.news_url=None',
        '--LabApp.extension_manager=readonly',
    ]
    with open(log, 'w') as out:
        server = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=work
        )
    try:
        begun = time.time()
        while True:
            try:
                urllib.request.urlopen(f'http://127.0.0.1:{port}/api/status?token=t', timeout=1)
                break
            except OSError:
                assert server.poll() is None and time.time() - begun < 120, log.read_text()
                time.sleep(0.2)
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
    if not (folder / name).exists():
        pytest.skip(f'nbs/{name} is not written yet')
    context = browser.new_context(viewport={'width': 1400, 'height': 1000})
    page = context.new_page()
    page.goto(f'{address}/lab/tree/{name}?token=t&reset', wait_until='domcontentloaded')
    page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=90_000)
    # the status bar's "| Idle": the toolbar says idle before there is a kernel
    page.wait_for_function(
        "/\\| Idle/.test(document.querySelector('#jp-bottom-panel, #jp-main-statusbar')?.textContent || '')",
        timeout=120_000,
    )
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
    page.wait_for_function(
        f"(() => {{ const p = {PROMPTS}; return p.length && (p.every(t => /\\[\\d+\\]/.test(t)) || "
        "document.querySelector('[data-mime-type=\"application/vnd.jupyter.error\"]')) })()",
        timeout=600_000,
    )
    page.keyboard.press('Control+s')
    page.wait_for_function("!document.querySelector('.lm-TabBar-tab.jp-mod-dirty')", timeout=30_000)
    code = [
        c
        for c in json.loads((folder / name).read_text(encoding='utf-8'))['cells']
        if c['cell_type'] == 'code' and ''.join(c['source']).strip()
    ]
    errors = [o for c in code for o in c['outputs'] if o['output_type'] == 'error']
    assert not errors, errors[0]['evalue']
    counts = [c['execution_count'] for c in code]
    assert counts == sorted(counts) and all(counts), 'every cell ran, in order'
    assert sum(bool(c['outputs']) for c in code) >= 3
    context.close()
