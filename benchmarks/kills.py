"""Kill a training run with SIGKILL, over and over, and see whether anything is lost.

    python benchmarks/kills.py                100 kills at random moments
    python benchmarks/kills.py --kills 1000   more
    python benchmarks/kills.py --points       one kill before and after each step of writing a checkpoint

A small GPT is trained with a checkpoint every second update and a line in a log for every update. torch is imported
once; each life of a run is a forked child, killed after a random number of milliseconds. After every kill the checkpoint
must be readable (or not there yet), and the next child goes on from it. When a run has reached its end, its losses and
the lines of its log are compared with those of a run that nobody disturbed. Prints a table and writes
benchmarks/results/kills.json. Needs a system with fork.
"""

import argparse, json, os, platform, random, shutil, signal, sys, tempfile, time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

os.environ.setdefault('TRANSFORMER_COURSE_PROGRESS', '0')
import torch
import torch._dynamo  # optimisers ask for it; every child would import it anew
from transformer_course import checkpoint
from transformer_course.checkpoint import read_checkpoint
from transformer_course.data import get_batch
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.logs import LogFile, read_log
from transformer_course.training import TrainConfig, train

RESULT = Path(__file__).parent / 'results' / 'kills.json'
MODEL = GPTConfig(block_size=16, vocab_size=20, n_layer=1, n_head=2, n_embd=16, dropout=0.1)


def train_once(folder, updates, every):
    "Train in `folder`, from the checkpoint there if one is; what a child does until it is killed or done."
    ids = torch.randint(20, (2000,), generator=torch.Generator().manual_seed(0))
    place = folder / 'checkpoint'
    model = GPT(
        MODEL, torch.Generator().manual_seed(1 if state(place) else 0)
    )  # resumed: other weights, to be overwritten
    log = LogFile(folder / 'log.jsonl')
    train(
        model,
        lambda g: get_batch(ids, 4, 16, g),
        TrainConfig(max_iters=updates, eval_interval=every),
        validate=lambda m: m.lm_head.weight.sum().item(),
        on_step=log,
        on_eval=log.on_eval,
        folder=place,
        resume=state(place) is not None,
    )


def state(place):
    "checkpoint.json of a checkpoint that has been read and verified, or None where there is none yet; a damaged one raises."
    if not place.exists() and not place.with_name(f'.{place.name}-old').exists():
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


def undisturbed(folder, updates, every):
    "checkpoint.json of a run without kills."
    wait(child(lambda: train_once(folder, updates, every)))
    return state(folder / 'checkpoint')


def compare(folder, good):
    "How many losses differ from those of the run `good`, and how many lines of the log are wrong."
    about, lines = state(folder / 'checkpoint'), read_log(folder / 'log.jsonl')
    mine, theirs = (
        [*h['losses'], *map(tuple, h['val'])] for h in (about['history'], good['history'])
    )
    steps = [(r['step'], r['loss']) for r in lines if 'loss' in r]
    vals = sorted((r['step'], r['val']) for r in lines if 'val' in r)
    differ = abs(len(mine) - len(theirs)) + sum(a != b for a, b in zip(mine, theirs))
    return differ, int(steps != list(enumerate(good['history']['losses'], 1))) + int(
        vals != sorted(map(tuple, good['history']['val']))
    )


def random_kills(kills, updates=60, every=2, longest=0.25, seed=0):
    "Runs under fire until there have been so many kills and the last run is complete."
    dice, began = random.Random(seed), time.perf_counter()
    found = dict(
        kills=0,
        runs=0,
        while_writing=0,
        before_the_first=0,
        read_and_good=0,
        damaged=0,
        losses_that_differ=0,
        log_lines_wrong=0,
    )
    with tempfile.TemporaryDirectory() as root:
        good = undisturbed(Path(root) / 'good', updates, every)
        folder = Path(root) / 'run'
        while found['kills'] < kills or folder.exists():
            pid = child(lambda: train_once(folder, updates, every))
            if found['kills'] < kills:
                time.sleep(dice.uniform(0, longest))
                os.kill(pid, signal.SIGKILL)
            if not wait(pid):
                found['kills'] += 1
                found['while_writing'] += (folder / '.checkpoint-new').exists()
                try:
                    found[
                        'read_and_good' if state(folder / 'checkpoint') else 'before_the_first'
                    ] += 1
                except ValueError as e:
                    found['damaged'] += 1
                    print(e)
                    shutil.rmtree(folder)
                folder.mkdir(exist_ok=True)
            else:
                differ, wrong = compare(folder, good)
                found = {
                    **found,
                    'runs': found['runs'] + 1,
                    'losses_that_differ': found['losses_that_differ'] + differ,
                    'log_lines_wrong': found['log_lines_wrong'] + wrong,
                }
                shutil.rmtree(folder)
    return found | dict(
        updates_a_run=updates,
        updates_a_checkpoint=every,
        seed=seed,
        seconds=round(time.perf_counter() - began, 1),
    )


@contextmanager
def kill_at(n, calls):
    "Die by SIGKILL just before (n = 2i) or just after (n = 2i + 1) step i of writing; the steps' names are kept in `calls`."

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

    steps = [
        (checkpoint, 'save_file'),
        (checkpoint, 'sync'),
        (checkpoint.shutil, 'rmtree'),
        (os, 'replace'),
        (Path, 'mkdir'),
        (Path, 'rename'),
        (Path, 'write_text'),
    ]
    patches = [
        mock.patch.object(where, name, counted(name, getattr(where, name))) for where, name in steps
    ]
    for p in patches:
        p.start()
    try:
        yield
    finally:
        for p in patches:
            p.stop()


def kills_at_every_point(updates=6, every=2, only=None):
    "For each step of writing, of any checkpoint of a run, one run that is killed there and then taken up; `only` names the steps of interest."
    with tempfile.TemporaryDirectory() as root:

        def under_fire(folder, n):
            calls = []
            with kill_at(n, calls):
                train_once(folder, updates, every)
            (folder / 'calls.json').write_text(json.dumps(calls))

        wait(child(lambda: under_fire(Path(root) / 'good', -1)))
        good, calls = (
            state(Path(root) / 'good' / 'checkpoint'),
            json.loads((Path(root) / 'good' / 'calls.json').read_text()),
        )
        points = [n for n in range(2 * len(calls)) if only is None or calls[n // 2] in only]
        found = dict(
            points=len(points),
            steps=sorted(set(calls)),
            damaged=0,
            losses_that_differ=0,
            log_lines_wrong=0,
            went_back=0,
        )
        for n in points:
            folder, before = Path(root) / f'at-{n}', None
            if wait(child(lambda: under_fire(folder, n))):
                raise RuntimeError(f'the child that should have died at {n} did not')
            try:
                before = state(folder / 'checkpoint')
            except ValueError as e:
                found['damaged'] += 1
                print(n, calls[n // 2], e)
                continue
            saved = (
                sum(name == 'save_file' for name in calls[: n // 2]) // 2 - 1
            )  # checkpoints begun before this one
            found['went_back'] += saved > 0 and (before['step'] if before else -1) < every * (
                saved - 1
            )  # an older one than the last that was finished
            wait(child(lambda: train_once(folder, updates, every)))
            differ, wrong = compare(folder, good)
            found['losses_that_differ'] += differ
            found['log_lines_wrong'] += wrong
            shutil.rmtree(folder)
    return found | dict(updates_a_run=updates, updates_a_checkpoint=every)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--kills', type=int, default=100, help='kills at random moments')
    parser.add_argument(
        '--points', action='store_true', help='kill at each step of writing instead'
    )
    parser.add_argument('--seed', type=int, default=0, help='decides the moments')
    args = parser.parse_args()
    found = (
        {'points': kills_at_every_point()}
        if args.points
        else {'random': random_kills(args.kills, seed=args.seed)}
    )
    for figures in found.values():
        for name, value in figures.items():
            print(
                f'{name.replace("_", " "):24}{", ".join(value) if isinstance(value, list) else value}'
            )
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    about = dict(
        torch=torch.__version__.split('+')[0],
        python=platform.python_version(),
        system=platform.system(),
        cores=os.cpu_count(),
    )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({**before, **about, **found}, indent=1) + '\n')


if __name__ == '__main__':
    main()
