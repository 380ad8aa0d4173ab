"""Keep what a training run has measured as a small file: its settings, its losses, how long it took, with what.

    python tools/keep_run.py out/checkpoint results/runs/shakespeare_cpu.json

Reads `checkpoint.json` of a run that has ended; the weights are checked and not kept.
"""

import argparse, json, os, platform, sys
from pathlib import Path

from transformer_course.checkpoint import verified_checkpoint


def summary(folder):
    "The record of the run whose checkpoint lies in `folder`."
    import torch

    about, _ = verified_checkpoint(folder)
    history, train = about['history'], about['train']
    if about['step'] < train['max_iters']:
        raise ValueError(
            f'{str(folder)!r} is at step {about["step"]} of {train["max_iters"]}: let the run end first, with transformer-course train --resume'
        )
    losses, tail = history['losses'], max(1, len(history['losses']) // 30)
    return dict(
        model=about['config'],
        train=train,
        text=about['text']['source'],
        val=history['val'],
        training_loss_at_the_end=sum(losses[-tail:]) / tail,
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
    args.to.parent.mkdir(parents=True, exist_ok=True)
    args.to.write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')
    print(f"{args.to}: {record['val'][-1][1]:.4f} after {record['seconds'] / 60:.0f} minutes")


if __name__ == '__main__':
    main()
