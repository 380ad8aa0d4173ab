"""Laws, counts and plans on what chapter 11 does not try; and the launch lines of the two GPU
recipes, shrunk to seconds."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from transformer_course.calibration import saved_bytes
from transformer_course.data import CharTokenizer
from transformer_course.experts import ExpertConfig, ExpertGPT
from transformer_course.flags import merge_settings, pick
from transformer_course.flops import (
    matmul_params,
    matmul_shapes,
    matrix_params,
    meta_model,
    mfu,
    model_flops_per_token,
    newton_schulz_flops,
    peak_flops,
)
from transformer_course.gpt import GPT, GPTConfig, count_params
from transformer_course.logs import read_losses
from transformer_course.optim import OptimConfig, lr_factor, make_optimizers
from transformer_course.prepare import prepare
from transformer_course.scaling import (
    PowerLaw,
    activation_bytes,
    block_params,
    compute_optimal,
    fit_power_law,
    fit_with_floor,
    optimizer_bytes,
    plan,
    r_squared,
)
from transformer_course.train_settings import train_defaults
from transformer_course.training import TrainConfig

COMMAND = Path(sys.executable).with_name('transformer-course')
SHRUNK = (
    '--n_layer 1 --n_head 2 --n_embd 32 --block_size 16 --max_iters 2 --eval_interval 1 '
    '--warmup_iters 1 --sample_tokens 5 --device cpu'
).split()
LINES = [
    'To be, or not to be, that is the question:\n',
    'Whether tis nobler in the mind to suffer\n',
]
TEXT = ''.join(LINES) * 60
SMALL = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=4, n_embd=16)


@given(st.floats(10, 1e7), st.floats(0.02, 0.5), st.floats(0, 1.5))
@settings(max_examples=50, deadline=None)
def test_a_law_is_found_again(scale, exponent, floor):
    law, n = PowerLaw(scale, exponent, floor), [1e3, 1e4, 1e5, 1e6]
    found = fit_power_law(n, [law(k) for k in n], floor)
    assert math.isclose(found.exponent, exponent, rel_tol=1e-5)
    assert math.isclose(found(1e9), law(1e9), rel_tol=1e-5)
    assert r_squared(found, n, [law(k) for k in n]) > 1 - 1e-9


def test_a_floor_is_found_again():
    law, n = PowerLaw(5e4, 0.3, 1.2), [1e3, 1e4, 1e5, 1e6, 1e7]
    assert abs(fit_with_floor(n, [law(k) for k in n]).floor - 1.2) < 0.01


ODD = TrainConfig(batch_size=9)
BAD = [
    (lambda: fit_power_law([1, 2], [1.0]), ['2 sizes', 'losses 1']),
    (lambda: fit_power_law([0, 2], [2.0, 1.0]), ['above 0']),
    (lambda: fit_with_floor([10, 100], [2.0, 1.9]), ['three']),
    (lambda: compute_optimal(-1), ['flops=-1']),
    (lambda: optimizer_bytes(GPTConfig(), 'sgd'), ["optimizer='sgd'", 'muon, adamw']),
    (lambda: plan(GPTConfig(), TrainConfig(), 1e12, share=1.5), ['share=1.5']),
    (lambda: plan(GPTConfig(), TrainConfig(), 0), ['peak=0']),
    (lambda: plan(GPTConfig(), ODD, 1e12, devices=2), ['batch_size=9', '2 devices']),
    (lambda: plan(ExpertConfig(), TrainConfig(), 1e12), ['ExpertConfig', 'GPTConfig']),
    (lambda: peak_flops('Abacus 3000'), ["name='Abacus 3000'", 'PEAK_FLOPS']),
]


@pytest.mark.parametrize('work, words', BAD)
def test_bad_input_is_named(work, words):
    with pytest.raises(ValueError) as e:
        work()
    for word in words:
        assert word in str(e.value)


CHANGES = [
    dict(),
    dict(bias=False),
    dict(n_kv_head=2, position='rotary'),
    dict(norm='rms', tie_weights=False),
    dict(mlp_ratio=3.0, smear=True),
    dict(norm='none'),
    dict(gated=True, activation='silu'),
    dict(n_inner=23, n_kv_head=1, qk_norm=True, embed_norm='rms'),
    dict(activation='relu', norm_first=False),
    dict(mlp_ratio=1.3),  # 20.8 hidden units: 21
]


def flops_by_hand(config):
    "6 N + 12 L C T, written out."
    c, C = config, config.n_embd
    kv = C // c.n_head * (c.n_kv_head or c.n_head)
    hidden = c.n_inner or round(c.mlp_ratio * C)
    block = C * (C + 2 * kv) + C * C + (3 if c.gated else 2) * C * hidden
    return 6 * (c.n_layer * block + C * c.vocab_size) + 12 * c.n_layer * C * c.block_size


@pytest.mark.parametrize('change', CHANGES, ids=str)
def test_counts_are_those_of_the_model(change):
    config = replace(SMALL, **change)
    model = GPT(config)
    blocks = [*model.transformer.h.parameters()]
    assert block_params(config) == sum(p.numel() for p in blocks)
    assert matrix_params(config) == sum(p.numel() for p in blocks if p.dim() == 2)
    products = sum(k * n * times for _, k, n, times in matmul_shapes(config, 1))
    assert products == matmul_params(model) == matrix_params(config) + 16 * 11
    assert model_flops_per_token(config) == flops_by_hand(config) == 6 * products + 12 * 2 * 16 * 8
    x = torch.zeros(3, 8, dtype=torch.long)
    kept = saved_bytes(model, lambda: model(x, x.clone())[1])
    assert activation_bytes(config, 3) == pytest.approx(kept, rel=0.004)


@pytest.mark.parametrize('change', CHANGES, ids=str)
def test_operations_are_those_that_torch_counts(change):
    config = replace(SMALL, **change)
    x = torch.zeros(3, 8, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        GPT(config)(x, x)[1].backward()
    assert counter.get_total_flops() == 3 * 8 * model_flops_per_token(config)


@pytest.mark.parametrize('shape, flops', [('gpt2_124m', 854_438_400), ('shakespeare_gpu', None)])
def test_the_recipes_cost_what_they_did(root, shape, flops):
    _, config, _ = load(root, shape)
    assert model_flops_per_token(config) == flops_by_hand(config)
    assert flops in (None, model_flops_per_token(config))


@pytest.mark.parametrize('top_k', [1, 2, 4])
def test_of_experts_those_that_are_asked_count(top_k):
    sizes = dict(block_size=8, vocab_size=11, n_layer=2, n_head=4, n_embd=16)
    config = ExpertConfig(**sizes, n_experts=4, top_k=top_k)
    model = ExpertGPT(config, torch.Generator().manual_seed(0))
    mlp, router = 8 * 16 * 16, 16 * 4
    assert matmul_params(model) == 2 * (4 * 16 * 16 + top_k * mlp + router) + 16 * 11
    x = torch.arange(24).view(3, 8) % 11
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, x)[1].backward()
    said = model_flops_per_token(config, model_class=ExpertGPT)
    assert counter.get_total_flops() == 24 * said


def test_a_count_takes_no_memory():
    "The weights of this model would take 400 gigabytes."
    huge = meta_model(GPTConfig(n_layer=2, n_head=96, n_embd=64_512))
    assert matmul_params(huge) > 1e11 and all(p.is_meta for p in huge.parameters())


def test_mfu_is_a_share_of_the_peak():
    assert mfu(10, 5, 100) == 0.5
    assert peak_flops('NVIDIA H100 PCIe') < peak_flops('NVIDIA H100 80GB HBM3')


def test_twice_the_batch_keeps_twice_the_activations():
    config = GPTConfig(block_size=32, vocab_size=50, n_layer=1, n_head=2, n_embd=32)
    six = activation_bytes(config, 6)
    assert six == 2 * activation_bytes(config, 3)
    assert six == 4 * activation_bytes(replace(config, block_size=16), 3)


@pytest.mark.parametrize('n_kv_head', [None, 2, 1])
def test_newton_schulz_is_counted_by_torch(n_kv_head):
    config = replace(SMALL, n_kv_head=n_kv_head)
    model = GPT(config)
    muon, _ = make_optimizers(model, OptimConfig(optimizer='muon'))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with FlopCounterMode(display=False) as counter:
        muon.step()
    assert counter.get_total_flops() == newton_schulz_flops(config)


def load(root, name):
    values = merge_settings(train_defaults(), {}, root / f'configs/{name}.json')
    values['vocab_size'] = values['vocab_size'] or 65
    return values, pick(GPTConfig, values), pick(TrainConfig, values)


def test_gpt2_recipe_is_the_published_one(root):
    values, config, how = load(root, 'gpt2_124m')
    assert config == GPTConfig() and count_params(config) == 124_439_808
    assert how.batch_size * how.gradient_accumulation_steps * config.block_size == 491_520
    assert how.max_iters == 600_000 and how.optimizer == 'adamw' and how.warmup_iters == 2000
    assert (how.learning_rate, how.weight_decay) == (6e-4, 0.1)
    assert (how.beta2, how.grad_clip) == (0.95, 1.0)
    assert math.isclose(lr_factor(599_999, how), 0.1)
    assert lr_factor(0, how) < 1e-3 and lr_factor(2000, how) == 1
    assert values['data'] == 'data/openwebtext'


def test_shakespeare_recipe_is_the_published_one(root):
    _, config, how = load(root, 'shakespeare_gpu')
    assert (config.n_layer, config.n_head, config.n_embd) == (6, 6, 384)
    assert (config.block_size, config.dropout) == (256, 0.2)
    assert (how.max_iters, how.batch_size, how.warmup_iters) == (5000, 64, 100)
    assert (how.learning_rate, how.beta2) == (1e-3, 0.99)
    assert 10.6e6 < GPT(config).num_params(non_embedding=True) < 10.8e6


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('launch')
    (tmp / 'my.txt').write_text(TEXT)
    tokenizer, about = CharTokenizer.train(TEXT), dict(source='two lines')
    documents = TEXT.splitlines(keepends=True)
    prepare(tmp / 'data', documents, tokenizer, val_fraction=0.2, about=about)
    return tmp


def launch(folder, *words, before=()):
    env = {k: v for k, v in os.environ.items() if k != 'GLOO_SOCKET_IFNAME'}
    env |= dict(OMP_NUM_THREADS='1', TQDM_DISABLE='1')
    words = [*before, COMMAND, *map(str, words)]
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def about(folder, out):
    return json.loads((folder / out / 'checkpoint/checkpoint.json').read_text())


def losses(folder, out):
    return [*read_losses(folder / out / 'log.jsonl')[0].values()]


def test_shakespeare_launch_line(folder, root):
    line = ['train', '--config', root / 'configs/shakespeare_gpu.json', '--text', 'my.txt']
    done = launch(folder, *line, *SHRUNK, '--batch_size', 4)
    assert done.returncode == 0, done.stderr
    kept = about(folder, 'out-shakespeare-gpu')
    assert kept['step'] == 2 and kept['config']['dropout'] == 0.2
    assert kept['train']['optimizer'] == 'adamw'


@pytest.fixture(scope='module')
def one(folder, root):
    "GPT-2's recipe, shrunk by flags, over shards, accumulating; run by one process into `one`."
    recipe = json.loads((root / 'configs/gpt2_124m.json').read_text())
    # torchrun takes a flag that begins with --log for one of its own
    (folder / 'gpt2.json').write_text(json.dumps(recipe | dict(log=True)))
    line = ['train', '--config', 'gpt2.json', '--data', 'data', *SHRUNK]
    line += ['--vocab_size', len(set(TEXT)), '--batch_size', 4]
    line += ['--gradient_accumulation_steps', 3]
    done = launch(folder, *line, '--out_dir', 'one')
    assert done.returncode == 0, done.stderr[-2000:]
    return line


def test_gpt2_launch_line_alone_and_under_torchrun(folder, one):
    "The same recipe in one process, then in two with torchrun: the same losses."
    run = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    run += ['--nproc_per_node=2', '--no-python']
    done = launch(folder, *one, '--out_dir', 'two', before=run)
    assert done.returncode == 0, done.stderr[-2000:]
    alone, two = about(folder, 'one'), about(folder, 'two')
    assert alone['step'] == two['step'] == 2 and two['world_size'] == 2
    assert alone['history']['tokens'] == two['history']['tokens'] == 2 * 3 * 4 * 16
    one_s, two_s = losses(folder, 'one'), losses(folder, 'two')
    assert len(one_s) == 2
    torch.testing.assert_close(two_s, one_s, rtol=1e-5, atol=0)
    assert done.stdout.count('step     2   val loss') == 1, 'rank 0 alone reports'
    assert '2 processes' in done.stdout
    assert alone['config']['bias'] is True and alone['config']['position'] == 'learned'
    assert alone['train']['lr_decay'] == 'cosine'


def test_bad_shards_get_one_line(folder, one):
    for words, said in (
        (['--data', 'nowhere'], 'no index.json'),
        (['--data', 'data', '--block_size', '100000'], 'block_size=100000'),
        (['--data', 'data', '--vocab_size', '3'], 'vocab_size=3'),
    ):
        done = launch(folder, 'train', *SHRUNK, '--out_dir', 'bad', *words)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count('\n') == 1
    done = launch(folder, 'train', '--resume', '--out_dir', 'one', '--data', 'other')
    assert done.returncode == 2 and 'other' in done.stderr
