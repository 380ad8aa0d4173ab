"""What only a graphics card can show, within eight minutes on one card, as one file of figures.

    python benchmarks/gpu.py --text tinyshakespeare.txt   every step; needs a GPU
    python benchmarks/gpu.py --only speed,cells           these steps, in this order
    python benchmarks/gpu.py --skip shakespeare           all but these
    python benchmarks/gpu.py --toy --out toy              everything very small, on any machine

Each step is a process of its own with a limit of time. What a part of a step has measured is kept
at once, and so is its error: the others go on. Nothing is downloaded; without --text the text is
the one in the cache, or made up. The figures go to benchmarks/results/gpu.json, what the steps
print to results/runs/gpu/, or both below --out. Where there is no GPU, everything is very small
(`toy`), and nothing is kept without --out.
"""

import argparse, json, os, platform, re, signal, subprocess, sys, tempfile, time, traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEED = 1337
LIMITS = dict(  # seconds for each step; the order in which they run
    lengths=40, sampling=60, speed=120, shakespeare=200, parallel=90, cells=120
)
TOTAL = 470  # seconds for all of them
GRACE = 15  # seconds that a step may take to end


def scrub(text):
    "Text without the folders of the machine that wrote it."
    return re.sub(r'(?<![\w~/:.])/(?:[\w.+@-]+/)+', '', text)


def one_line(error):
    return scrub(' '.join(f'{type(error).__name__}: {error}'.split()))[:500]


# --- one step, in a process of its own ---


def carry_out(parts, end, keep):
    "Do one part after the other until the time `end`; `keep` is handed all that is known so far."
    done = {}
    for name, work in parts:
        began = time.time()
        if began > end:
            done[name] = dict(error='not begun: the time was up')
        else:
            try:
                row = work()
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                row = dict(error=one_line(error))
            done[name] = row | dict(seconds=round(time.time() - began, 2))
        keep(done)
    return done


def step(args):
    "Do the step `args.step` and write what its parts gave to its file."
    import gpu_steps

    job = gpu_steps.Job(args.toy, args.folder, time.time() + args.limit, SEED)
    parts = getattr(gpu_steps, args.step)(job)
    file = args.folder / f'{args.step}.json'
    carry_out(parts, job.end, lambda done: file.write_text(json.dumps(done), encoding='utf-8'))


# --- all steps ---


def stop(process):
    "End a process and its children: first a word, then by force."
    for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 60)):
        try:
            os.killpg(process.pid, number)
            return process.wait(patience)
        except (subprocess.TimeoutExpired, ProcessLookupError):
            pass


def last_line(log):
    lines = log.read_text(encoding='utf-8', errors='replace').split('\n')
    return scrub(next((line for line in reversed(lines) if line.strip()), ''))[:500]


def environment(text):
    "For the steps: this checkout's package, no network, no progress bars, no pictures on a screen."
    more = dict(
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
        TRANSFORMER_COURSE_OFFLINE='1',
        TRANSFORMER_COURSE_PROGRESS='0',
        TQDM_DISABLE='1',
        MPLBACKEND='agg',
        PYTHONUNBUFFERED='1',
    )
    if text:
        more['TRANSFORMER_COURSE_TINYSHAKESPEARE'] = str(Path(text).resolve())
    own = {k: v for k, v in os.environ.items() if k != 'TRANSFORMER_COURSE_RECORD'}
    return own | more


def run_step(name, args, folder, limit):
    "One step as a process; what it kept, and how it ended."
    command = [sys.executable, __file__, '--step', name, '--folder', folder, '--limit', limit]
    command += ['--toy'] if args.toy else []
    log, began, error = folder / f'{name}.txt', time.time(), None
    with open(log, 'w', encoding='utf-8') as out:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(args.text),
            start_new_session=True,
        )
        try:
            if status := process.wait(limit + GRACE):
                error = f'ended with status {status}: {last_line(log)}'
        except subprocess.TimeoutExpired:
            error = f'stopped after {limit + GRACE:.0f} s'
        finally:
            stop(process)
    file = folder / f'{name}.json'
    parts = json.loads(file.read_text(encoding='utf-8')) if file.exists() else {}
    failed = [part for part, row in parts.items() if 'error' in row]
    found = dict(seconds=round(time.time() - began, 1), ok=not (error or failed), parts=parts)
    return found | (dict(error=error) if error else {})


def header(toy):
    "What the figures depend on."
    import torch

    card = {}
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        card = dict(
            device=about.name,
            capability=[about.major, about.minor],
            memory_gb=round(about.total_memory / 2**30, 1),
            cuda=torch.version.cuda,
        )
    own = dict(device=platform.processor() or platform.machine(), capability=None)
    return dict(
        toy=toy,
        seed=SEED,
        **(own | card),
        torch=torch.__version__.split('+')[0],
        python=platform.python_version(),
        cores=os.cpu_count(),
    )


def keep(result, folder, out):
    "Write the figures, and what the steps said, where they belong."
    results = out or ROOT / 'benchmarks' / 'results'
    logs = (out or ROOT / 'results') / 'runs' / 'gpu'
    for place in (results, logs):
        place.mkdir(parents=True, exist_ok=True)
    (results / 'gpu.json').write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
    for name in result['steps']:
        for kind in ('txt', 'jsonl'):
            if (file := folder / f'{name}.{kind}').exists():
                words = scrub(file.read_text(encoding='utf-8', errors='replace'))
                (logs / file.name).write_text(words[-200_000:], encoding='utf-8')


def show(name, found):
    print(f"{name:12} {found['seconds']:6.1f} s  {'' if found['ok'] else found.get('error', '')}")
    for part, row in found['parts'].items():
        shown = {k: v for k, v in row.items() if k not in ('config', 'output', 'val', 'seconds')}
        print(f"  {part:34} {row.get('seconds', 0):6.1f} s  {json.dumps(shown)[:150]}", flush=True)


def names(words):
    "Steps from a list with commas."
    found = [word for word in (words or '').split(',') if word]
    for word in found:
        if word not in LIMITS:
            sys.exit(f'gpu: no step is called {word!r}: choose from {", ".join(LIMITS)}')
    return found


def arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, help='write below this folder instead')
    parser.add_argument('--only', help=f'these steps: {",".join(LIMITS)}')
    parser.add_argument('--skip', help='not these steps')
    parser.add_argument('--text', help='Tiny Shakespeare, or another text (UTF-8)')
    parser.add_argument('--toy', action='store_true', help='very small, as without a GPU')
    parser.add_argument('--total', type=float, default=TOTAL, help='seconds for all steps')
    for own in ('--step', '--folder', '--limit'):  # how a step is started
        kind = dict(step=str, folder=Path, limit=float)[own[2:]]
        parser.add_argument(own, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    if args.step:
        return step(args)
    import torch

    wanted = [n for n in names(args.only) or LIMITS if n not in names(args.skip)]
    args.toy = args.toy or not torch.cuda.is_available()
    patience = 4 if args.toy else 1  # the machine may be busy with other things
    result, began = header(args.toy) | dict(seconds=0.0, steps={}), time.time()
    print(json.dumps({k: v for k, v in result.items() if k != 'steps'}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            left = args.total * patience - (time.time() - began)
            if left < 10:
                found = dict(seconds=0.0, ok=False, error='not begun: time was up', parts={})
            else:
                found = run_step(name, args, Path(folder), min(LIMITS[name] * patience, left))
            result['steps'][name] = found
            result['seconds'] = round(time.time() - began, 1)
            show(name, found)
            if args.out or not args.toy:
                keep(result, Path(folder), args.out)
    print(f"{result['seconds']:.0f} s")
    return 0 if all(found['ok'] for found in result['steps'].values()) else 1


if __name__ == '__main__':
    sys.exit(main())
