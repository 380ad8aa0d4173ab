"""Train beside nanoGPT: the time to its final loss, and the loss in its whole time.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/nanogpt.py --nanogpt nanoGPT            three seeds, interleaved; 25 minutes
    python benchmarks/nanogpt.py --nanogpt nanoGPT --runs 1   one seed

nanoGPT runs its own train.py with the CPU recipe of its README (4 layers, 4 heads, 128 wide,
context 64, 12 windows, 2000 updates), on one core. The course runs two recipes, `fast` and `long`.
Both were chosen on the last tenth of the *training* text (`--part tuning`), with other seeds than
those measured here; the losses quoted are over the whole validation text. Both recipes multiply in
bfloat16, which takes about two thirds of the time on a processor that has units for it (the result
says whether it has). nanoGPT's `train.py` has float32 alone on a CPU.
"""

import argparse, statistics

import peers

FAST = dict(
    model=dict(n_layer=2, n_head=2, n_embd=128, mlp_ratio=3.0, block_size=64),
    train=dict(
        max_iters=280,
        batch_size=12,
        dtype='bfloat16',
        learning_rate=1e-2,
        muon_lr=0.03,
        weight_decay=0.0,
        warmup_iters=10,
    ),
)
LONG = dict(
    model=dict(n_layer=4, n_head=4, n_embd=128, mlp_ratio=3.0, block_size=128),
    train=dict(
        max_iters=1480,
        batch_size=8,
        dtype='bfloat16',
        learning_rate=5e-3,
        muon_lr=0.02,
        weight_decay=0.1,
        warmup_iters=20,
    ),
)
SEEDS = (101, 102, 103, 104, 105)


CONTESTANTS = 'nanogpt', 'fast', 'long'


def race(checkout, text, seed, part):
    "All three on one seed, one after the other."
    row = dict(
        seed=seed,
        nanogpt=peers.nanogpt(checkout, text, seed, part=part),
        fast=peers.ours(text, seed, **FAST, part=part),
        long=peers.ours(text, seed, **LONG, part=part),
    )
    figures = [
        f"{k} {row[k]['loss']:.4f} nats in {row[k]['cpu_seconds']:.1f} s of CPU"
        for k in CONTESTANTS
    ]
    print(f'seed {seed}: {", ".join(figures)}', flush=True)
    return row


def show(mean, ratio):
    print(f"{'':10} {'loss':>8} {'CPU s':>8}")
    for name, m in mean.items():
        print(f"{name:10} {m['loss']:8.4f} {m['cpu_seconds']:8.1f}")
    if mean['fast']['loss'] <= mean['nanogpt']['loss']:
        print(f"fast reaches nanoGPT's loss in 1/{ratio:.1f} of its time")
    else:
        print("fast does not reach nanoGPT's loss")


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--nanogpt', required=True, help='a checkout of nanoGPT')
    parser.add_argument('--runs', type=int, default=3, help='seeds, at most 5')
    parser.add_argument('--part', choices=peers.PARTS, default='validation')
    parser.add_argument('--text', help='another text (UTF-8); nothing is written then')
    return parser.parse_args()


def main():
    args = arguments()
    with peers.text_file(args.text) as (text, source):
        print(source)
        rows = [race(args.nanogpt, text, seed, args.part) for seed in SEEDS[: args.runs]]
    average = lambda who, what: statistics.mean(row[who][what] for row in rows)
    mean = {k: {f: average(k, f) for f in ('loss', 'cpu_seconds')} for k in CONTESTANTS}
    ratio = mean['nanogpt']['cpu_seconds'] / mean['fast']['cpu_seconds']
    show(mean, ratio)
    if args.text or args.part != 'validation':
        return
    versions = peers.beside_nanogpt(args.nanogpt)
    recipes = dict(nanogpt=peers.NANOGPT_CPU, fast=FAST, long=LONG)
    measured = dict(mean=mean, ratio=ratio, runs=rows)
    about = dict(text=source, versions=versions, threads=1, recipes=recipes)
    peers.write('nanogpt', about | measured)


if __name__ == '__main__':
    main()
