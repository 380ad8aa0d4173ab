"""Time the main job: `transformer-course train` without arguments, in a process of its own.

    python benchmarks/main_job.py            one run
    python benchmarks/main_job.py --runs 3   several; the table shows each, the JSON file keeps all

Prints a table and writes benchmarks/results/main_job.json: seconds to the first sample and to the end, peak memory,
losses over the whole validation split, and the last sample.
"""

import argparse, json, os, platform, re, statistics, subprocess, sys, tempfile, time
from pathlib import Path

RESULT = Path(__file__).parent / 'results' / 'main_job.json'


def run(extra):
    "One run in an empty folder; what it measured."
    command = [Path(sys.executable).with_name('transformer-course'), 'train', *extra]
    began, lines, first = time.perf_counter(), [], None
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, 'PYTHONUNBUFFERED': '1'},
        )
        for line in process.stdout:
            lines.append(line)
            if first is None and line.startswith('    '):
                first = time.perf_counter() - began
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        if status:
            sys.exit(f'the run ended with status {os.waitstatus_to_exitcode(status)}')
    out = ''.join(lines)
    val = [
        (int(s), float(loss)) for s, loss in re.findall(r'step +(\d+) +val loss (\d+\.\d+)', out)
    ]
    return dict(
        seconds=round(seconds, 1),
        cpu_seconds=round(usage.ru_utime + usage.ru_stime, 1),
        first_sample_seconds=round(first, 1),
        peak_memory_mb=round(usage.ru_maxrss / 1024),
        val=val,
        text=re.search(r'^text +(.*)$', out, re.M)[1],
        model=re.search(r'^model +(.*)$', out, re.M)[1],
        sample=[
            line[4:]
            for line in out.rsplit('val loss', 1)[1].splitlines()
            if line.startswith('    ')
        ],
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
        r = runs[-1]
        print(
            f"run {i + 1}: {r['seconds']} s ({r['cpu_seconds']} s of CPU), first sample after {r['first_sample_seconds']} s, peak {r['peak_memory_mb']} MB, val loss {r['val'][-1][1]:.4f}",
            flush=True,
        )
    middle = {
        k: statistics.median(r[k] for r in runs)
        for k in ('seconds', 'cpu_seconds', 'first_sample_seconds', 'peak_memory_mb')
    }
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
