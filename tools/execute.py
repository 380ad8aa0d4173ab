"""Run notebooks from top to bottom in fresh kernels and write their outputs in place, cleaned.

    python tools/execute.py                          every notebook: chapters, support, index last
    python tools/execute.py nbs/03_attention.ipynb   only these
    python tools/execute.py --check ...              run, report, write nothing
    python tools/execute.py --record ...             also write their records, with a stamp

Runs what `nbdev_test` runs, in the notebook's own folder. What takes minutes is a `long_run`, which
shows its record; TRANSFORMER_COURSE_LONG=1 runs it anew, and with --record replaces it.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from cells import ROOT, notebook_paths, skips
from stamps import keeps_records, stamp

sys.path.insert(0, str(ROOT))
from transformer_course.files import write_file

KERNELSPEC = {'display_name': 'python3', 'language': 'python', 'name': 'python3'}
MACHINE = re.compile(r'(?:/home/|/root/|/Users/|/tmp/|/work/)[\w./-]*')
MANY = 20_000  # more colours than this has no drawing
os.environ.setdefault('PYDEVD_DISABLE_FILE_VALIDATION', '1')


def in_order():
    "All notebooks as they are best executed: chapters, support, and the pages made from records."
    pages = [ROOT / 'nbs' / f'{name}.ipynb' for name in ('index', 'ledger', 'bibliography')]
    return sorted(notebook_paths(), key=lambda p: (p in pages, p.parent.name == 'support', p.name))


# ---------------------------------------------------------------- outputs as they are kept


def overwrite(text):
    "Text as a terminal would leave it: what stands before a carriage return is written over."
    lines = []
    for line in text.replace('\r\n', '\n').split('\n'):
        shown = ''
        for part in line.split('\r'):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip() if '\r' in line else line)
    return '\n'.join(lines)


def is_stream(out):
    return out.get('output_type') == 'stream'


def smaller(png):
    "A picture in base64, with a palette where that is smaller; a drawing loses nothing to see."
    from PIL import Image

    data = base64.b64decode(png)
    shown = Image.open(io.BytesIO(data))
    if shown.mode not in ('RGB', 'RGBA') or len(shown.getcolors(2**24) or ()) > MANY:
        return png  # a photograph, or small already
    packed = io.BytesIO()
    few = shown.convert('RGB').quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(packed, 'PNG', optimize=True, dpi=shown.info.get('dpi'))
    best = min(data, packed.getvalue(), key=len)
    return base64.b64encode(best).decode() + '\n'


def tidy(outputs):
    """Outputs with streams merged, carriage returns resolved, pictures packed.

    Empty streams are dropped, and metadata but for the size at which a picture is shown.
    """
    kept = []
    for out in outputs:
        out.pop('transient', None)
        if out.get('output_type') in ('display_data', 'execute_result'):
            size = out.get('metadata', {}).get('image/png')
            out['metadata'] = {'image/png': size} if size else {}
        if 'image/png' in out.get('data', {}):
            out['data']['image/png'] = smaller(out['data']['image/png'])
        goes_on = kept and is_stream(out) and is_stream(kept[-1])
        if goes_on and kept[-1]['name'] == out['name']:
            kept[-1]['text'] += out['text']
        else:
            kept.append(out)
    for out in kept:
        if is_stream(out):
            out['text'] = overwrite(out['text'])
    return [out for out in kept if not is_stream(out) or out['text'].strip()]


def cleaned(nb):
    "The text of notebook `nb` (an nbformat node), exactly as `nbdev_clean` leaves it."
    import nbformat
    from execnb.nbio import nb2str
    from nbdev.clean import _nbdev_clean

    nb.metadata['kernelspec'] = dict(KERNELSPEC)
    raw = json.loads(nbformat.writes(nb, version=4))
    _nbdev_clean(raw)
    return nb2str(raw)


def complaints(nb):
    "What a reader should not see in the outputs: warnings on stderr, machine paths."
    for i, cell in enumerate(nb.cells):
        for out in cell.get('outputs', []):
            data = {k: v for k, v in out.get('data', {}).items() if not k.startswith('image/')}
            text = json.dumps([out.get('text'), data, out.get('traceback')])
            if out.get('name') == 'stderr':
                yield f'cell {i} writes to stderr: {out["text"].strip().splitlines()[-1][:100]}'
            for path in MACHINE.findall(text):
                yield f'cell {i} shows a machine path: {path}'


# ---------------------------------------------------------------- a kernel


def environment(record):
    "The kernel's environment: no progress bars, no test mode, records only when asked for."
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'TRANSFORMER_COURSE_RECORD')}
    env.update(TRANSFORMER_COURSE_PROGRESS='0', TQDM_DISABLE='1')
    if record:
        env['TRANSFORMER_COURSE_RECORD'] = '1'
    return env


def kernel_client(nb, folder, timeout, python=sys.executable):
    "A client whose kernel is this very Python, or `python`, whatever kernels are installed."
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    manager = AsyncKernelManager(kernel_name='python3')
    start = [python, '-m', 'ipykernel_launcher', '-f', '{connection_file}']
    manager.kernel_spec.argv = [*start, '--log-level=ERROR']
    patience = dict(timeout=timeout, startup_timeout=600, record_timing=False)
    where = {'metadata': {'path': str(folder)}}
    return NotebookClient(nb, km=manager, resources=where, **patience)


def cpu_seconds(pid):
    "CPU seconds of a process and of its children that have ended; none if it is gone."
    import psutil

    try:
        return sum(psutil.Process(pid).cpu_times()[:4])
    except psutil.NoSuchProcess:
        return 0


async def run_cells(client, nb, env, left_out=skips):
    "Execute the cells of `nb` but for those left out: a failed cell or None, and CPU seconds."
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    manager = client.km
    try:
        async with client.async_setup_kernel(env=env):
            pid = manager.provisioner.process.pid
            for i, cell in enumerate(nb.cells):
                if cell.cell_type != 'code' or not cell.source.strip() or left_out(cell.source):
                    continue
                try:
                    await client.async_execute_cell(cell, i)
                except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
                    return (i, str(e)), cpu_seconds(pid)
                cell.outputs = tidy(cell.outputs)
            return None, cpu_seconds(pid)
    finally:  # the manager is ours, and nbclient leaves the kernel of another's running
        if manager.has_kernel:
            await manager.shutdown_kernel(now=True)


# ---------------------------------------------------------------- one notebook


def tell_failure(nb, name, failure):
    "Say on stderr which cell failed, and how."
    i, message = failure
    if not sys.stderr.isatty():
        message = re.sub(r'\x1b\[[\d;]*m', '', message)
    code = sum(c.cell_type == 'code' for c in nb.cells[: i + 1])
    which = f'cell {i} (code cell {code}, id {nb.cells[i].get("id", "-")})'
    told = f'\n{name}: {which} failed; the file is left as it was.\n{message}'
    print(told, file=sys.stderr, flush=True)


def stamped(path):
    "Stamp the records of a notebook that has just run; False if its outputs disagree with them."
    found = stamp(ROOT, [path.stem], fresh=True)
    for problem in found:
        print(f'  records: {problem}', file=sys.stderr, flush=True)
    return not found


def execute(path, args):
    "Run one notebook; True if it ran to the end (and, unless `--check`, is written)."
    import nbformat

    before, start, name = path.read_text(encoding='utf-8'), time.time(), path.relative_to(ROOT)
    nb = nbformat.reads(before, as_version=4)
    client = kernel_client(nb, path.parent, args.timeout)
    record = args.record and not args.check and keeps_records(path.stem, nb.cells)
    work = run_cells(client, nb, environment(record))
    failure, cpu = asyncio.run(work)
    if failure:
        tell_failure(nb, name, failure)
        return False
    text = cleaned(nb)
    note = f'{len(text.encode()) / 1e3:.0f} kB'
    if args.check:
        note += ', not written'
    elif path.read_text(encoding='utf-8') != before:
        print(f'{name}: changed on disk while it ran; run it again.', file=sys.stderr)
        return False
    elif text == before:
        note += ', unchanged'
    else:
        write_file(path, text)
    print(f'{name}: {time.time() - start:.1f} s, CPU {cpu:.1f} s, {note}', flush=True)
    for line in complaints(nb):
        print(f'  warning: {line}', flush=True)
    return stamped(path) if record else True


def arguments():
    "What the command line asks for."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('notebooks', nargs='*', type=Path, help='default: all')
    parser.add_argument('--check', action='store_true', help='write nothing')
    parser.add_argument('--record', action='store_true', help='also write the records')
    parser.add_argument('--timeout', type=int, default=900, help='seconds a cell may take')
    args = parser.parse_args()
    for path in args.notebooks:
        if not path.is_file():
            parser.error(f'no such notebook: {path}')
    return args


def main():
    args = arguments()
    paths = [p.resolve() for p in args.notebooks] or in_order()
    os.chdir(ROOT)
    start = time.time()
    with tempfile.TemporaryDirectory() as ipython:
        os.environ['IPYTHONDIR'] = ipython
        good = [execute(p, args) for p in paths]
    if len(paths) > 1:
        print(f'{sum(good)} of {len(paths)} notebooks ran, {time.time() - start:.0f} s')
    sys.exit(not all(good))


if __name__ == '__main__':
    main()
