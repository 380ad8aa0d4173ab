"""Peak memory: of the main job, of sampling from a model of GPT-2's shape, and of encoding a stream
of 200 MB that nowhere exists as a whole.

    python benchmarks/memory.py                  three runs of each; some minutes
    python benchmarks/memory.py --megabytes 20   a shorter stream; nothing is written then

The main job's peak does not depend on its number of updates, so it is measured on a short one, with
the evaluation and the sample that belong to it; the whole job's peak is in main_job.json. The
stream is made of words drawn from 200,000 different ones as they are needed (the frequent ones as
frequent as in a language, by Zipf's law), so the tokenizer's memory of pieces fills and is emptied
many times. What is quoted is the growth: the highest resident
memory while encoding, less the resident memory just before (imports, the tokenizer and the words).
Sampling is a process of its own that loads a checkpoint of random weights in GPT-2's shape, with
floats or with weights of one byte, and writes 32 tokens; its peak is that of the whole process,
Python and torch included. Linux only: it reads /proc. Writes benchmarks/results/memory.json.
"""

import argparse
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import main_job
import peers

CHUNK_WORDS, WORDS, UPDATES = 700, 200_000, 60


def resident(name):
    "A figure of this process in megabytes (1,048,576 bytes): VmRSS now, VmHWM at its highest."
    found = re.search(rf'^{name}:\s+(\d+) kB', Path('/proc/self/status').read_text(), re.M)
    return int(found[1]) / 1024


def words(n=WORDS, seed=0):
    "n different made-up words of 2 to 12 letters."
    rng, found = random.Random(seed), {}
    letters, frequent = 'etaoinshrdlucmfwypvbgkjqxz', range(26, 0, -1)
    while len(found) < n:
        word = rng.choices(letters, frequent, k=rng.randint(2, 12))
        found[''.join(word)] = None
    return [*found]


def stream(vocabulary, megabytes, seed=0):
    "Chunks of text, `megabytes` * 1,000,000 characters in all, made as they are asked for."
    rng, left = random.Random(seed), int(megabytes * 1_000_000)
    weights = [*itertools.accumulate(1 / rank for rank in range(1, len(vocabulary) + 1))]
    while left:
        chunk = ' '.join(rng.choices(vocabulary, cum_weights=weights, k=CHUNK_WORDS)) + '.\n'
        yield chunk[:left]
        left -= len(chunk[:left])


def encode_stream(megabytes):
    "What a child process does: encode the stream and report the growth of its memory."
    from transformer_course.sources import load_text
    from transformer_course.tokenizer import BPETokenizer

    tokenizer, vocabulary = BPETokenizer.train(load_text().text[:200_000], 1024), words()
    chunks = stream(vocabulary, megabytes)
    next(chunks)  # the weights exist from here on
    try:
        # forget the peak of the imports, or it would hide ours
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        pass
    before, began = resident('VmRSS'), time.process_time()
    ids = sum(1 for _ in tokenizer.encode_stream(chunks))
    return dict(
        growth_mb=round(resident('VmHWM') - before, 1),
        before_mb=round(before, 1),
        ids=ids,
        cpu_seconds=round(time.process_time() - began, 1),
    )


def in_a_process(what, *args):
    "What this script prints when it is started anew with some arguments, as JSON."
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, __file__, *map(str, args)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
    if done.returncode:
        sys.exit(f'the process that {what} ended with status {done.returncode}')
    return json.loads(done.stdout)


def stream_memory(megabytes):
    "`encode_stream` in a process of its own."
    return in_a_process('encodes', '--child', megabytes)


def sample_once(folder, int8):
    "What a child process does: load the checkpoint, write 32 tokens, report the peak."
    import torch
    from transformer_course.generation import generate

    if int8:
        from transformer_course.int8 import load_int8 as load
    else:
        from transformer_course.checkpoint import load_model as load
    model, _ = load(folder)
    generate(model, torch.ones(1, 1).long(), 32, temperature=0)
    return dict(peak_memory_mb=round(resident('VmHWM')))


def sampling_memory(runs):
    "The peaks of `sample_once`, from one checkpoint."
    import torch
    from transformer_course.checkpoint import save_checkpoint
    from transformer_course.gpt import GPT, GPTConfig

    found = {'floats': [], 'int8': []}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / 'checkpoint'
        save_checkpoint(place, GPT(GPTConfig(), torch.Generator().manual_seed(0)))
        for _ in range(runs):
            for how, peaks in found.items():
                peaks.append(in_a_process('samples', '--sample', how, place))
    return found


def summary(runs, *keys):
    return dict(median={k: statistics.median(r[k] for r in runs) for k in keys}, runs=runs)


def measure(runs, megabytes):
    "Every figure, `runs` times."
    streams, jobs = [], []
    for i in range(runs):
        streams.append(stream_memory(megabytes))
        growth, seconds = (streams[-1][k] for k in ('growth_mb', 'cpu_seconds'))
        print(f'run {i + 1}: {megabytes:g} MB encoded, growth {growth} MB, {seconds} s of CPU')
        job = main_job.run(['--max_iters', str(UPDATES), '--eval_interval', str(UPDATES)])
        jobs.append({k: job[k] for k in ('peak_memory_mb', 'cpu_seconds', 'text')})
        peak = job['peak_memory_mb']
        print(f'run {i + 1}: main job of {UPDATES} updates, peak {peak} MB', flush=True)
    sampling = sampling_memory(runs)
    return dict(
        versions=peers.versions(),
        stream=dict(megabytes=megabytes, **summary(streams, 'growth_mb', 'cpu_seconds')),
        main_job=dict(updates=UPDATES, text=jobs[0]['text'], **summary(jobs, 'peak_memory_mb')),
        sampling={how: summary(found, 'peak_memory_mb') for how, found in sampling.items()},
    )


def show(result):
    "The table of medians."
    stream, job = result['stream'], result['main_job']
    name = f'stream of {stream["megabytes"]:g} MB, growth'
    print(f'{name:40}{stream["median"]["growth_mb"]:8.1f} MB')
    for how, part in result['sampling'].items():
        name = f'sampling, GPT-2 shape, {how}'
        print(f'{name:40}{part["median"]["peak_memory_mb"]:8.1f} MB')
    print(f'{"main job, peak":40}{job["median"]["peak_memory_mb"]:8.1f} MB')


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--runs', type=int, default=3)
    parser.add_argument('--megabytes', type=float, default=200)
    parser.add_argument('--child', type=float, help=argparse.SUPPRESS)
    parser.add_argument('--sample', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.sample:
        return print(json.dumps(sample_once(args.sample[1], args.sample[0] == 'int8')))
    if args.child:
        return print(json.dumps(encode_stream(args.child)))
    result = measure(args.runs, args.megabytes)
    show(result)
    if args.megabytes == 200:
        peers.write('memory', result)


if __name__ == '__main__':
    main()
