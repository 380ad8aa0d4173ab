"""Break the library on purpose, one small change at a time, and see which changes no test notices.

    python tools/mutants.py                  all mutants, two at a time
    python tools/mutants.py optim training   only those of these modules
    python tools/mutants.py --list           say what there is, run nothing

The list is `tests/mutants.json`: a module, what stands there once (`old`), what takes its place
(`new`), and the tests that ought to turn red: files of tests/, perhaps `file::test`, or notebooks.
Every test runs first on the library as it is. A mutant that makes the tests run longer than LIMIT
is caught as well. Exit code 1 if one survives.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300  # seconds for the tests of one mutant


def load(modules):
    "The mutants of these modules, or all."
    mutants = json.loads((ROOT / 'tests' / 'mutants.json').read_text(encoding='utf-8'))
    for m in mutants:
        found = source_of(ROOT, m).read_text(encoding='utf-8').count(m['old'])
        if found != 1:
            sys.exit(f'mutants: {m["old"]!r} stands {found} times in {m["module"]}: make it unique')
    strange = set(modules) - {m['module'] for m in mutants}
    if strange:
        sys.exit(f'mutants: there are none of {sorted(strange)[0]!r}: see --list')
    return [m for m in mutants if not modules or m['module'] in modules]


def source_of(folder, mutant):
    "The file of a mutant's module."
    return Path(folder, 'transformer_course', *mutant['module'].split('.')).with_suffix('.py')


def commands(tests):
    "What runs these tests, each as soon as the one before has passed."
    books = [t for t in tests if t.endswith('.ipynb')]
    files = [t for t in tests if t not in books]
    if files:
        yield [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', *files]
    for book in books:
        yield ['nbdev_test', '--path', book, '--n_workers', '0']


def passes(folder, tests):
    "True if the tests pass in this copy of the repository."
    env = dict(os.environ, PYTHONPATH=str(folder), OMP_NUM_THREADS='1', IN_TEST='1')
    env['PATH'] = f'{Path(sys.executable).parent}{os.pathsep}{env["PATH"]}'
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    for command in commands(tests):
        try:
            done = subprocess.run(command, cwd=folder, env=env, timeout=LIMIT, **quiet)
        except subprocess.TimeoutExpired:
            return False
        if done.returncode:
            return False
    return True


def break_notebook(folder, mutant):
    "The same change where it comes from: a notebook tests the definitions that its own cells make."
    home = re.compile(rf'^#\|\s*default_exp\s+{re.escape(mutant["module"])}\s*$', re.M)
    for path in Path(folder, 'nbs').rglob('*.ipynb'):
        nb = json.loads(path.read_text(encoding='utf-8'))
        sources = [''.join(cell['source']) for cell in nb['cells']]
        if not any(home.search(source) for source in sources):
            continue
        for cell, source in zip(nb['cells'], sources):
            if source.startswith('#| export'):
                cell['source'] = source.replace(mutant['old'], mutant['new'])
        path.write_text(json.dumps(nb), encoding='utf-8')


def survives(mutant):
    "True if the tests pass although the library is broken."
    with tempfile.TemporaryDirectory(prefix='course-mutant-') as folder:
        tree = Path(folder, 'course')  # a copy of everything: tests find the package beside them
        shutil.copytree(
            ROOT, tree, ignore=shutil.ignore_patterns('__pycache__', '.*', 'node_modules')
        )
        path = source_of(tree, mutant)
        text = path.read_text(encoding='utf-8').replace(mutant['old'], mutant['new'])
        path.write_text(text, encoding='utf-8')
        break_notebook(tree, mutant)
        return passes(tree, mutant['tests'])


def report(mutant, alive):
    "One line on what came out."
    first = mutant['old'].strip().splitlines()[0]
    new = (mutant['new'].strip().splitlines() or ['(nothing)'])[0]
    print(
        f'{"SURVIVED" if alive else "caught":8}  {mutant["module"]}: {first} -> {new}', flush=True
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('modules', nargs='*', help='only mutants of these modules')
    parser.add_argument('--list', action='store_true', help='say what there is, run nothing')
    args = parser.parse_args()
    mutants, began = load(args.modules), time.time()
    if args.list:
        for m in mutants:
            print(f'{m["module"]}: {m["old"].strip()!r} -> {m["new"].strip()!r}')
        return
    tests = sorted({t for m in mutants for t in m['tests']})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        red = [
            t for t, good in zip(tests, pool.map(lambda t: passes(ROOT, [t]), tests)) if not good
        ]
        if red:
            sys.exit(f'mutants: {", ".join(red)} fail on the library as it is')
        alive = []
        for mutant, lives in zip(mutants, pool.map(survives, mutants)):
            report(mutant, lives)
            alive += [mutant] * lives
    print(f'{len(mutants) - len(alive)} of {len(mutants)} caught in {time.time() - began:.0f} s')
    sys.exit(bool(alive))


if __name__ == '__main__':
    main()
