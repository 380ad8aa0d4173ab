"""Kill a training run with SIGKILL, over and over, and see whether anything is lost.

    python benchmarks/kills.py                100 kills at random moments
    python benchmarks/kills.py --kills 1000   more
    python benchmarks/kills.py --points       one kill before and after each step of writing

A small GPT is trained with a checkpoint every second update and a line in a log for every update.
torch is imported once; each life of a run is a forked child, killed after a random number of
milliseconds. After every kill the checkpoint must be readable (or not there yet), and the next
child goes on from it. When a run has reached its end, the losses in its log and its validation
losses are compared with those of a run that nobody disturbed. Prints a table and writes
benchmarks/results/kills.json. Needs a system with fork.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

os.environ.setdefault('TRANSFORMER_COURSE_PROGRESS', '0')
import torch
import torch._dynamo  # noqa: F401  optimisers ask for it; every child would import it anew

from transformer_course import checkpoint, files
from transformer_course.checkpoint import read_checkpoint
from transformer_course.data import get_batch
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.logs import LogFile, read_log
from transformer_course.training import TrainConfig, train

RESULT = Path(__file__).parent / 'results' / 'kills.json'
MODEL = GPTConfig(block_size=16, vocab_size=20, n_layer=1, n_head=2, n_embd=16, dropout=0.1)


def train_once(folder, updates, every):
    "Train in `folder`, from the checkpoint there if one is: what a child does until it is killed."
    ids = torch.randint(20, (2000,), generator=torch.Generator().manual_seed(0))
    place, log = folder / 'checkpoint', LogFile(folder / 'log.jsonl')
    resume = state(place) is not None
    train(
        GPT(
            MODEL, torch.Generator().manual_seed(int(resume))
        ),  # resumed: weights to be overwritten
        lambda g: get_batch(ids, 4, 16, g),
        TrainConfig(max_iters=updates, eval_interval=every),
        validate=lambda m: m.lm_head.weight.sum().item(),
        on_step=log,
        on_eval=log.on_eval,
        folder=place,
        resume=resume,
    )


def state(place):
    "checkpoint.json of a checkpoint that is read and verified, or None where there is none yet."
    if not files.present(place).exists():
        return None
    return read_checkpoint(place)[0]


def child(work):
    "The process id of a fork that does `work` and nothing else."
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        work()
        status = 0
    except SystemExit as e:
        status = e.code
    except BaseException as e:
        print(f'child: {e!r}', file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def wait(pid):
    "True if the child ended by itself, False if it was killed; any other end is an error."
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f'a child ended with status {code}')
    return code == 0


def outcome(folder):
    "What a finished run has found: validation losses, and the lines of its log."
    lines = read_log(folder / 'log.jsonl')
    return dict(
        history=state(folder / 'checkpoint')['history']['val'],
        losses=[(r['step'], r['loss']) for r in lines if 'loss' in r],
        vals=sorted((r['step'], r['val']) for r in lines if 'val' in r),
    )


def undisturbed(folder, updates, every):
    "The outcome of a run without kills."
    wait(child(lambda: train_once(folder, updates, every)))
    return outcome(folder)


def compare(folder, good):
    "How many losses differ from those of the run `good`, and how many lines of the log are wrong."
    mine = outcome(folder)
    mine_at, good_at = (dict(run['losses']) for run in (mine, good))
    differ = sum(mine_at.get(step) != loss for step, loss in good_at.items())
    differ += mine['history'] != good['history']
    wrong = [step for step, _ in mine['losses']] != [step for step, _ in good['losses']]
    return differ, int(wrong) + int(mine['vals'] != good['vals'])


COUNTED = [
    'kills',
    'runs',
    'while_writing',
    'before_the_first',
    'read_and_good',
    'damaged',
    'losses_that_differ',
    'log_lines_wrong',
]


def look_at(folder, found):
    "Count what a kill has left; a damaged checkpoint is thrown away, and the run begins anew."
    found['kills'] += 1
    found['while_writing'] += (folder / '.checkpoint-new').exists()
    try:
        found['read_and_good' if state(folder / 'checkpoint') else 'before_the_first'] += 1
    except ValueError as e:
        found['damaged'] += 1
        print(e)
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)


def random_kills(kills, updates=60, every=2, longest=0.25, seed=0):
    "Runs under fire until there have been so many kills and the last run is complete."
    dice, began, found = random.Random(seed), time.perf_counter(), dict.fromkeys(COUNTED, 0)
    with tempfile.TemporaryDirectory() as root:
        good, folder = undisturbed(Path(root) / 'good', updates, every), Path(root) / 'run'
        while found['kills'] < kills or folder.exists():
            pid = child(lambda: train_once(folder, updates, every))
            if found['kills'] < kills:
                time.sleep(dice.uniform(0, longest))
                os.kill(pid, signal.SIGKILL)
            if not wait(pid):
                look_at(folder, found)
                continue
            differ, wrong = compare(folder, good)
            found['runs'] += 1
            found['losses_that_differ'] += differ
            found['log_lines_wrong'] += wrong
            shutil.rmtree(folder)
    how = dict(updates_a_run=updates, updates_a_checkpoint=every, seed=seed)
    return found | how | dict(seconds=round(time.perf_counter() - began, 1))


STEPS = [
    (checkpoint, 'save_file'),
    (files, 'sync'),
    (shutil, 'rmtree'),
    (os, 'replace'),
    (Path, 'mkdir'),
    (Path, 'rename'),
    (Path, 'write_text'),
    (Path, 'write_bytes'),
]


@contextmanager
def kill_at(n, calls):
    """Die by SIGKILL just before (n = 2i) or just after (n = 2i + 1) step i of writing.

    The steps' names are kept in `calls`."""

    def counted(name, real):
        def call(*args, **kw):
            calls.append(name)
            here = len(calls) - 1  # one step may call another
            if n == 2 * here:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kw)
            if n == 2 * here + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    with ExitStack() as patches:
        for where, name in STEPS:
            real = getattr(where, name)
            patches.enter_context(mock.patch.object(where, name, counted(name, real)))
        yield


def under_fire(folder, n, updates, every):
    "A run that is killed at point n of its writing; if it survives, it tells all steps."
    calls = []
    with kill_at(n, calls):
        train_once(folder, updates, every)
    (folder / 'calls.json').write_text(json.dumps(calls))


def kills_at_every_point(updates=6, every=2, only=None):
    "For each step of writing (or `only` some), a run that is killed there and taken up."
    counts = dict.fromkeys(('damaged', 'losses_that_differ', 'log_lines_wrong', 'went_back'), 0)
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root) / 'good'
        wait(child(lambda: under_fire(whole, -1, updates, every)))
        good, calls = outcome(whole), json.loads((whole / 'calls.json').read_text())
        points = [n for n in range(2 * len(calls)) if only is None or calls[n // 2] in only]
        for n in points:
            folder = Path(root) / f'at-{n}'
            if wait(child(lambda: under_fire(folder, n, updates, every))):
                raise RuntimeError(f'the child that should have died at {n} did not')
            try:
                before = state(folder / 'checkpoint')
            except ValueError as e:
                counts['damaged'] += 1
                print(n, calls[n // 2], e)
                continue
            saved = calls[: n // 2].count('save_file') // 2 - 1  # checkpoints begun before this one
            step = before['step'] if before else -1
            # an older one than the last that was finished
            counts['went_back'] += saved > 0 and step < every * (saved - 1)
            wait(child(lambda: train_once(folder, updates, every)))
            differ, wrong = compare(folder, good)
            counts['losses_that_differ'] += differ
            counts['log_lines_wrong'] += wrong
            shutil.rmtree(folder)
    found = dict(points=len(points), steps=sorted(set(calls))) | counts
    return found | dict(updates_a_run=updates, updates_a_checkpoint=every)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--kills', type=int, default=100, help='kills at random moments')
    at_points = 'kill at each step of writing instead'
    parser.add_argument('--points', action='store_true', help=at_points)
    parser.add_argument('--seed', type=int, default=0, help='decides the moments')
    args = parser.parse_args()
    if args.points:
        found = {'points': kills_at_every_point()}
    else:
        found = {'random': random_kills(args.kills, seed=args.seed)}
    for figures in found.values():
        for name, value in figures.items():
            value = ', '.join(value) if isinstance(value, list) else value
            print(f'{name.replace("_", " "):24}{value}')
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    about = dict(
        torch=torch.__version__.split('+')[0],
        python=platform.python_version(),
        system=platform.system(),
        cores=os.cpu_count(),
    )
    files.write_file(RESULT, json.dumps({**before, **about, **found}, indent=1) + '\n')


if __name__ == '__main__':
    main()
