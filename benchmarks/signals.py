"""Stop a training run by a signal, over and over, in one process and in two: is anything lost?

    python benchmarks/signals.py               60 signals at random moments
    python benchmarks/signals.py --signals 300 more

Each life of a run ends by SIGKILL (one process dies, its peer has to notice), by SIGINT or by
SIGTERM (all processes get it, as from a terminal or a launcher). After SIGKILL the checkpoint must
be readable. A signal that can be caught must lose nothing that was logged: the checkpoint is of the
last update in the log. Every process must end by itself within half a minute. The next life goes on
from the checkpoint, and a finished run must have the losses of one that nobody disturbed, with the
same number of processes. Prints a table and adds it to benchmarks/results/kills.json. Needs fork.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path

import torch
from kills import MODEL, RESULT, child, compare, outcome, state

from transformer_course import files
from transformer_course.data import get_batch
from transformer_course.gpt import GPT
from transformer_course.logs import LogFile, read_log
from transformer_course.parallel import global_batch, together
from transformer_course.stopping import Stopped, asked_to_stop
from transformer_course.training import TrainConfig, train

UPDATES, EVERY, PATIENCE = 60, 20, 30.0
STOPPED = 130  # how a run ends that was asked to stop
SIGNALS = [signal.SIGKILL, signal.SIGINT, signal.SIGTERM]
COUNTED = ['signals', 'kill', 'int', 'term', 'in_two_processes', 'runs', 'saved_on_request']
COUNTED += ['damaged', 'updates_lost_on_request', 'hangs', 'other_ends', 'losses_that_differ']
COUNTED += ['log_lines_wrong']


def train_one(folder):
    "One life of a run, in one process or as one of two; asked to stop, it saves and says so."
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # after the last update there is nothing to stop
    ids = torch.randint(20, (2000,), generator=torch.Generator().manual_seed(0))
    place = folder / 'checkpoint'
    resume = state(place) is not None
    try:
        with together(device='cpu') as parallel, asked_to_stop() as stop:
            (folder / f'ready-{parallel.rank}').touch()
            log = LogFile(folder / 'log.jsonl') if parallel.rank == 0 else None
            train(
                GPT(MODEL, torch.Generator().manual_seed(int(resume))),
                global_batch(lambda g: get_batch(ids, 4, 16, g), parallel),
                TrainConfig(max_iters=UPDATES, eval_interval=EVERY),
                validate=lambda m: m.lm_head.weight.sum().item() / parallel.world_size,
                on_step=log,
                on_eval=log and log.on_eval,
                folder=place,
                resume=resume,
                stop=stop,
                parallel=parallel,
            )
    except Stopped:
        os._exit(STOPPED)


def free_port():
    "A port of this machine that nobody uses."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def begin(folder, n):
    "Start one life in n processes: their ids."
    for old in folder.glob('ready-*'):
        old.unlink()
    env = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()), WORLD_SIZE=str(n))
    env |= dict(LOCAL_WORLD_SIZE=str(n))

    def life(rank):
        if n > 1:
            os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
        train_one(folder)

    return [child(lambda rank=rank: life(rank)) for rank in range(n)]


def ends(pids):
    "The exit statuses, and how many processes had to be killed because they did not end."
    until, left, codes, hung = time.monotonic() + PATIENCE, set(pids), [], 0
    while left:
        for pid in [*left]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes.append(os.waitstatus_to_exitcode(status))
                left.remove(pid)
        if left and time.monotonic() > until:
            hung += len(left)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            until = float('inf')
        time.sleep(0.005)
    return codes, hung


def log_of(folder):
    "What is in the log, as it lies there."
    path = folder / 'log.jsonl'
    return path.read_bytes() if path.exists() else b''


def look_at(folder, number, codes, found, log_before):
    "Count what a signal has left; a life that logged nothing has nothing to lose."
    try:
        saved = state(folder / 'checkpoint')
    except ValueError as e:
        found['damaged'] += 1
        print(e)
        shutil.rmtree(folder)
        folder.mkdir()
        return
    if number == signal.SIGKILL or set(codes) != {STOPPED}:
        return
    found['saved_on_request'] += 1
    if log_of(folder) != log_before:
        logged = [r['step'] for r in read_log(folder / 'log.jsonl') if 'loss' in r]
        done, kept = logged[-1] if logged else 0, saved['step'] if saved else 0
        found['updates_lost_on_request'] += done - kept


def wait_until_ready(folder, n, pids):
    "Until all processes of a life have joined and listen to signals; none may have died."
    while len(list(folder.glob('ready-*'))) < n and all(map(alive, pids)):
        time.sleep(0.005)


def alive(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def one_life(folder, n, dice, found, disturb):
    "Start, disturb at a random moment, and look; whether the run is finished."
    log_before, pids = log_of(folder), begin(folder, n)
    number = dice.choice(SIGNALS)
    if disturb:
        wait_until_ready(folder, n, pids)
        time.sleep(dice.uniform(0, 0.3))
        for pid in [dice.choice(pids)] if number == signal.SIGKILL else pids:
            os.kill(pid, number)
    codes, hung = ends(pids)
    found['hangs'] += hung
    if set(codes) == {0}:
        return True
    found['signals'] += 1
    found[number.name[3:].lower()] += 1
    found['in_two_processes'] += n == 2
    # the peer of a killed process ends with 1; one that ended in the same moment, with 0
    fine = {-signal.SIGKILL, 0, 1} if number == signal.SIGKILL else {STOPPED}
    if set(codes) - fine:
        found['other_ends'] += 1
        print(f'{number.name} in {n} processes: they ended with {codes}')
    look_at(folder, number, codes, found, log_before)
    return False


def finished(folder, good, found):
    "Compare a run that is done with the one that nobody disturbed, and make room for the next."
    differ, wrong = compare(folder, good)
    found['runs'] += 1
    found['losses_that_differ'] += differ
    found['log_lines_wrong'] += wrong
    shutil.rmtree(folder)


def random_signals(signals, seed=0):
    "Lives of a run in one process and of one in two, in turn; at last both come to their end."
    dice, found, began = random.Random(seed), dict.fromkeys(COUNTED, 0), time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        good, runs, lives = {}, {n: Path(root) / f'run-{n}' for n in (1, 2)}, 0
        for n in runs:
            (Path(root) / f'good-{n}').mkdir()
            ends(begin(Path(root) / f'good-{n}', n))
            good[n] = outcome(Path(root) / f'good-{n}')
        while found['signals'] < signals or any(folder.exists() for folder in runs.values()):
            n, disturb = 1 + lives % 2, found['signals'] < signals
            lives += 1
            if disturb:
                runs[n].mkdir(exist_ok=True)
            if runs[n].exists() and one_life(runs[n], n, dice, found, disturb):
                finished(runs[n], good[n], found)
    how = dict(updates_a_run=UPDATES, updates_a_checkpoint=EVERY, seed=seed)
    return found | how | dict(seconds=round(time.perf_counter() - began, 1))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--signals', type=int, default=60, help='signals at random moments')
    parser.add_argument('--seed', type=int, default=0, help='decides the moments')
    args = parser.parse_args()
    found = random_signals(args.signals, args.seed)
    for name, value in found.items():
        print(f'{name.replace("_", " "):26}{value}')
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    files.write_file(RESULT, json.dumps({**before, 'signals': found}, indent=1) + '\n')


if __name__ == '__main__':
    main()
