"""Does Run All keep its word? Run notebooks as a learner has them, and say what they did.

    python tools/run_all.py                        every notebook
    python tools/run_all.py 20_induction index     only these; paths are allowed, too
    python tools/run_all.py --network-cut          where no network is, and no cache either (Linux)
    python tools/run_all.py --python PATH          in another Python, which has the requirements

Each notebook is copied as it is, all its cells, into a folder of its own outside the repository,
with the package installed from a wheel, and run from top to bottom in a fresh kernel. It must not
fail, not take more than 1.3 times as long as it says, and write nothing: not beside itself, not in
the package, not in the repository. Nothing is kept. Where one does not keep its word, exit code 1.

On a busy machine seconds on the clock say little, so the smaller counts of these and CPU seconds.
"""

import argparse
import asyncio
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import as_wheel
from cells import ROOT, notebook_paths
from execute import kernel_client, run_cells, tell_failure
from times import stated

MOST = 1.3  # times the time that a notebook states
UNSTATED = 30  # seconds for one that states none: support whose cells take moments
REPOSITORY = 'the repository'
KEPT_OUT = 'PYTHONPATH', 'IN_TEST', 'TRANSFORMER_COURSE_LONG', 'TRANSFORMER_COURSE_RECORD'


# ---------------------------------------------------------------- what is written


def contents(folder):
    "{path: fingerprint} of the files in a folder, without compiled modules."
    files = [p for p in folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts]
    names = [p.relative_to(folder).as_posix() for p in files]
    return {name: hashlib.sha256(p.read_bytes()).digest() for name, p in zip(names, files)}


def status():
    "What git sees as changed in the repository, with what has changed in it."
    git = lambda *args: subprocess.run(['git', *args], cwd=ROOT, capture_output=True).stdout
    lines = git('status', '--porcelain', '--untracked-files=all').decode().splitlines()
    return {line[3:]: line[:2] for line in lines} | {'the changes': git('diff', 'HEAD')}


def changed(before, after):
    "The names that stand for something else in two dictionaries, or in one only."
    return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))


def watched(folder, package):
    "What must stay as it is while a notebook runs."
    return {'its folder': contents(folder), 'the package': contents(package), REPOSITORY: status()}


# ---------------------------------------------------------------- a place to run


def learner(work, package):
    "The environment of somebody who has installed the package, with IPython's files in `work`."
    env = {k: v for k, v in os.environ.items() if k not in KEPT_OUT}
    return env | {'PYTHONPATH': str(package), 'IPYTHONDIR': str(work / 'ipython')}


def installed(work, python):
    "The folder into which the package is installed; `python` finds it there."
    for name in ('source', 'package'):
        (work / name).mkdir()
    package = work / 'package'
    as_wheel.install(as_wheel.build(work / 'source'), package)
    code = 'import transformer_course; print(transformer_course.__file__)'
    found = as_wheel.call([python, '-c', code], env=learner(work, package), cwd=work)
    assert Path(found.strip()).is_relative_to(package), f'{python} imports {found}'
    return package


def cut_network():
    "Leave this process, and all it starts, the loopback interface and nothing else."
    import ctypes
    import fcntl
    import socket
    import struct

    own_users, own_network = 0x10000000, 0x40000000
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(own_network) and libc.unshare(own_users | own_network):
        raise OSError(ctypes.get_errno(), 'the system does not let this user cut the network')
    up = struct.pack('16sH14s', b'lo', 1, b'')
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, 0x8914, up)  # SIOCSIFFLAGS: kernels are asked over the loopback


# ---------------------------------------------------------------- one notebook


def late(seconds, cpu, promised, most=MOST):
    "Whether a run took too long: of clock and CPU seconds the smaller counts."
    return min(seconds, cpu) > most * promised


def run(path, work, package, python, timeout):
    "Run one notebook as it is; print a line about it, and what it did wrong. True if nothing."
    import nbformat

    folder = work / 'notebooks' / known(path).replace('/', '-')
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(path, folder)
    nb = nbformat.read(folder / path.name, as_version=4)
    promised, before, start = stated(nb.cells), watched(folder, package), time.time()
    client = kernel_client(nb, folder, timeout, python)
    env = learner(work, package)
    failure, cpu = asyncio.run(run_cells(client, nb, env, left_out=lambda source: False))
    seconds, after = time.time() - start, watched(folder, package)
    wrong = [f'it writes in {k}: {", ".join(changed(before[k], after[k]))}' for k in before]
    wrong = [text for text in wrong if not text.endswith(': ')]
    if failure:
        tell_failure(nb, path.name, failure)
        wrong.append(f'cell {failure[0]} fails')
    elif late(seconds, cpu, promised or UNSTATED):
        wrong.append(f'it takes more than {MOST} times as long as it says')
    said = f'states {promised:g} s' if promised else f'states no time ({UNSTATED} s)'
    told = '; '.join(wrong) or 'ok'
    print(f'{known(path)}: {seconds:.1f} s, CPU {cpu:.1f} s, {said}: {told}', flush=True)
    return not wrong


# ---------------------------------------------------------------- the command


def known(path):
    "A notebook's name, such as 20_induction or support/ledger."
    nbs = ROOT / 'nbs'
    return (path.relative_to(nbs) if path.is_relative_to(nbs) else path).with_suffix('').as_posix()


def named(names):
    "The notebooks that are meant: all, or those of these names or paths."
    every, found = notebook_paths(), []
    for name in names:
        hits = [p for p in every if name in (p.stem, p.name, known(p))] or [Path(name).resolve()]
        missing = [p for p in hits if not p.is_file() or p.suffix != '.ipynb']
        if missing:
            raise ValueError(f'no notebook {name!r}: give a name such as 20_induction, or a path')
        found += hits
    return found or every


def arguments():
    "What the command line asks for, with the notebooks as paths."
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument('notebooks', nargs='*', help='names or paths; default: all')
    parser.add_argument('--network-cut', action='store_true', help='without a network or a cache')
    parser.add_argument('--python', default=sys.executable, metavar='PATH', help='of the kernels')
    parser.add_argument('--timeout', type=int, default=600, help='seconds a cell may take')
    args = parser.parse_args()
    try:
        args.notebooks = named(args.notebooks)
    except ValueError as e:
        parser.error(str(e))
    args.python = shutil.which(args.python) or parser.error(f'no such program: {args.python}')
    return args


def main():
    args, start = arguments(), time.time()
    with tempfile.TemporaryDirectory(prefix='course-run-all-') as tmp:
        work = Path(tmp).resolve()
        package = installed(work, args.python)
        if args.network_cut:
            try:
                cut_network()
            except (OSError, AttributeError) as e:  # no such call outside Linux
                sys.exit(f'run_all: {e}; run it as root on Linux, or unplug')
            os.environ['TRANSFORMER_COURSE_CACHE'] = str(work / 'cache')
        good = [run(p, work, package, args.python, args.timeout) for p in args.notebooks]
    kept = f'{sum(good)} of {len(good)} notebooks keep their word'
    print(f'{kept}, {time.time() - start:.0f} s')
    sys.exit(not all(good))


if __name__ == '__main__':
    main()
