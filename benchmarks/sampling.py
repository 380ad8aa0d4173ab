"""Tokens per second at batch 1, greedy, one thread: nanoGPT, Hugging Face and this library.

    python benchmarks/sampling.py --nanogpt PATH    a checkout of karpathy/nanoGPT; or without it
    python benchmarks/sampling.py --quick           every path on a tiny model, in seconds

This library comes with floats and with weights of one byte, and all are interleaved. Random
weights, the same shape for all. Also measured in the same run: how fast one core reads a big
matrix for a matrix-vector product, which bounds what a model that does not fit in the cache can
do. Prints a table and writes benchmarks/results/sampling.json.
"""

import argparse, importlib.util, json, os, statistics, sys, time, warnings
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import peers
import torch
from transformer_course.generation import generate
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.int8 import to_int8

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
SHAPES = dict(
    small=(dict(block_size=256, vocab_size=65, n_layer=4, n_head=4, n_embd=128), 250),
    gpt2=(dict(), 40),
)
QUICK = dict(small=(dict(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=16), 5))


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
    return lambda idx, n: generate(model, idx, n, temperature=0, use_cache=use_cache)


def bandwidth(rows=50257, columns=768):
    "Bytes per second of a matrix-vector product over more than the caches, the best of five."
    w, x, best = torch.rand(rows, columns), torch.rand(columns), 0.0
    for _ in range(5):
        began = time.perf_counter()
        torch.mv(w, x)
        best = max(best, w.numel() * 4 / (time.perf_counter() - began))
    return best


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--nanogpt')
    parser.add_argument('--runs', type=int, default=5)
    parser.add_argument('--quick', action='store_true')
    parser.add_argument('--out', type=Path, default=RESULT)
    args = parser.parse_args()
    if args.nanogpt and not (Path(args.nanogpt) / 'model.py').is_file():
        sys.exit(
            f'--nanogpt {args.nanogpt}: no model.py there; give a checkout of karpathy/nanoGPT'
        )
    torch.set_num_threads(1)
    has_hf = importlib.util.find_spec('transformers') is not None
    table = {}
    for name, (shape, n) in (QUICK if args.quick else SHAPES).items():
        contestants = {'nanoGPT': nanogpt(args.nanogpt, shape)} if args.nanogpt else {}
        if has_hf:
            contestants['Hugging Face, cache'] = hugging_face(shape)
        contestants |= {
            'ours, no cache': ours(shape, False),
            'ours': ours(shape),
            'ours, int8 weights': ours(shape, int8=True),
        }
        if name == 'small':
            contestants['ours, modern fields'] = ours(shape | MODERN)
        idx, runs = torch.ones(1, 1).long(), {peer: [] for peer in contestants}
        for peer in contestants.values():
            peer(idx, 2)  # warm up
        for _ in range(1 if args.quick else args.runs):  # interleaved: a slow minute hits all
            for peer, run in contestants.items():
                began = time.perf_counter()
                assert run(idx, n).shape[1] == n + 1
                runs[peer].append(dict(tokens_per_second=n / (time.perf_counter() - began)))
        table[name] = {
            peer: dict(
                median=dict(
                    tokens_per_second=statistics.median(r['tokens_per_second'] for r in rows)
                ),
                runs=rows,
            )
            for peer, rows in runs.items()
        }
        for peer, row in table[name].items():
            print(f"{name:6} {peer:22} {row['median']['tokens_per_second']:9.1f} tokens per second")
    checkout = dict(nanogpt=peers.checkout_version(args.nanogpt)) if args.nanogpt else {}
    result = dict(
        table=table,
        versions=peers.versions(*(['transformers'] if has_hf else []), **checkout),
        threads=1,
    )
    print(result['versions'])
    if not args.quick:
        weights = 4 * (GPTConfig().vocab_size * 768 + 12 * 12 * 768**2)
        result |= dict(bytes_per_second=bandwidth(), weight_bytes=weights)
        speed, reads = (
            table['gpt2']['ours']['median']['tokens_per_second'],
            result['bytes_per_second'],
        )
        share = result['share_of_bound'] = speed * weights / reads
        print(f"one core reads {reads / 1e9:.1f} GB/s; ours reaches {share:.0%} of that bound")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
