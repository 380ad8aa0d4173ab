"""The course's tests, in the order in which they fail fastest. This is the command that the README names.

    python tools/test.py                 everything
    python tools/test.py sync            only: notebooks are clean, modules and README.md and sidebar match them
    python tools/test.py notebooks       only: every notebook runs (nbdev_test)
    python tools/test.py pytest          only: the tests in tests/

Stops at the first stage that fails and exits with its exit code. Writes nothing in the work tree.
REQUIRE_BROWSER=1 makes the tests that need a browser fail instead of skip where there is none.
"""

import argparse, os, re, shutil, signal, subprocess, sys, tempfile, threading, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2  # notebooks at a time
LIMIT = 30 * 60  # seconds for all notebooks: nbdev_test has no limit of its own
BUDGET = 120  # seconds for one notebook
BEGAN = time.time()
sys.path.insert(0, str(ROOT / 'tools'))


def environment(**extra):
    "The environment of a stage: no records, threads shared between the workers."
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'TRANSFORMER_COURSE_RECORD')}
    bin_path = str(Path(sys.executable).parent)
    return {**env, 'PATH': bin_path + os.pathsep + env.get('PATH', ''), **extra}


def run(command, limit=None, **kw):
    "Run a command to its end, or kill it and its children after `limit` seconds; (exit code, what it printed)."
    lines, late = [], []
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding='utf-8',
        errors='replace',
        start_new_session=True,
        **kw,
    )

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


def sync():
    "Notebooks are clean; modules, README.md and the sidebar are what the notebooks make them."
    import build_docs, build_readme, json

    patterns = ('nbs/**/*.ipynb', 'transformer_course/**/*.py')
    before = files(ROOT, *patterns)
    with tempfile.TemporaryDirectory(prefix='course-sync-') as tmp:
        tmp = Path(tmp)
        for name in before:
            (tmp / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp / name).write_bytes(before[name])
        for name in ('settings.ini', 'setup.py', 'pyproject.toml'):
            shutil.copy(ROOT / name, tmp / name)
        env = environment(PYTHONPATH=str(tmp))
        for command in ('nbdev_clean', 'nbdev_export'):
            code, _ = run([command], cwd=tmp, env=env)
            if code:
                return code
            after = files(tmp, *patterns)
            changed = sorted(
                n for n in before.keys() | after.keys() if before.get(n) != after.get(n)
            )
            if changed:
                print(
                    f'{command} changes {", ".join(changed)}: run `{command}` and commit what it writes'
                )
                return 1
    index = ROOT / 'nbs' / 'index.ipynb'
    text, pictures = build_readme.readme(json.loads(index.read_text(encoding='utf-8')))
    for name, data in {'README.md': text.encode(), **pictures}.items():
        if not (ROOT / name).exists() or (ROOT / name).read_bytes() != data:
            print(f'{name} is not what nbs/index.ipynb makes: run `python tools/build_readme.py`')
            return 1
    if (ROOT / 'nbs' / 'sidebar.yml').read_text(encoding='utf-8') != build_docs.sidebar(
        ROOT / 'nbs'
    ):
        print(
            'nbs/sidebar.yml does not list the notebooks there are: run `python tools/build_docs.py --sidebar`'
        )
        return 1
    print(
        f'{sum(n.endswith(".ipynb") for n in before)} notebooks clean; modules, README.md and sidebar in sync'
    )
    return 0


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
    code, printed = run(
        ['nbdev_test', '--n_workers', str(WORKERS), '--timing', '--do_print'],
        limit=LIMIT,
        cwd=ROOT,
        env=env,
    )
    slow = [
        (n, int(s))
        for n, s in re.findall(r'^(\S+\.ipynb): (\d+) secs$', printed, re.M)
        if int(s) > BUDGET
    ]
    for name, seconds in slow:
        print(f'over budget: {name} took {seconds} s, its budget is {BUDGET} s')
    if not code and 'Success.' not in printed:
        code = 1
    return code


def tests():
    "What cannot live in a notebook: the command, the site and JupyterLab in a browser, the wheel."
    return run(
        [sys.executable, '-m', 'pytest'], cwd=ROOT, env=environment(COURSE_TESTS_BEGAN=str(BEGAN))
    )[0]


def tree():
    "What git sees as changed, or None outside a repository."
    try:
        return subprocess.run(
            ['git', 'status', '--porcelain'], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
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
            print(
                f'== {name}: {"failed" if code else "passed"} in {time.time() - begun:.0f} s',
                flush=True,
            )
        if code:
            sys.exit(code)
    if before is not None and tree() != before:
        print(f'the work tree changed while the tests ran:\n{tree()}', flush=True)
        if os.environ.get('CI'):
            sys.exit(1)


if __name__ == '__main__':
    main()
