"""The course's tests, in the order in which they fail fastest: the command that the README names.

    python tools/test.py                 everything
    python tools/test.py sync            only: notebooks clean; modules, README.md, sidebar in step
    python tools/test.py notebooks       only: every notebook runs (nbdev_test)
    python tools/test.py pytest          only: the tests in tests/

Stops at the first stage that fails and exits with its exit code. Writes nothing in the work tree.
REQUIRE_BROWSER=1 makes the tests that need a browser fail instead of skip where there is none.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from cells import ROOT

WORKERS = 2  # notebooks, and files of tests, at a time
LIMIT = 30 * 60  # seconds for all notebooks: nbdev_test has no limit of its own
BUDGET = 120  # seconds for one notebook
BEGAN = time.time()


def environment(**extra):
    "The environment of a stage: no records, threads shared between the workers."
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'TRANSFORMER_COURSE_RECORD')}
    bin_path = str(Path(sys.executable).parent)
    return {**env, 'PATH': bin_path + os.pathsep + env.get('PATH', ''), **extra}


PIPES = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
TEXT = dict(text=True, encoding='utf-8', errors='replace')


def run(command, limit=None, **kw):
    "Run a command, at most `limit` seconds, with its children; (exit code, what it printed)."
    lines, late = [], []
    process = subprocess.Popen(command, start_new_session=True, **PIPES, **TEXT, **kw)

    def stop():
        late.append(f'timed out after {limit} s')
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit or 0, stop)
    if limit:
        timer.start()
    try:
        for line in process.stdout:
            lines.append(line)
            print(line, end='', flush=True)
        code = process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        timer.cancel()
    if late:
        print(late[0], flush=True)
        code = 124
    elif code < 0:
        print(f'\nkilled by {signal.Signals(-code).name}', flush=True)
        code = 128 - code
    return code, ''.join(lines)


def files(folder, *patterns):
    "{path: bytes} of the files below `folder` that match the patterns."
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for pattern in patterns
        for p in folder.glob(pattern)
        if '.ipynb_checkpoints' not in p.parts
    }


GENERATED = 'nbs/**/*.ipynb', 'transformer_course/**/*.py'


def regenerated(tmp):
    "Clean and export the notebooks in a copy at `tmp`; what is wrong if that changes anything."
    before = files(ROOT, *GENERATED)
    others = files(ROOT, 'settings.ini', 'setup.py', 'pyproject.toml')
    for name, data in {**before, **others}.items():
        (tmp / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp / name).write_bytes(data)
    for command in ('nbdev_clean', 'nbdev_export'):
        code, _ = run([command], cwd=tmp, env=environment(PYTHONPATH=str(tmp)))
        if code:
            return f'{command} failed'
        after = files(tmp, *GENERATED)
        changed = [n for n in before.keys() | after.keys() if before.get(n) != after.get(n)]
        if changed:
            names = ', '.join(sorted(changed))
            return f'{command} changes {names}: run `{command}` and commit what it writes'
    return None


def pages_made():
    "Whether README.md and the sidebar are what the notebooks make of them; if not, the mend."
    import build_docs
    import build_readme

    nbs = ROOT / 'nbs'
    index = json.loads((nbs / 'index.ipynb').read_text(encoding='utf-8'))
    text, pictures = build_readme.readme(index)
    stale, _ = build_readme.out_of_date({'README.md': text.encode(), **pictures})
    if stale:
        return f'{stale[0]} is not what nbs/index.ipynb makes: run `python tools/build_readme.py`'
    if (nbs / 'sidebar.yml').read_text(encoding='utf-8') != build_docs.sidebar(nbs):
        mend = 'run `python tools/build_docs.py --sidebar`'
        return f'nbs/sidebar.yml does not list the notebooks there are: {mend}'
    return None


def sync():
    "Notebooks are clean; modules, README.md and the sidebar are what the notebooks make them."
    with tempfile.TemporaryDirectory(prefix='course-sync-') as tmp:
        wrong = regenerated(Path(tmp)) or pages_made()
    print(wrong or 'notebooks clean; modules, README.md and sidebar in sync')
    return int(bool(wrong))


def notebooks():
    "Every notebook runs, from top to bottom; the time each takes is printed."
    threads = str(max(1, (os.cpu_count() or 2) // WORKERS))
    env = environment(
        IN_TEST='1',
        OMP_NUM_THREADS=threads,
        MKL_NUM_THREADS=threads,
        TRANSFORMER_COURSE_PROGRESS='0',
        PYTHONUNBUFFERED='1',
    )
    command = ['nbdev_test', '--n_workers', str(WORKERS), '--timing', '--do_print']
    code, printed = run(command, limit=LIMIT, cwd=ROOT, env=env)
    for name, seconds in re.findall(r'^(\S+\.ipynb): (\d+) secs$', printed, re.M):
        if int(seconds) > BUDGET:
            print(f'over budget: {name} took {seconds} s, its budget is {BUDGET} s')
    if not code and 'Success.' not in printed:
        code = 1
    return code


def tests():
    "What cannot live in a notebook: the command, the site and JupyterLab in a browser, the wheel."
    threads = max(1, (os.cpu_count() or 1) // WORKERS)
    env = environment(COURSE_TESTS_BEGAN=str(BEGAN), OMP_NUM_THREADS=str(threads))
    # the tests of one file share what is dear: the site, a trained run
    share = ['-n', str(WORKERS), '--dist', 'loadfile']
    return run([sys.executable, '-m', 'pytest', *share], cwd=ROOT, env=env)[0]


def tree():
    "What git sees as changed, or None outside a repository."
    command = ['git', 'status', '--porcelain']
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout
    except (OSError, subprocess.CalledProcessError):
        return None


STAGES = {'sync': sync, 'notebooks': notebooks, 'pytest': tests}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('stage', nargs='?', choices=STAGES, help='default: all')
    args = parser.parse_args()
    before = tree()
    for name in [args.stage] if args.stage else STAGES:
        print(f'== {name}: {STAGES[name].__doc__}', flush=True)
        begun = time.time()
        code = STAGES[name]()
        if code or name != 'pytest':
            how = 'failed' if code else 'passed'
            print(f'== {name}: {how} in {time.time() - begun:.0f} s', flush=True)
        if code:
            sys.exit(code)
    if before is not None and tree() != before:
        print(f'the work tree changed while the tests ran:\n{tree()}', flush=True)
        if os.environ.get('CI'):
            sys.exit(1)


if __name__ == '__main__':
    main()
