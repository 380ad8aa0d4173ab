"""Keep what a training run has measured as a small file: settings, losses, how long it took.

    python tools/keep_run.py out/checkpoint transformer_course/course/runs/shakespeare_cpu.json

Reads `checkpoint.json` of a run that has ended, and the log beside the checkpoint, which holds
the loss of each update; the weights are checked and not kept.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

from cells import ROOT

sys.path.insert(0, str(ROOT))
from transformer_course.checkpoint import verified_checkpoint
from transformer_course.files import write_file
from transformer_course.logs import read_log


def summary(folder):
    "The record of the run whose checkpoint lies in `folder`."
    import torch

    about, _ = verified_checkpoint(folder)
    history, train = about['history'], about['train']
    if about['step'] < train['max_iters']:
        at = f'step {about["step"]} of {train["max_iters"]}'
        mend = 'let the run end first, with transformer-course train --resume'
        raise ValueError(f'{str(folder)!r} is at {at}: {mend}')
    log = folder.parent / 'log.jsonl'
    if not log.exists():
        mend = 'give a run that was logged, with --log'
        raise ValueError(f'{str(log)!r} is not there, and it holds the losses: {mend}')
    losses = [r['loss'] for r in read_log(log) if 'loss' in r]
    tail = losses[-max(1, len(losses) // 30) :]
    return dict(
        model=about['config'],
        train=train,
        text=about['text']['source'],
        val=history['val'],
        training_loss_at_the_end=sum(tail) / len(tail),
        seconds=round(history['seconds'], 1),
        tokens=history['tokens'],
        cores=os.cpu_count(),
        python=platform.python_version(),
        torch=torch.__version__.split('+')[0],
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('to', type=Path)
    args = parser.parse_args(arguments)
    try:
        record = summary(args.checkpoint)
    except ValueError as e:
        sys.exit(f'keep_run: {e}')
    write_file(args.to, json.dumps(record, indent=1) + '\n')
    print(f"{args.to}: {record['val'][-1][1]:.4f} after {record['seconds'] / 60:.0f} minutes")


if __name__ == '__main__':
    main()
