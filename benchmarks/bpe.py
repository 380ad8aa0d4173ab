"""BPE beside Hugging Face's tokenizers, tiktoken and minbpe: time to learn 1,024 tokens, to encode.

    python benchmarks/bpe.py                         ours, Hugging Face, tiktoken: a minute
    git clone https://github.com/karpathy/minbpe
    python benchmarks/bpe.py --minbpe minbpe         minbpe too, on 100,000 characters
    python benchmarks/bpe.py --minbpe minbpe --slow  minbpe on the whole text: some minutes

Contestants take turns in one process, each on one thread, with everything from the text to the
tokens inside the clock. Before anything is printed, the results are compared: the same tokens as
Hugging Face's trainer (given our pieces, with a character for each byte, so that both break ties
alike), and the same ids from every encoder. minbpe breaks ties by what it saw first, so its tokens
are counted, not demanded; its encoder is given our merges. Writes benchmarks/results/bpe.json.

The file is not called tokenizers.py: Python would then import it where Hugging Face's package is
meant.
"""

import os

os.environ.update(RAYON_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', OMP_NUM_THREADS='1')
import argparse
import gc
import importlib
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import peers
import tiktoken

from transformer_course.sources import load_text
from transformer_course.tokenizer import PATTERN, BPETokenizer, learn_merges, split_pieces

VOCAB, SLICE = 1024, 100_000
# the bytes that GPT-2 writes as themselves (Radford 2019)
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))


def timed(function):
    "(what it returned, wall and CPU seconds)."
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, dict(seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)


def take_turns(contestants, runs):
    "Each contestant once, then each again, `runs` times: name -> (its last result, its timings)."
    results, rows = {}, {name: [] for name in contestants}
    for _ in range(runs):
        for name, function in contestants.items():
            results[name], row = timed(function)
            rows[name].append(row)
    return results, rows


def pairs_of(text, vocab_size):
    "The merges behind `BPETokenizer.train`, as pairs of ids."
    counts = Counter(split_pieces(text))
    return learn_merges({piece.encode(): n for piece, n in counts.items()}, vocab_size - 256)


def hf_trained_on_pieces(hf, text, vocab_size):
    "The tokens, as bytes, of Hugging Face's trainer on our pieces, a character for each byte."
    letters = [chr(0x400 + b) for b in range(256)]
    tokenizer = hf.Tokenizer(hf.models.BPE())
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(
        (''.join(letters[b] for b in p.encode()) for p in split_pieces(text)), trainer
    )
    vocab = tokenizer.get_vocab()
    return [bytes(ord(c) - 0x400 for c in t) for t in sorted(vocab, key=vocab.get)]


def hf_trained_on_text(hf, text, vocab_size):
    "Hugging Face's own way with a text: its splitter and its trainer, both in Rust."
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text],
        hf.trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer


def hf_with(hf, tokens, pairs):
    "Hugging Face's tokenizer with our tokens."
    rest = iter(range(256, 512))
    letter = [chr(b) if b in PRINTABLE else chr(next(rest)) for b in range(256)]
    names = [''.join(letter[b] for b in t) for t in tokens]
    tokenizer = hf.Tokenizer(
        hf.models.BPE(
            {name: i for i, name in enumerate(names)}, [(names[a], names[b]) for a, b in pairs]
        )
    )
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def minbpe_with(module, tokens, pairs):
    "minbpe's tokenizer with our tokens."
    tokenizer = module.RegexTokenizer(PATTERN)
    tokenizer.merges = {pair: 256 + i for i, pair in enumerate(pairs)}
    tokenizer.vocab = dict(enumerate(tokens))
    return tokenizer


def load_minbpe(path):
    "minbpe from a checkout: one module alone, as another one wants a file from the network."
    root = Path(path).resolve()
    if not (root / 'minbpe' / 'regex.py').is_file():
        raise ValueError(
            f'minbpe={str(path)!r} holds no minbpe/regex.py: '
            'give a checkout of github.com/karpathy/minbpe'
        )
    package = type(sys)('minbpe')  # an empty package: minbpe/__init__.py is left out
    package.__path__ = [str(root / 'minbpe')]
    sys.modules['minbpe'] = package
    return importlib.import_module('minbpe.regex')


def train_all(text, vocab_size, hf, runs):
    "Training on the whole text; raises where two results differ that must not."
    contestants = {'ours': lambda: BPETokenizer.train(text, vocab_size).tokens}
    if hf:
        contestants |= {
            'Hugging Face': lambda: hf_trained_on_text(hf, text, vocab_size),
            'Hugging Face, our pieces': lambda: hf_trained_on_pieces(hf, text, vocab_size),
        }
    results, rows = take_turns(contestants, runs)
    if hf and results['ours'] != results['Hugging Face, our pieces']:
        raise AssertionError("our tokens are not Hugging Face's")
    return results['ours'], rows


def train_beside_minbpe(text, vocab_size, minbpe):
    "One run of each on the same text: rows, and how many of minbpe's tokens are also ours."

    def theirs():
        tokenizer = minbpe.RegexTokenizer(minbpe.GPT2_SPLIT_PATTERN)
        tokenizer.train(text, vocab_size)
        return set(tokenizer.vocab.values())

    results, rows = take_turns(
        {'ours': lambda: BPETokenizer.train(text, vocab_size).tokens, 'minbpe': theirs}, 1
    )
    return rows, len(results['minbpe'] & set(results['ours']))


def encode_all(text, tokens, pairs, hf, runs):
    "Encoding the whole text; raises where the ids differ. Ours begins each run afresh."
    as_tiktoken = BPETokenizer(tokens).to_tiktoken()
    plain = tiktoken.Encoding(
        'plain',
        pat_str=PATTERN,
        mergeable_ranks={t: i for i, t in enumerate(tokens)},
        special_tokens={},
    )
    fresh = iter([BPETokenizer(tokens) for _ in range(runs)])
    contestants = {
        'ours': lambda: next(fresh).encode(text),
        'ours, to_tiktoken()': lambda: as_tiktoken.encode(text),
        'tiktoken': lambda: plain.encode(text),
    }
    if hf:
        theirs = hf_with(hf, tokens, pairs)
        contestants['Hugging Face'] = lambda: theirs.encode(text).ids
        without_places = lambda: theirs.encode_batch_fast([text])[0].ids
        contestants['Hugging Face, encode_batch_fast'] = without_places
    results, rows = take_turns(contestants, runs)
    for name, ids in results.items():
        if ids != results['ours']:
            raise AssertionError(f'{name} gives other ids than ours')
    return rows, len(results['ours'])


def encode_beside_minbpe(text, tokens, pairs, minbpe):
    "One run of each on the same text; raises where the ids differ."
    theirs, mine = minbpe_with(minbpe, tokens, pairs), BPETokenizer(tokens)
    results, rows = take_turns(
        {'ours': lambda: mine.encode(text), 'minbpe': lambda: theirs.encode_ordinary(text)}, 1
    )
    if results['ours'] != results['minbpe']:
        raise AssertionError('minbpe gives other ids than ours')
    return rows


def summary(rows, megabytes=None):
    "Medians of the runs; with `megabytes`, the speed in MB (1,000,000 bytes) a CPU second as well."
    middle = {}
    for name, runs in rows.items():
        middle[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        if megabytes:
            middle[name]['mb_per_cpu_second'] = megabytes / middle[name]['cpu_seconds']
    return dict(median=middle, runs=rows)


def table(title, part):
    "Print the medians of one part."
    print(f"{title:48}{'CPU s':>10}{'wall s':>10}{'MB/CPU s':>10}")
    for name, m in part['median'].items():
        speed = f"{m['mb_per_cpu_second']:10.2f}" if 'mb_per_cpu_second' in m else ''
        print(f"  {name:46}{m['cpu_seconds']:10.3f}{m['seconds']:10.3f}{speed}")


def megabytes(text):
    "The size of a text in MB, as UTF-8."
    return len(text.encode()) / 1e6


def on_the_whole_text(text, source, vocab_size, hf, runs):
    "Training and encoding, printed: (result, tokens, merges)."
    tokens, training = train_all(text, vocab_size, hf, runs)
    pairs = pairs_of(text, vocab_size)
    if [tokens[a] + tokens[b] for a, b in pairs] != tokens[256:]:
        raise AssertionError('the merges are not those of the tokens')
    encoding, ids = encode_all(text, tokens, pairs, hf, runs)
    result = dict(
        text=source,
        characters=len(text),
        vocab_size=vocab_size,
        ids=ids,
        threads=1,
        train=summary(training),
        encode=summary(encoding, megabytes(text)),
        tokens_equal_hugging_face=bool(hf),
        ids_equal=True,
    )
    table(f'{vocab_size:,} tokens learnt from {len(text):,} characters', result['train'])
    table('the same text encoded', result['encode'])
    return result, tokens, pairs


def beside_minbpe(part, vocab_size, tokens, pairs, minbpe):
    "Training and encoding next to minbpe, printed."
    training, same = train_beside_minbpe(part, vocab_size, minbpe)
    encoding = encode_beside_minbpe(part, tokens, pairs, minbpe)
    result = dict(
        characters=len(part),
        tokens_in_common=same,
        train=summary(training),
        encode=summary(encoding, megabytes(part)),
    )
    table(f'{vocab_size:,} tokens learnt from {len(part):,} characters', result['train'])
    table('the same characters encoded', result['encode'])
    print(f'  {same:,} of {vocab_size:,} tokens in common (ties are broken differently)')
    return result


def parsed(arguments):
    "The command line."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--minbpe', help='a checkout of minbpe')
    parser.add_argument('--slow', action='store_true', help='minbpe on the whole text')
    parser.add_argument('--runs', type=int, default=5)
    quick = '20,000 characters, 300 tokens, one run; writes nothing'
    parser.add_argument('--quick', action='store_true', help=quick)
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parsed(arguments)
    text, source = load_text()
    vocab_size, runs, length = VOCAB, args.runs, None if args.slow else SLICE
    if args.quick:
        text, vocab_size, runs, length = text[:20_000], 300, 1, 2_000
    try:
        hf = importlib.import_module('tokenizers')
    except ImportError:
        hf = None
    print(source if hf else f'{source}; Hugging Face left out: pip install tokenizers')
    result, tokens, pairs = on_the_whole_text(text, source, vocab_size, hf, runs)
    checkouts = {}
    if args.minbpe:
        minbpe = load_minbpe(args.minbpe)
        checkouts['minbpe'] = peers.checkout_version(args.minbpe)
        result['minbpe'] = beside_minbpe(text[:length], vocab_size, tokens, pairs, minbpe)
    packages = ['tiktoken', 'regex', 'tokenizers'] if hf else ['tiktoken', 'regex']
    result['versions'] = peers.versions(*packages, **checkouts)
    print(result['versions'])
    if not args.quick:
        peers.write('bpe', result)
    return result


if __name__ == '__main__':
    main()
