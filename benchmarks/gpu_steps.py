"""The steps of gpu.py. Each takes a `Job` and yields its parts: a name, and a function that
measures something and returns a dict of figures. A part that raises does not stop the others."""

import contextlib, io, json, os, signal, statistics, subprocess, sys, time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from transformer_course.before import RecurrentLanguageModel
from transformer_course.flops import mfu, model_flops_per_token, peak_flops
from transformer_course.generation import generate
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.training import TrainConfig, train

import card_cells as slices

ROOT = Path(__file__).resolve().parents[1]
NANOGPT_LOSS = 1.4697  # of its README, for the recipe of configs/shakespeare_gpu.json
TINY = dict(block_size=16, n_layer=1, n_head=2, n_embd=32)


@dataclass
class Job:
    "What a step is told."

    toy: bool  # very small, on any machine
    folder: Path  # for files of its own
    end: float  # be done by this time
    seed: int

    @property
    def device(self):
        return 'cuda' if torch.cuda.is_available() else 'cpu'

    def generator(self, device='cpu'):
        return torch.Generator(device).manual_seed(self.seed)

    def left(self):
        return max(1.0, self.end - time.time())


def wait():
    "Until the card has done all that it was told."
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work, repeats=5):
    "Median time of `work`, after one call to warm up."
    times = []
    for _ in range(repeats + 1):
        wait()
        began = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


# --- chapter 23: a Transformer and an LSTM on longer and longer texts ---


def lengths(job):
    "Microseconds of a training step a token, by the length of the text."
    T = (16, 32) if job.toy else (64, 128, 256, 512, 1024, 2048, 4096)
    for kind in ('Transformer', 'LSTM'):
        yield kind, partial(by_length, job, kind, T, 4 if job.toy else 64)


def by_length(job, kind, lengths, batch_size, vocab_size=27):
    config = dict(block_size=max(lengths), vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=64)
    torch.manual_seed(job.seed)
    if kind == 'LSTM':
        config = dict(vocab_size=vocab_size, n_embd=64, hidden=128, kind='lstm')
        model = RecurrentLanguageModel(*config.values())
    else:
        model = GPT(GPTConfig(**config, bias=False), job.generator())
    model, found = model.to(job.device), {}
    for T in lengths:
        x = torch.randint(vocab_size, (batch_size, T), generator=job.generator()).to(job.device)
        seconds = seconds_of(lambda: model(x, x)[1].backward())
        found[str(T)] = round(1e6 * seconds / x.numel(), 4)
    return dict(config=config, batch_size=batch_size, microseconds_a_token=found)


# --- sampling with the cache ---


def shapes(job):
    "The small recipe of nanoGPT, and GPT-2."
    if job.toy:
        return dict(small=GPTConfig(vocab_size=65, **TINY))
    small = GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384, bias=False)
    return {'small': small, 'GPT-2': GPTConfig()}


def sampling(job):
    "Tokens a second: short and long numbers, one text and many, with and without the cache."
    for name, config in shapes(job).items():
        for dtype in (torch.float32, torch.bfloat16):
            for rows, use_cache in ((1, True), (16, True), (1, False)):
                kind = str(dtype).removeprefix('torch.')
                how = f"{name}, {kind}, {rows} at once{'' if use_cache else ', no cache'}"
                yield how, partial(sampling_speed, job, config, dtype, rows, use_cache)


def sampling_speed(job, config, dtype, rows, use_cache):
    model = GPT(config, job.generator()).to(job.device, dtype).eval()
    start = torch.zeros(rows, 1, dtype=torch.long, device=job.device)
    new = min(128, config.block_size - 1)
    dice = job.generator(job.device)

    def write():
        generate(model, start, new, use_cache=use_cache, generator=dice)

    speed = rows * new / seconds_of(write, repeats=2)
    return dict(config=asdict(config), new_tokens=new, tokens_per_second=round(speed, 1))


# --- training at GPT-2's shape ---


def speed(job):
    "Products of matrices alone; then whole updates, in short and long numbers, compiled or not."
    for name in ('float32', 'bfloat16'):
        yield f'products, {name}', partial(products, job, getattr(torch, name))
    adamw = dict(optimizer='adamw', learning_rate=6e-4)
    variants = {
        'float32': dict(dtype='float32', compile=False, **adamw),
        'bfloat16': dict(dtype='bfloat16', compile=False, **adamw),
        'float32, compiled': dict(dtype='float32', compile=not job.toy, **adamw),
        'bfloat16, compiled': dict(dtype='bfloat16', compile=not job.toy, **adamw),
        'bfloat16, compiled, Muon': dict(dtype='bfloat16', compile=not job.toy),
    }
    for name, how in variants.items():
        yield name, partial(smaller_if_full, job, how)


def products(job, dtype):
    "The speed of one large product of matrices."
    n = 64 if job.toy else 8192
    a = torch.randn(n, n, device=job.device).to(dtype)
    return dict(n=n, tflops=round(2 * n**3 / seconds_of(lambda: a @ a) / 1e12, 4))


def smaller_if_full(job, how):
    "`training_speed` with the largest batch that the memory holds."
    for batch_size in (2,) if job.toy else (32, 16, 8, 4):
        try:
            return training_speed(job, how, batch_size)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    raise MemoryError('not even four windows fit into the memory of the card')


def training_speed(job, how, batch_size, updates=12, warm_up=4):
    config = GPTConfig(vocab_size=65, **TINY) if job.toy else GPTConfig()
    shape = batch_size, config.block_size
    ids = torch.randint(config.vocab_size, shape, generator=job.generator()).to(job.device)
    settings = TrainConfig(max_iters=updates, eval_interval=updates, seed=job.seed, **how)
    times, losses = [], []

    def note(step, record):
        wait()
        times.append(time.perf_counter())
        losses.append(record['loss'])

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    model = GPT(config, job.generator()).to(job.device)
    began = time.perf_counter()
    train(model, lambda generator: (ids, ids), settings, on_step=note)
    update = statistics.median(b - a for a, b in zip(times[warm_up:], times[warm_up + 1 :]))
    tokens = ids.numel() / update
    return dict(
        config=asdict(config),
        train=how,
        batch_size=batch_size,
        tokens_per_second=round(tokens, 1),
        mfu=utilisation(tokens, config),
        seconds_to_first_update=round(times[0] - began, 2),
        peak_memory_gb=peak_memory(),
        first_and_last_loss=[losses[0], losses[-1]],
    )


def utilisation(tokens_per_second, config):
    "Share of the data sheet's speed in sixteen bits; None for a device that is not in the table."
    try:
        peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    except ValueError:
        return None
    return peak and round(mfu(tokens_per_second, model_flops_per_token(config), peak), 4)


def peak_memory():
    if not torch.cuda.is_available():
        return None
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


# --- whole runs of the command ---


def entry(job):
    "A script that is the command, so that it need not be installed."
    file = job.folder / 'command.py'
    file.write_text('import sys\nfrom transformer_course.cli import main\nsys.exit(main())\n')
    return file


def call(command, limit, folder):
    "Run a command; after `limit` seconds it is asked to stop. Its exit status, None if it was."
    process = subprocess.Popen([str(word) for word in command], cwd=folder)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()


def read_lines(file):
    "The records of a log that may end in half a line."
    lines = file.read_text(encoding='utf-8').split('\n')[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def toy_flags(job, updates, every):
    flags = dict(TINY, batch_size=4, max_iters=updates, eval_interval=every)
    return [f'--{name}={value}' for name, value in flags.items()] if job.toy else []


def shakespeare(job):
    "configs/shakespeare_gpu.json to its end, or as far as the time allows."
    done = {}
    for name, more in {'as configured': [], 'not compiled': ['--compile=no']}.items():
        yield name, partial(train_shakespeare, job, more, done)
        if done:
            break
    if done:
        yield 'sample', partial(sample_shakespeare, job)


def train_shakespeare(job, more, done):
    config = ROOT / 'configs' / 'shakespeare_gpu.json'
    flags = ['--config', config, '--out_dir', 'shakespeare', '--sample_tokens=0', *more]
    command = [sys.executable, entry(job), 'train', *flags, *toy_flags(job, 6, 3)]
    status = call(command, max(1, job.left() - 20), job.folder)  # and a sample afterwards
    if status:
        raise RuntimeError(f'the command ended with status {status}; see the log')
    records = read_lines(job.folder / 'shakespeare' / 'log.jsonl')
    updates = [r for r in records if 'loss' in r]
    thin = [r for r in records if 'loss' not in r or r['step'] % 25 == 0]
    log = job.folder / 'shakespeare.jsonl'
    log.write_text(''.join(json.dumps(r) + '\n' for r in thin), encoding='utf-8')
    val = [(r['step'], r['val']) for r in records if 'val' in r]
    done |= dict(
        config=json.loads(config.read_text(encoding='utf-8')),
        text=about_text(job),
        ended=status == 0,
        updates=updates[-1]['step'],
        training_seconds=round(updates[-1]['seconds'], 1),
        tokens_per_second=round(updates[-1]['tokens'] / updates[-1]['seconds'], 1),
        best_val=min(v for _, v in val),
        last_val=val[-1][1],
        reference=NANOGPT_LOSS,
        val=val,
    )
    return dict(done)


def about_text(job):
    about = job.folder / 'shakespeare' / 'checkpoint' / 'checkpoint.json'
    return json.loads(about.read_text(encoding='utf-8'))['text']['source']


def sample_shakespeare(job):
    flags = ['--out_dir', 'shakespeare', '--max_new_tokens', '40' if job.toy else '500']
    command = [sys.executable, str(entry(job)), 'sample', *flags]
    done = subprocess.run(
        command, cwd=job.folder, capture_output=True, text=True, timeout=job.left() + 30
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f'status {done.returncode}')
    return dict(output=done.stdout)


# --- processes of their own for the gradients: one card, one process ---


def parallel(job):
    "Under torchrun: four updates at once, or two, a checkpoint, and two more. The same weights?"
    for how in ('ddp', 'fsdp'):
        yield how, partial(saved_and_resumed, job, how)


def torchrun(job, how, out_dir, updates, *more):
    "The command for `train` under torchrun."
    flags = dict(TINY, batch_size=8, warmup_iters=0, eval_interval=2, sample_tokens=0)
    flags |= dict(lr_decay='none', max_iters=updates, out_dir=out_dir, parallel=how)
    flags |= dict(val_fraction=0.005)  # quickly scored: only the updates matter here
    launch = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=1', entry(job)]
    return [sys.executable, *launch, 'train', *(f'--{k}={v}' for k, v in flags.items()), *more]


def saved_and_resumed(job, how):
    whole, half = f'{how}_whole', f'{how}_half'
    both = [torchrun(job, how, whole, 4), torchrun(job, how, half, 2)]
    running = [subprocess.Popen([str(w) for w in c], cwd=job.folder) for c in both]
    for process in running:
        try:
            process.wait(job.left())
        except subprocess.TimeoutExpired:
            process.kill()
    status = [p.wait() for p in running]
    if not any(status):
        status.append(call(torchrun(job, how, half, 4, '--resume'), job.left(), job.folder))
    if any(s != 0 for s in status):
        raise RuntimeError(f'exit statuses {status}; see the log')
    folders = [job.folder / out / 'checkpoint' for out in (whole, half)]
    far = largest_difference(folders)
    losses = [losses_of(folder.parent / 'log.jsonl') for folder in folders]
    return dict(equal=far == 0, largest_difference=far, losses=losses[0], resumed=losses[1])


def largest_difference(folders):
    "Between the weights of two checkpoints."
    from safetensors.torch import load_file

    a, b = (load_file(folder / 'model.safetensors') for folder in folders)
    return max((a[name] - b[name]).abs().max().item() for name in a)


def losses_of(log):
    return [r['loss'] for r in read_lines(log) if 'loss' in r]


# --- the notebooks' own cells for a card ---


def cells(job):
    "Each cell that asks for a card, after the statements of its notebook that it needs."
    for path in sorted((ROOT / 'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' in path.parts:
            continue
        found = slices.read_cells(path)
        for number, (name, source) in enumerate(found):
            if slices.is_cuda(source):
                yield f'{path.stem} {name}', partial(run_cell, path, found, number)


def run_cell(path, found, number):
    "What the cell prints; without a card, only what it needs is run."
    os.chdir(path.parent)
    space = dict(__name__='__main__', display=print)
    for statement in slices.needed(found, number):
        exec(compile(statement, path.name, 'exec'), space)
    name, source = found[number]
    code = compile(source, f'{path.name} {name}', 'exec')
    if not torch.cuda.is_available():
        return dict(output=None, note='no GPU here: only what the cell needs was run')
    torch.cuda.empty_cache()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(code, space)
    return dict(output=said.getvalue())
