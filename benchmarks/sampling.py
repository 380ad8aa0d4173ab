"""Tokens per second at batch 1, greedy: nanoGPT, Hugging Face and this library.

    python benchmarks/sampling.py --nanogpt PATH    a checkout of karpathy/nanoGPT; or without it
    python benchmarks/sampling.py --quick           every path on a tiny model, in seconds

This library comes with floats and with weights of one byte, and all are interleaved. Random
weights, the same shape for all. All shapes on one thread, and GPT-2's also with a thread for each
core, as all of them run when nobody asks for a number of threads. Rounds go on until the distance
between the quartiles of every row is below 5 % of its median. Also measured in every round: how
fast one core reads a long row of numbers that it only has to add up, which bounds what a model that
does not fit in the cache can do. Prints a table and writes benchmarks/results/sampling.json.
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import peers
import torch
from transformer_course.generation import generate
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.int8 import to_int8
from transformer_course.layout import by_columns

STEADY = 0.05  # the spread below which a row is quoted
RESULT = Path(__file__).parent / 'results' / 'sampling.json'
MODERN = dict(
    mlp_ratio=3.0,
    bias=False,
    position='rotary',
    norm='plain',
    embed_norm=True,
    activation='relu2',
    qk_norm=True,
    attn_scale=1.3,
    tie_weights=False,
    smear=True,
)
CORES = sorted({1, os.cpu_count() or 1})
SHAPES = dict(
    small=(dict(block_size=256, vocab_size=65, n_layer=4, n_head=4, n_embd=128), 250, [1]),
    gpt2=(dict(), 40, CORES),
)
QUICK = dict(small=(dict(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=16), 5, [1]))


def nanogpt(path, shape):
    "nanoGPT's own model; it has no greedy mode, so the likeliest of one candidate is drawn."
    spec = importlib.util.spec_from_file_location('nanogpt_model', Path(path) / 'model.py')
    module = sys.modules['nanogpt_model'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = {
        k: getattr(GPTConfig(**shape), k)
        for k in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'bias')
    }
    model = module.GPT(module.GPTConfig(**config)).eval()
    return lambda idx, n: model.generate(idx, n, top_k=1)


def hugging_face(shape):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        from transformers import GPT2Config, GPT2LMHeadModel
    c = GPTConfig(**shape)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.block_size,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()
    return lambda idx, n: model.generate(
        idx, max_new_tokens=n, do_sample=False, use_cache=True, attention_mask=torch.ones_like(idx)
    )


def ours(shape, use_cache=True, int8=False):
    model = GPT(GPTConfig(**shape), torch.Generator().manual_seed(0)).eval()
    if int8:
        to_int8(model)
    by_columns(model)  # as `transformer-course sample` does
    return lambda idx, n: generate(model, idx, n, temperature=0, use_cache=use_cache)


def bandwidth(numbers=50257 * 768, tries=3):
    "Bytes per second of adding up more numbers than the caches hold, the best of some tries."
    w, best = torch.rand(numbers), 0.0
    for _ in range(tries):
        began = time.perf_counter()
        w.sum()
        best = max(best, w.numel() * 4 / (time.perf_counter() - began))
    return best


def contestants_for(name, shape, checkout):
    "Name -> a function of (ids, number of new tokens), for one shape."
    found = {'nanoGPT': nanogpt(checkout, shape)} if checkout else {}
    if importlib.util.find_spec('transformers') is not None:
        found['Hugging Face, cache'] = hugging_face(shape)
    found |= {
        'ours, no cache': ours(shape, False),
        'ours': ours(shape),
        'ours, int8 weights': ours(shape, int8=True),
    }
    if name == 'small':
        found['ours, modern fields'] = ours(shape | MODERN)
    return found


def spread(speeds):
    "The distance between the quartiles, as a share of the median."
    if len(speeds) < 4:
        return math.inf
    low, _, high = statistics.quantiles(speeds, n=4)
    return (high - low) / statistics.median(speeds)


def one_round(contestants, n):
    "Each contestant once, one after another, so that a slow minute hits all: tokens a second."
    speeds, idx = {}, torch.ones(1, 1).long()
    for peer, run in contestants.items():
        began = time.perf_counter()
        with torch.inference_mode():  # as `transformer-course sample` does; the others gain as well
            assert run(idx, n).shape[1] == n + 1
        speeds[peer] = n / (time.perf_counter() - began)
    return speeds


def measure(contestants, n, threads, least, most):
    "Rounds until every row's spread is below 5 %, at least `least`, at most `most` of them."
    rows, reads = {peer: [] for peer in contestants}, []
    torch.set_num_threads(threads)
    one_round(contestants, 2)  # warm up
    while len(reads) < least or (len(reads) < most and max(map(spread, rows.values())) >= STEADY):
        for peer, speed in one_round(contestants, n).items():
            rows[peer].append(speed)
        reads.append(bandwidth())
    return rows, reads


def summary(rows):
    "Median, spread and every round of each contestant."
    return {
        peer: dict(
            median=dict(tokens_per_second=statistics.median(speeds)),
            spread=spread(speeds),
            runs=[dict(tokens_per_second=speed) for speed in speeds],
        )
        for peer, speeds in rows.items()
    }


def bound(rows, reads):
    "How fast a core reads, and which share of what that allows ours reaches, round by round."
    weights = 4 * (GPTConfig().vocab_size * 768 + 12 * 12 * 768**2)
    shares = [speed * weights / read for speed, read in zip(rows['ours'], reads)]
    return dict(
        bytes_per_second=statistics.median(reads),
        weight_bytes=weights,
        share_of_bound=statistics.median(shares),
    )


def parsed():
    "The command line."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--nanogpt')
    parser.add_argument('--rounds', type=int, default=5, help='at least so many')
    parser.add_argument('--most', type=int, default=20, help='at most so many')
    parser.add_argument('--quick', action='store_true')
    parser.add_argument('--out', type=Path, default=RESULT)
    args = parser.parse_args()
    if args.nanogpt and not (Path(args.nanogpt) / 'model.py').is_file():
        sys.exit(
            f'--nanogpt {args.nanogpt}: no model.py there; give a checkout of karpathy/nanoGPT'
        )
    return args


def main():
    args, table, more = parsed(), {}, {}
    least, most = (1, 1) if args.quick else (args.rounds, args.most)
    for name, (shape, n, threads) in (QUICK if args.quick else SHAPES).items():
        contestants = contestants_for(name, shape, args.nanogpt)
        for many in threads:
            key = f"{name}, {many} thread{'s' * (many > 1)}"
            rows, reads = measure(contestants, n, many, least, most)
            table[key] = summary(rows)
            for peer, row in table[key].items():
                speed = row['median']['tokens_per_second']
                said = f"{speed:9.1f} tokens per second, spread {row['spread']:.1%}"
                print(f'{key:16} {peer:22} {said}')
            if key == 'gpt2, 1 thread':
                more = bound(rows, reads)
    packages = [p for p in ('transformers',) if importlib.util.find_spec(p) is not None]
    checkout = dict(nanogpt=peers.checkout_version(args.nanogpt)) if args.nanogpt else {}
    result = dict(table=table, versions=peers.versions(*packages, **checkout), **more)
    print(result['versions'])
    if more:
        share = f"ours reaches {more['share_of_bound']:.0%} of that bound"
        print(f"one core reads {more['bytes_per_second'] / 1e9:.1f} GB/s; {share}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
