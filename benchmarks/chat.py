"""SmolLM2-135M on one thread: this library in floats and in bytes, Hugging Face, llama.cpp.

    python benchmarks/chat.py                    about three and a half minutes
    python benchmarks/chat.py --gguf FILE        another Llama, of any size

Greedy, one text at a time. Writing: 64 tokens after a prompt of 16. Reading: a prompt of 256 and
one token. All contestants take turns, and rounds go on until the distance between the quartiles of
every row is below 5 % of its median, or two and a half minutes are over. Hugging Face has the same
numbers in floats, and has to write the same tokens. llama.cpp (`pip install xllamacpp`) runs the
file as it is, with weights of four bits, and is left out where it is not installed. Then each of
them once more in a process of its own, for its peak memory, Python and imports included (Linux
only). Prints a table and writes benchmarks/results/chat.json.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
import peers
import torch
from sampling import STEADY, spread, summary
from transformer_course.fetching import SourceError
from transformer_course.generation import generate
from transformer_course.layout import by_columns
from transformer_course.llama import HUB_NAMES, name_table
from transformer_course.smollm import load_llama, smollm2_file

RESULT = peers.RESULTS / 'chat.json'
SECONDS = 150  # after which no new round begins
TASKS = dict(write=(16, 64), read=(256, 1))  # tokens of the prompt, tokens to write


def ours(path, int8=False):
    "Tokens after a prompt, by `generate`, as `transformer-course chat` has the model."
    model, _ = load_llama(path, int8=int8)
    by_columns(model.requires_grad_(False))
    return lambda ids, n: generate(model, torch.tensor([ids]), n, temperature=0)[0, -n:].tolist()


def hugging_face(path):
    "The same weights, a copy of them, in Hugging Face's class."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        from transformers import LlamaConfig, LlamaForCausalLM
    model = load_llama(path)[0].requires_grad_(False)
    c, own, given = model.config, model.state_dict(), {}
    kv = c.n_embd // c.n_head * c.n_kv_head
    for name, theirs in name_table(c, HUB_NAMES).items():
        sizes = [c.n_embd, kv, kv] if len(theirs) == 3 else [len(own[name])]
        given |= {t: w.clone() for t, w in zip(theirs, own[name].split(sizes))}
    given.setdefault('lm_head.weight', given['model.embed_tokens.weight'])
    sizes = dict(vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_inner)
    sizes |= dict(num_hidden_layers=c.n_layer, num_attention_heads=c.n_head)
    sizes |= dict(num_key_value_heads=c.n_kv_head, rms_norm_eps=c.norm_eps)
    sizes |= dict(tie_word_embeddings=c.tie_weights, max_position_embeddings=c.block_size)
    rope = dict(rope_type='default', rope_theta=c.rope_base)
    config = LlamaConfig(rope_parameters=rope, bos_token_id=0, eos_token_id=None, **sizes)
    with torch.device('meta'):
        llama = LlamaForCausalLM(config)
    llama.load_state_dict(given, assign=True)
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config)
    llama.eval()

    def write(ids, n):
        idx = torch.tensor([ids])
        how = dict(max_new_tokens=n, do_sample=False, pad_token_id=0)
        return llama.generate(idx, attention_mask=torch.ones_like(idx), **how)[0, -n:].tolist()

    return write


def llama_cpp(path):
    "The file as it is in llama.cpp, on one thread of the processor."
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = str(path), 512, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.verbosity = -1
    server = xllamacpp.Server(params)

    def write(ids, n):
        how = dict(max_tokens=n, temperature=0, ignore_eos=True, cache_prompt=False)
        done = server.handle_completions(dict(prompt=ids, **how))
        done = json.loads(done) if isinstance(done, str) else done
        return [None] * done['usage']['completion_tokens']  # it gives text, not ids

    return write


CONTESTANTS = {
    'ours, floats': ours,
    'ours, int8': lambda path: ours(path, int8=True),
    'Hugging Face, floats': hugging_face,
    'llama.cpp, the file as it is': llama_cpp,
}
NEEDED = {'Hugging Face, floats': 'transformers', 'llama.cpp, the file as it is': 'xllamacpp'}


def installed():
    "The contestants that can be had here."
    there = lambda name: name not in NEEDED or importlib.util.find_spec(NEEDED[name])
    return [name for name in CONTESTANTS if there(name)]


def prompt_of(length):
    "Ids that every Llama has, in an order without a pattern."
    generator = torch.Generator().manual_seed(0)
    return [0, *torch.randint(3, 40, (length - 1,), generator=generator).tolist()]


def one_round(contestants, tasks):
    "Each contestant once on each task: tokens a second, read ones for reading."
    speeds, written = {task: {} for task in tasks}, {}
    for task, (length, n) in tasks.items():
        ids = prompt_of(length)
        for name, write in contestants.items():
            began = time.perf_counter()
            with torch.inference_mode():  # as the commands do; Hugging Face gains by it as well
                out = write(ids, n)
            seconds = time.perf_counter() - began
            assert len(out) == n, f'{name} wrote {len(out)} tokens, not {n}'
            speeds[task][name] = (n if n > 1 else length) / seconds
            written[task, name] = out
    return speeds, written


def check_equal(written, tasks):
    "Hugging Face and ours in floats write the same."
    for task in tasks:
        if (task, 'Hugging Face, floats') in written:
            a, b = written[task, 'ours, floats'], written[task, 'Hugging Face, floats']
            assert a == b, f'{task}: Hugging Face wrote other tokens than ours'


def measure(contestants, tasks, least, most, seconds=SECONDS):
    "Rounds, interleaved, until the rows are steady or the time is over."
    check_equal(one_round(contestants, tasks)[1], tasks)  # it warms up, too
    rows = {task: {name: [] for name in contestants} for task in tasks}
    began, rounds = time.perf_counter(), 0
    while rounds < least or (rounds < most and time.perf_counter() - began < seconds):
        for task, speeds in one_round(contestants, tasks)[0].items():
            for name, speed in speeds.items():
                rows[task][name].append(speed)
        rounds += 1
        worst = max(spread(row) for of_task in rows.values() for row in of_task.values())
        if rounds >= least and worst < STEADY:
            break
    return rows


def peak(name, path, n):
    "Megabytes (10**6 bytes) of a fresh process that loads one contestant and writes n tokens."
    command = [sys.executable, __file__, '--alone', name, '--gguf', path, '--tokens', n]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'{name}: {done.stderr.strip().splitlines()[-1]}')
    return float(done.stdout.split()[-1])


def alone(name, path, n):
    "What that process does."
    CONTESTANTS[name](path)(prompt_of(16), n)
    status = Path('/proc/self/status').read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in status if line.startswith('VmHWM'))
    print(kilobytes * 1024 / 1e6)


def parsed(words):
    "The command line."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--gguf', type=Path, help='default: SmolLM2-135M-Instruct')
    parser.add_argument('--rounds', type=int, default=5, help='at least so many')
    parser.add_argument('--most', type=int, default=15, help='at most so many')
    parser.add_argument('--tokens', type=int, default=64, help='to write')
    parser.add_argument('--out', type=Path, default=RESULT)
    parser.add_argument('--alone', choices=CONTESTANTS, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words=None):
    args = parsed(words)
    torch.set_num_threads(1)
    try:
        path = args.gguf or smollm2_file()
    except SourceError as e:
        sys.exit(f'the model cannot be had: {e}')
    if args.alone:
        return alone(args.alone, path, args.tokens)
    room = load_llama(path)[0].config.block_size - 1
    tasks = {k: [min(t, room - args.tokens), min(n, args.tokens)] for k, (t, n) in TASKS.items()}
    contestants = {name: CONTESTANTS[name](path) for name in installed()}
    rows = measure(contestants, tasks, args.rounds, args.most)
    memory = {}
    if sys.platform == 'linux':
        memory = {name: peak(name, path, args.tokens) for name in contestants}
    table = {task: summary(of_task) for task, of_task in rows.items()}
    for task, of_task in table.items():
        for name, row in of_task.items():
            speed = row['median']['tokens_per_second']
            print(f'{task:6} {name:30} {speed:8.1f} tokens per second, spread {row["spread"]:.1%}')
    for name, megabytes in memory.items():
        print(f'peak   {name:30} {megabytes:8.0f} MB')
    packages = [p for p in ('transformers', 'xllamacpp') if importlib.util.find_spec(p)]
    result = dict(table=table, peak_memory_mb=memory, tasks=tasks, threads=1)
    result |= dict(model=Path(path).name, versions=peers.versions(*packages))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
    return result


if __name__ == '__main__':
    main()
