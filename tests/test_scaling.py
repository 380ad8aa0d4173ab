"""Laws and plans on what chapter 11 does not try; and the launch lines of the two GPU recipes, shrunk to seconds."""

import json, math, os, subprocess, sys
from dataclasses import replace
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from transformer_course.cli import make_parser, settings as read_settings
from transformer_course.flags import pick
from transformer_course.data import CharTokenizer
from transformer_course.gpt import GPT, GPTConfig, count_params
from transformer_course.calibration import saved_bytes
from transformer_course.flops import matmul_shapes, matrix_params, newton_schulz_flops
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
from transformer_course.prepare import prepare
from transformer_course.optim import lr_factor
from transformer_course.flops import model_flops_per_token
from transformer_course.training import TrainConfig

COMMAND = Path(sys.executable).with_name('transformer-course')
SHRUNK = '--n_layer 1 --n_head 2 --n_embd 32 --block_size 16 --max_iters 2 --eval_interval 1 --warmup_iters 1 --sample_tokens 5 --device cpu'.split()
TEXT = 'To be, or not to be, that is the question:\nWhether tis nobler in the mind to suffer\n' * 60


@given(st.floats(10, 1e7), st.floats(0.02, 0.5), st.floats(0, 1.5))
@settings(max_examples=50, deadline=None)
def test_a_law_is_found_again(scale, exponent, floor):
    law, n = PowerLaw(scale, exponent, floor), [1e3, 1e4, 1e5, 1e6]
    found = fit_power_law(n, [law(k) for k in n], floor)
    assert math.isclose(found.exponent, exponent, rel_tol=1e-5) and math.isclose(
        found(1e9), law(1e9), rel_tol=1e-5
    )
    assert r_squared(found, n, [law(k) for k in n]) > 1 - 1e-9


def test_a_floor_is_found_again():
    law, n = PowerLaw(5e4, 0.3, 1.2), [1e3, 1e4, 1e5, 1e6, 1e7]
    assert abs(fit_with_floor(n, [law(k) for k in n]).floor - 1.2) < 0.01


@pytest.mark.parametrize(
    'work, words',
    [
        (lambda: fit_power_law([1, 2], [1.0]), ['2 sizes', 'losses 1']),
        (lambda: fit_power_law([0, 2], [2.0, 1.0]), ['above 0']),
        (lambda: fit_with_floor([10, 100], [2.0, 1.9]), ['three']),
        (lambda: compute_optimal(-1), ['flops=-1']),
        (lambda: optimizer_bytes(GPTConfig(), 'sgd'), ["optimizer='sgd'", 'muon or adamw']),
        (lambda: plan(GPTConfig(), TrainConfig(), 1e12, share=1.5), ['share=1.5']),
        (lambda: plan(GPTConfig(), TrainConfig(), 0), ['peak=0']),
        (
            lambda: plan(GPTConfig(), TrainConfig(batch_size=9), 1e12, devices=2),
            ['batch_size=9', '2 devices'],
        ),
    ],
)
def test_bad_input_is_named(work, words):
    with pytest.raises(ValueError) as e:
        work()
    for word in words:
        assert word in str(e.value)


@pytest.mark.parametrize(
    'change',
    [
        dict(),
        dict(bias=False),
        dict(n_kv_head=2, position='rotary'),
        dict(norm='rms', tie_weights=False),
        dict(mlp_ratio=3.0, smear=True),
        dict(norm='none'),
    ],
    ids=str,
)
def test_counts_are_those_of_the_model(change):
    config = replace(
        GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=4, n_embd=16), **change
    )
    model = GPT(config)
    assert block_params(config) == sum(p.numel() for p in model.transformer.h.parameters())
    assert matrix_params(config) == sum(
        p.numel() for p in model.transformer.h.parameters() if p.dim() == 2
    )
    assert 6 * sum(
        k * n * times for _, k, n, times in matmul_shapes(config, 1)
    ) + 12 * 2 * 16 * 8 == model_flops_per_token(config)
    x = torch.zeros(3, 8, dtype=torch.long)
    assert activation_bytes(config, 3) == pytest.approx(
        saved_bytes(model, lambda: model(x, x.clone())[1]), rel=0.03
    )


def test_twice_the_batch_keeps_twice_the_activations():
    config = GPTConfig(block_size=32, vocab_size=50, n_layer=1, n_head=2, n_embd=32)
    assert (
        activation_bytes(config, 6)
        == 2 * activation_bytes(config, 3)
        == 4 * activation_bytes(replace(config, block_size=16), 3)
    )


def test_newton_schulz_is_counted_by_torch():
    from torch.utils.flop_counter import FlopCounterMode
    from transformer_course.training import muon_direction

    C, config = 16, GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16)
    with FlopCounterMode(display=False) as counter:
        for rows, parts in ((3 * C, 3), (C, 1), (4 * C, 1)):
            muon_direction(torch.randn(1, rows, C), torch.randn(1, rows, C), 0.9, parts)
        muon_direction(torch.randn(1, C, 4 * C), torch.randn(1, C, 4 * C), 0.9)
    assert counter.get_total_flops() == newton_schulz_flops(config)


def load(root, name):
    values = read_settings(make_parser()[1]['train'], {}, str(root / f'configs/{name}.json'))
    return (
        values,
        pick(GPTConfig, values | dict(vocab_size=values['vocab_size'] or 65)),
        pick(TrainConfig, values),
    )


def test_gpt2_recipe_is_the_published_one(root):
    values, config, how = load(root, 'gpt2_124m')
    assert config == GPTConfig() and count_params(config) == 124_439_808
    assert (
        how.batch_size * how.gradient_accumulation_steps * config.block_size == 491_520
        and how.max_iters == 600_000
    )
    assert (
        how.optimizer,
        how.learning_rate,
        how.weight_decay,
        how.beta2,
        how.grad_clip,
        how.warmup_iters,
    ) == ('adamw', 6e-4, 0.1, 0.95, 1.0, 2000)
    assert math.isclose(lr_factor(599_999, how), 0.1) and lr_factor(0, how) < 1e-3
    assert values['data'] == 'data/openwebtext'


def test_shakespeare_recipe_is_the_published_one(root):
    _, config, how = load(root, 'shakespeare_gpu')
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size, config.dropout) == (
        6,
        6,
        384,
        256,
        0.2,
    )
    assert (how.max_iters, how.batch_size, how.learning_rate, how.beta2, how.warmup_iters) == (
        5000,
        64,
        1e-3,
        0.99,
        100,
    )
    assert 10.6e6 < GPT(config).num_params(non_embedding=True) < 10.8e6


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('launch')
    (tmp / 'my.txt').write_text(TEXT)
    prepare(
        tmp / 'data',
        TEXT.splitlines(keepends=True),
        CharTokenizer.train(TEXT),
        val_fraction=0.2,
        about=dict(source='two lines'),
    )
    return tmp


def launch(folder, *words, before=()):
    env = {k: v for k, v in os.environ.items() if k != 'GLOO_SOCKET_IFNAME'} | dict(
        OMP_NUM_THREADS='1', TQDM_DISABLE='1'
    )
    return subprocess.run(
        [*before, COMMAND, *map(str, words)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def about(folder, out):
    return json.loads((folder / out / 'checkpoint/checkpoint.json').read_text())


def test_shakespeare_launch_line(folder, root):
    done = launch(
        folder,
        'train',
        '--config',
        root / 'configs/shakespeare_gpu.json',
        '--text',
        'my.txt',
        *SHRUNK,
        '--batch_size',
        4,
    )
    assert done.returncode == 0, done.stderr
    kept = about(folder, 'out-shakespeare-gpu')
    assert (
        kept['step'] == 2
        and kept['config']['dropout'] == 0.2
        and kept['train']['optimizer'] == 'adamw'
    )


@pytest.fixture(scope='module')
def one(folder, root):
    "The words of the GPT-2 recipe, shrunk by flags, over token shards with gradient accumulation; run by one process into the folder `one`."
    line = [
        'train',
        '--config',
        root / 'configs/gpt2_124m.json',
        '--data',
        'data',
        *SHRUNK,
        '--vocab_size',
        len(set(TEXT)),
        '--batch_size',
        4,
        '--gradient_accumulation_steps',
        3,
    ]
    done = launch(folder, *line, '--out_dir', 'one')
    assert done.returncode == 0, done.stderr[-2000:]
    return line


def test_gpt2_launch_line_alone_and_under_torchrun(folder, one):
    "The same recipe in one process, then in two with torchrun: the same losses."
    run = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        '--no-python',
    ]
    done = launch(folder, *one, '--out_dir', 'two', before=run)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = about(folder, 'one'), about(folder, 'two')
    assert (
        one['step'] == two['step'] == 2
        and two['world_size'] == 2
        and one['history']['tokens'] == two['history']['tokens'] == 2 * 3 * 4 * 16
    )
    torch.testing.assert_close(
        two['history']['losses'], one['history']['losses'], rtol=1e-5, atol=0
    )
    assert done.stdout.count('step     2   val loss') == 1 and '2 processes' in done.stdout, (
        'rank 0 alone reports'
    )
    assert (
        one['config']['bias'] is True
        and one['config']['position'] == 'learned'
        and one['train']['lr_decay'] == 'cosine'
    )


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
