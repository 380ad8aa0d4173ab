"""Run notebooks from top to bottom in fresh kernels and write their outputs in place, cleaned.

    python tools/execute.py                          every notebook: chapters, support, index last
    python tools/execute.py nbs/03_attention.ipynb   only these
    python tools/execute.py --check ...              run, report, write nothing
    python tools/execute.py --record ...             chapters also write results/claims/<chapter>.jsonl, with a stamp of their code
    python tools/execute.py --flags slow ...         run cells marked `#| slow` too (they keep their outputs otherwise)

Runs what `nbdev_test` runs: the same working folder (the notebook's own) and the same cells left out
(`#| slow`, `#| cuda`, `#| eval: false`, the final `nbdev_export()`). A cell left out keeps the outputs it has.
"""

import argparse, asyncio, json, os, re, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELSPEC = {'display_name': 'python3', 'language': 'python', 'name': 'python3'}
os.environ.setdefault('PYDEVD_DISABLE_FILE_VALIDATION', '1')


def notebooks():
    "All notebooks of the course, in the order in which they are best executed: chapters, support, and the pages made from records."
    found = [
        p
        for p in (ROOT / 'nbs').rglob('*.ipynb')
        if not any(part[0] in '._' for part in p.relative_to(ROOT).parts)
    ]
    return sorted(
        found,
        key=lambda p: (
            p in (ROOT / 'nbs' / 'index.ipynb', ROOT / 'nbs' / 'ledger.ipynb'),
            p.parent.name == 'support',
            p.name,
        ),
    )


def skips(source, flags, force):
    "True if `nbdev_test` would not run a cell with this source."
    from execnb.nbio import NbCell
    from nbdev.process import extract_directives

    if 'nbdev_export' + '(' in source:
        return True
    directives = extract_directives(
        NbCell(0, {'cell_type': 'code', 'source': source}), remove=False
    )
    if directives.get('eval:', [''])[0].lower() == 'false':
        return True
    return bool((set(flags) - set(force)) & directives.keys())


def overwrite(text):
    "Text as a terminal would leave it: what stands before a carriage return is written over."
    lines = []
    for line in text.replace('\r\n', '\n').split('\n'):
        shown = ''
        for part in line.split('\r'):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip() if '\r' in line else line)
    return '\n'.join(lines)


def tidy(outputs):
    "Outputs with consecutive streams merged, carriage returns resolved, and empty streams and metadata dropped."
    kept = []
    for out in outputs:
        out.pop('transient', None)
        if out.get('output_type') in ('display_data', 'execute_result'):
            out['metadata'] = {}
        if (
            out.get('output_type') == 'stream'
            and kept
            and kept[-1].get('output_type') == 'stream'
            and kept[-1]['name'] == out['name']
        ):
            kept[-1]['text'] += out['text']
        else:
            kept.append(out)
    for out in kept:
        if out.get('output_type') == 'stream':
            out['text'] = overwrite(out['text'])
    return [o for o in kept if o.get('output_type') != 'stream' or o['text'].strip()]


def cleaned(nb):
    "The text of notebook `nb` (an nbformat node), exactly as `nbdev_clean` leaves it."
    import nbformat
    from execnb.nbio import nb2str
    from nbdev.clean import _nbdev_clean

    nb.metadata['kernelspec'] = dict(KERNELSPEC)
    raw = json.loads(nbformat.writes(nb, version=4))
    _nbdev_clean(raw)
    return nb2str(raw)


def environment(record):
    "The kernel's environment: no progress bars, no test mode, records only when asked for."
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'TRANSFORMER_COURSE_RECORD')}
    env.update(TRANSFORMER_COURSE_PROGRESS='0', TQDM_DISABLE='1')
    if record:
        env['TRANSFORMER_COURSE_RECORD'] = '1'
    return env


def stamped(path):
    "Stamp the records of a notebook that has just run and been written; False if its outputs do not agree with them."
    import records

    found = records.stamp(ROOT, [path.stem], fresh=True)
    for problem in found:
        print(f'  records: {problem}', file=sys.stderr, flush=True)
    return not found


def kernel_client(nb, folder, timeout):
    "A client whose kernel is this very Python, whatever kernels the user has installed."
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    manager = AsyncKernelManager(kernel_name='python3')
    manager.kernel_spec.argv = [
        sys.executable,
        '-m',
        'ipykernel_launcher',
        '-f',
        '{connection_file}',
        '--log-level=ERROR',
    ]
    return NotebookClient(
        nb,
        km=manager,
        timeout=timeout,
        startup_timeout=600,
        record_timing=False,
        resources={'metadata': {'path': str(folder)}},
    )


async def run_cells(client, nb, skip, env):
    "Execute the cells of `nb` that `skip` does not name; (index, message) of a failure or None, and the CPU seconds used."
    import psutil
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    async with client.async_setup_kernel(env=env):
        for i, cell in enumerate(nb.cells):
            if cell.cell_type != 'code' or not cell.source.strip() or skip(cell.source):
                continue
            try:
                await client.async_execute_cell(cell, i)
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
                return (i, str(e)), 0
            cell.outputs = tidy(cell.outputs)
        return None, sum(psutil.Process(client.km.provisioner.process.pid).cpu_times()[:4])


def complaints(nb):
    "What a reader should not see in the outputs: warnings on stderr, machine paths."
    for i, cell in enumerate(nb.cells):
        for out in cell.get('outputs', []):
            data = {k: v for k, v in out.get('data', {}).items() if not k.startswith('image/')}
            text = json.dumps([out.get('text'), data, out.get('traceback')])
            if out.get('name') == 'stderr':
                yield f'cell {i} writes to stderr: {out["text"].strip().splitlines()[-1][:100]}'
            for path in re.findall(r'(?:/home/|/root/|/Users/|/tmp/|/work/)[\w./-]*', text):
                yield f'cell {i} shows a machine path: {path}'


def execute(path, args, flags):
    "Run one notebook; True if it ran to the end (and, unless `--check`, is written)."
    import nbformat
    from records import keeps_records

    before = path.read_text(encoding='utf-8')
    nb = nbformat.reads(before, as_version=4)
    start = time.time()
    client = kernel_client(nb, path.parent, args.timeout)
    record = args.record and not args.check and keeps_records(path.stem, nb.cells)
    failure, cpu = asyncio.run(
        run_cells(client, nb, lambda s: skips(s, flags, args.flags.split()), environment(record))
    )
    name = path.relative_to(ROOT)
    if failure:
        i, message = failure
        if not sys.stderr.isatty():
            message = re.sub(r'\x1b\[[\d;]*m', '', message)
        code = sum(c.cell_type == 'code' for c in nb.cells[: i + 1])
        print(
            f'\n{name}: cell {i} (code cell {code}, id {nb.cells[i].get("id", "-")}) failed; the file is left as it was.\n{message}',
            file=sys.stderr,
            flush=True,
        )
        return False
    text = cleaned(nb)
    note = f'{len(text.encode()) / 1e3:.0f} kB'
    if args.check:
        note += ', not written'
    elif path.read_text(encoding='utf-8') != before:
        print(f'{name}: changed on disk while it ran; run it again.', file=sys.stderr)
        return False
    elif text != before:
        with tempfile.NamedTemporaryFile(
            'w', encoding='utf-8', dir=path.parent, suffix='.tmp', delete=False
        ) as f:
            f.write(text)
        os.chmod(f.name, path.stat().st_mode & 0o777)
        os.replace(f.name, path)
    else:
        note += ', unchanged'
    print(f'{name}: {time.time() - start:.1f} s, CPU {cpu:.1f} s, {note}', flush=True)
    for line in complaints(nb):
        print(f'  warning: {line}', flush=True)
    return stamped(path) if record else True


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('notebooks', nargs='*', type=Path, help='default: all')
    parser.add_argument('--check', action='store_true', help='write nothing')
    parser.add_argument(
        '--record', action='store_true', help='write results/claims/<chapter>.jsonl'
    )
    parser.add_argument(
        '--flags', default='', help='space separated cell flags to run as well, e.g. "slow"'
    )
    parser.add_argument('--timeout', type=int, default=900, help='seconds a cell may take')
    args = parser.parse_args()
    paths = [p.resolve() for p in args.notebooks] or notebooks()
    for p in paths:
        if not p.is_file():
            parser.error(f'no such notebook: {p}')
    os.chdir(ROOT)
    from nbdev.config import get_config

    flags = get_config().tst_flags.split()
    start = time.time()
    with tempfile.TemporaryDirectory() as ipython:
        os.environ['IPYTHONDIR'] = ipython
        good = [execute(p, args, flags) for p in paths]
    if len(paths) > 1:
        print(f'{sum(good)} of {len(paths)} notebooks ran, {time.time() - start:.0f} s')
    sys.exit(not all(good))


if __name__ == '__main__':
    main()
