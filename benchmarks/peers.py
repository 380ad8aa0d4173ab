"""What the comparisons share: text and split, nanoGPT's `train.py`, the course's `train`, results.

Every training runs in a process of its own, on one thread, and is charged the CPU seconds of its
training loop alone: imports, reading the text and the evaluation afterwards are outside. Both
models are then evaluated by the same function, over the whole of the held-out part, in consecutive
windows of the context they were trained with.
"""

import contextlib
import io
import json
import os
import pickle
import platform
import runpy
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parent / 'results'
NANOGPT_CPU = dict(
    n_layer=4,
    n_head=4,
    n_embd=128,
    block_size=64,
    batch_size=12,
    max_iters=2000,
    lr_decay_iters=2000,
    dropout=0.0,
)
PARTS = ('validation', 'tuning')


def bfloat16_units():
    "Whether the processor multiplies numbers of sixteen bits itself."
    import torch

    units = torch.cpu.get_capabilities()
    return any(units.get(name, False) for name in ('avx512_bf16', 'amx_bf16', 'arm_bf16'))


def versions(*packages, **more):
    "What a result depends on: Python, torch, the processor's cores, and the named packages."
    return dict(
        python=platform.python_version(),
        cores=os.cpu_count(),
        **{p: metadata.version(p).split('+')[0] for p in ('torch', *packages)},
        **more,
    )


def checkout_version(path):
    "The commit of a checkout, or what is known instead."
    done = subprocess.run(['git', '-C', path, 'rev-parse', 'HEAD'], capture_output=True, text=True)
    top = subprocess.run(
        ['git', '-C', path, 'rev-parse', '--show-toplevel'], capture_output=True, text=True
    ).stdout.strip()
    if done.returncode == 0 and Path(top).resolve() == Path(path).resolve():
        return done.stdout.strip()[:12]
    return 'a folder without history'


def beside_nanogpt(checkout):
    "`versions` for trainings beside nanoGPT's; in which numbers the recipes multiply counts, too."
    units = {'bfloat16 units': bfloat16_units()}
    return versions(nanogpt=checkout_version(checkout), **units)


def split(text, part='validation'):
    "(tokenizer, training ids, held-out ids); `tuning` holds out the end of the *training* text."
    import torch
    from transformer_course.data import CharTokenizer, train_val_split

    tokenizer = CharTokenizer.train(text)
    train, val = train_val_split(torch.tensor(tokenizer.encode(text)))
    if part == 'tuning':
        train, val = train_val_split(train)
    return tokenizer, train, val


def lay_out(checkout, tokenizer, train, val):
    "Make the present folder what nanoGPT's `train.py` expects: its data and its own files."
    Path('data/shakespeare_char').mkdir(parents=True)
    for name, ids in dict(train=train, val=val).items():
        ids.numpy().astype('uint16').tofile(f'data/shakespeare_char/{name}.bin')
    with open('data/shakespeare_char/meta.pkl', 'wb') as f:
        pickle.dump(dict(vocab_size=tokenizer.vocab_size), f)  # train.py reads it
    for name in ('configurator.py', 'config'):
        os.symlink(checkout / name, name)


def run_train_py(checkout, settings, seed):
    "Run nanoGPT's `train.py` in the present folder, with another seed: its CPU seconds."
    import torch

    flags = {
        **settings,
        'device': 'cpu',
        'compile': False,
        'eval_iters': 1,
        'eval_interval': settings['max_iters'],
        'log_interval': 10**9,
        'always_save_checkpoint': True,
        'out_dir': 'out',
    }
    config = 'config/train_shakespeare_char.py'
    sys.argv = ['train.py', config, *(f'--{k}={v}' for k, v in flags.items())]
    plain_seed = torch.manual_seed
    torch.manual_seed = lambda own: plain_seed(own + seed)
    began = time.process_time()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            runpy.run_path(str(checkout / 'train.py'), run_name='__main__')
    finally:
        torch.manual_seed = plain_seed
    return time.process_time() - began


def run_nanogpt(job):
    "nanoGPT's own, unchanged `train.py`, with evaluations of one batch, and another seed."
    import torch
    from transformer_course.bigram import evaluate

    torch.set_num_threads(1)
    checkout, settings = Path(job['path']).resolve(), {**NANOGPT_CPU, **job.get('settings', {})}
    tokenizer, train, val = split(Path(job['text']).read_text(encoding='utf-8'), job['part'])
    sys.path.insert(0, str(checkout))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        lay_out(checkout, tokenizer, train, val)
        seconds = run_train_py(checkout, settings, job['seed'])
        import model

        saved = torch.load('out/ckpt.pt', weights_only=True)
    with contextlib.redirect_stdout(io.StringIO()):
        gpt = model.GPT(model.GPTConfig(**saved['model_args']))  # it prints its size
    gpt.load_state_dict(saved['model'])
    return dict(
        cpu_seconds=seconds,
        loss=evaluate(gpt.eval(), val, settings['block_size']),
        params=sum(p.numel() for p in gpt.parameters()),
        updates=saved['iter_num'],
    )


def run_ours(job):
    "The course's `train`, as anyone would call it."
    import torch
    from transformer_course.bigram import evaluate
    from transformer_course.train_settings import SHAKESPEARE
    from transformer_course.data import get_batch
    from transformer_course.gpt import GPT, GPTConfig
    from transformer_course.training import TrainConfig, train

    torch.set_num_threads(1)
    tokenizer, train_ids, val = split(Path(job['text']).read_text(encoding='utf-8'), job['part'])
    c = GPTConfig(**{**SHAKESPEARE, 'vocab_size': tokenizer.vocab_size, **job['model']})
    config = TrainConfig(seed=job['seed'], eval_interval=10**9, **job['train'])
    model = GPT(c, torch.Generator().manual_seed(job['seed']))
    began = time.process_time()
    train(model, lambda g: get_batch(train_ids, config.batch_size, c.block_size, g), config)
    seconds = time.process_time() - began
    return dict(
        cpu_seconds=seconds,
        loss=evaluate(model, val, c.block_size),
        params=model.num_params(),
        updates=config.max_iters,
    )


def in_a_process(what, **job):
    "Run one training in a fresh process; what it measured."
    env = {
        **os.environ,
        'OMP_NUM_THREADS': '1',
        'MKL_NUM_THREADS': '1',
        'TRANSFORMER_COURSE_PROGRESS': '0',
        'TQDM_DISABLE': '1',
    }
    done = subprocess.run(
        [sys.executable, __file__, what, json.dumps({'part': 'validation', **job})],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.exit(f'{what} failed: {job}')
    return json.loads(done.stdout)


def nanogpt(path, text, seed, **job):
    return in_a_process(
        'nanogpt', path=str(Path(path).resolve()), text=str(Path(text).resolve()), seed=seed, **job
    )


def ours(text, seed, model, train, **job):
    return in_a_process(
        'ours', text=str(Path(text).resolve()), seed=seed, model=model, train=train, **job
    )


@contextlib.contextmanager
def text_file(path=None):
    "(a file with the text, what to call it): the given file, or Tiny Shakespeare."
    from transformer_course.sources import load_text

    text = load_text(path=path)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'text.txt'
        file.write_text(text.text, encoding='utf-8')
        yield file, text.source


def write(name, result):
    "Keep a result as benchmarks/results/<name>.json."
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f'{name}.json').write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    print(
        json.dumps(dict(nanogpt=run_nanogpt, ours=run_ours)[sys.argv[1]](json.loads(sys.argv[2])))
    )
