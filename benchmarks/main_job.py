"""Time the main job: `transformer-course train` without arguments, in a process of its own.

    python benchmarks/main_job.py            one run
    python benchmarks/main_job.py --runs 3   several; the table shows each, the JSON file keeps all

Prints a table and writes benchmarks/results/main_job.json: seconds to the first sample and to the
end, peak memory, losses over the whole validation split, and the last sample.
"""

import argparse, json, os, platform, re, statistics, subprocess, sys, tempfile, time
from pathlib import Path

RESULT = Path(__file__).parent / 'results' / 'main_job.json'
FIGURES = 'seconds', 'cpu_seconds', 'first_sample_seconds', 'peak_memory_mb'


def listen(process, began):
    "What a process prints, and when its first sample appeared: an indented line."
    lines, first = [], None
    for line in process.stdout:
        lines.append(line)
        if first is None and line.startswith('    '):
            first = time.perf_counter() - began
    return ''.join(lines), first


def run(extra):
    "One run in an empty folder; what it measured."
    command = [Path(sys.executable).with_name('transformer-course'), 'train', *extra]
    env = {**os.environ, 'PYTHONUNBUFFERED': '1'}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=env)
        out, first = listen(process, began)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        if status:
            sys.exit(f'the run ended with status {os.waitstatus_to_exitcode(status)}')
    val = re.findall(r'step +(\d+) +val loss (\d+\.\d+)', out)
    last = out.rsplit('val loss', 1)[1].splitlines()
    return dict(
        seconds=round(seconds, 1),
        cpu_seconds=round(usage.ru_utime + usage.ru_stime, 1),
        first_sample_seconds=round(first, 1),
        peak_memory_mb=round(usage.ru_maxrss / 1024),
        val=[(int(step), float(loss)) for step, loss in val],
        text=re.search(r'^text +(.*)$', out, re.M)[1],
        model=re.search(r'^model +(.*)$', out, re.M)[1],
        sample=[line[4:] for line in last if line.startswith('    ')],
    )


def show(number, r):
    print(
        f"run {number}: {r['seconds']} s ({r['cpu_seconds']} s of CPU), "
        f"first sample after {r['first_sample_seconds']} s, peak {r['peak_memory_mb']} MB, "
        f"val loss {r['val'][-1][1]:.4f}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--runs', type=int, default=1)
    args, extra = parser.parse_known_args()
    import torch

    runs = []
    for i in range(args.runs):
        runs.append(run(extra))
        show(i + 1, runs[-1])
    middle = {name: statistics.median(r[name] for r in runs) for name in FIGURES}
    result = dict(
        command=' '.join(['transformer-course train', *extra]),
        cores=os.cpu_count(),
        python=platform.python_version(),
        torch=torch.__version__.split('+')[0],
        median=middle,
        runs=runs,
    )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + '\n')
    print('median:', ', '.join(f'{k} {v}' for k, v in middle.items()))


if __name__ == '__main__':
    main()
