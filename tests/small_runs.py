"""What the tests of several processes and the scripts that they launch have in common."""

import os
import signal

import torch

from transformer_course import parallel as P
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.logs import LogFile, read_losses
from transformer_course.optim import make_optimizers
from transformer_course.shards import ShardBatches, Shards
from transformer_course.strategy import Precision
from transformer_course.training import TrainConfig, train

IDS = torch.randint(13, (300,), generator=torch.Generator().manual_seed(0))
SHAPE = dict(block_size=8, vocab_size=13, n_layer=2, n_head=2, n_embd=16)
CONFIG = dict(eval_interval=4, warmup_iters=2, grad_clip=0.5, lr_decay='none')
drawn = []  # where each row began, of each batch of this process


def model(seed=1, **kw):
    return GPT(GPTConfig(**(SHAPE | kw)), torch.Generator().manual_seed(seed))


def masked(y):
    "Every fourth row scores one target only, so that processes get unequal shares."
    few = (torch.arange(len(y)) % 4 == 0)[:, None] & (torch.arange(8) > 0)
    return y.masked_fill(few, -100)


def batches(parallel, accident=lambda: None, mask=False, rows=12):
    "The batch function of one process, which keeps a list of the rows that it drew."

    def whole(generator):
        s = torch.randint(len(IDS) - 8, (rows, 1), generator=generator)
        y = IDS[s + torch.arange(1, 9)]
        return s, IDS[s + torch.arange(8)], masked(y) if mask else y

    mine = P.global_batch(whole, parallel)

    def draw(generator):
        s, x, y = mine(generator)
        drawn.append(s.flatten().tolist())
        accident()
        return x, y

    return draw


def overflow_of_one(sharded, rank):
    """Two updates in float16; a gradient that only process 1 holds overflows in the first one.

    After each: the loss scale, and whether this process's weights have moved.
    """
    precision, found = Precision('cpu', torch.float16, init_scale=1024.0), []
    optimizers = make_optimizers(sharded, TrainConfig())
    for spike in (True, False):
        before = [p.to_local().clone() for p in sharded.parameters()]
        with precision.autocast():
            loss = sharded(IDS[None, :8], IDS[None, 1:9])[1]
        precision.backward(loss)
        if spike and rank == 1:
            next(sharded.parameters()).grad.to_local()[0] = torch.inf
        precision.step(sharded, optimizers)
        now = [p.to_local() for p in sharded.parameters()]
        moved = any(not torch.equal(a, b) for a, b in zip(before, now))
        found.append([precision.scaler.get_scale(), moved])
    return found


@torch.no_grad()
def validate(m):
    return m(IDS[None, :8], IDS[None, 1:9])[1].item()


def share(parallel):
    "Validation on this process's share of twelve rows: the sum of losses, and their number."
    x, y = IDS[:96].view(12, 8), masked(IDS[1:97].view(12, 8))
    x, y = (t[parallel.rank :: parallel.world_size] for t in (x, y))
    n = (y != -100).sum().item()

    @torch.no_grad()
    def validate(m):
        return m(x, y)[1].item() * n, n

    return validate


def run(parallel, m=None, folder=None, batch=None, validate=validate, resume=False, **kw):
    "Losses of all updates, those before a resume too, and of all evaluations."
    log = f'{folder}.jsonl'
    history = train(
        m or model(),
        batch or batches(parallel),
        TrainConfig(**(dict(CONFIG, max_iters=8) | kw)),
        validate=validate,
        on_step=LogFile(log) if folder else None,
        folder=folder,
        resume=resume,
        parallel=parallel,
    )
    losses = [*read_losses(log)[0].values()] if folder else history.losses
    assert losses[len(losses) - len(history.losses) :] == history.losses
    return losses + [v for _, v in history.val]


def run_over_shards(folder, parallel, out=None, resume=False, fatal=None):
    "Losses and first tokens of the rows that this process read; it dies before batch `fatal`."
    batch, seen = ShardBatches(Shards(folder), 4, 8, parallel), []

    def watched(generator):
        if fatal == len(seen):
            os.kill(os.getpid(), signal.SIGKILL)
        x, y = batch(generator)
        seen.append(x[:, 0].tolist())
        return x, y

    m = model(vocab_size=400, n_layer=1)
    size = dict(max_iters=10, gradient_accumulation_steps=2)
    history = run(parallel, m, out, watched, None, resume, lr_decay='linear', **size)
    return dict(losses=history, seen=seen)
