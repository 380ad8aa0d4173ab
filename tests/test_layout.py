"""Matrices by columns in large pages: the same numbers, each a tensor of its own, whatever the
model is used for afterwards."""

import copy
import mmap
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from transformer_course.checkpoint import load_model, save_checkpoint
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.layout import PAGE, by_columns, large_pages

LARGE = GPTConfig(block_size=16, vocab_size=300, n_layer=2, n_head=4, n_embd=256)  # 6 MB


def made():
    return GPT(LARGE, torch.Generator().manual_seed(0))


def test_trained_copied_and_saved_as_before(tmp_path):
    plain, turned, ids = made(), by_columns(made()), torch.arange(12)[None]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), turned.parameters()))
    for model in (plain, turned):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(ids, ids)[1].backward()
        optimizer.step()
    for a, b in zip(plain.parameters(), copy.deepcopy(turned).parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    save_checkpoint(tmp_path / 'checkpoint', turned)
    read = load_model(tmp_path / 'checkpoint')[0]
    assert all(torch.equal(a, b) for a, b in zip(read.parameters(), turned.parameters()))
    assert all(p.is_contiguous() for p in read.parameters())  # a file is written by rows


def test_each_matrix_has_its_own_place():
    model = by_columns(made())
    maps = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    places = sorted((w.data_ptr(), w.numel() * w.element_size()) for w in maps)
    assert all(a + size <= b for (a, size), (b, _) in zip(places, places[1:]))
    assert all(place % 64 == 0 for place, _ in places)
    assert all(w.untyped_storage().nbytes() == w.numel() * 4 for w in maps)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_any_floats_and_shapes(dtype):
    g = torch.Generator().manual_seed(1)
    shapes = [(1024, 1025), (3, 1), (1, 5), (0, 4), (4, 0), (700, 33)]
    layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in shapes)
    for layer, shape in zip(layers, shapes):
        layer.weight = nn.Parameter(torch.randn(shape, generator=g).to(dtype))
    before = [layer.weight.clone() for layer in layers]
    by_columns(layers)
    assert all(torch.equal(a, layer.weight) for a, layer in zip(before, layers))
    assert [layer.weight.shape for layer in layers] == shapes


def test_twice_is_once_and_no_matrix_is_no_matter():
    model = by_columns(by_columns(made()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), made().parameters()))
    assert by_columns(nn.LayerNorm(3)).weight.tolist() == [1, 1, 1]


def huge_kilobytes():
    return int(re.search(r'AnonHugePages:\s+(\d+)', Path('/proc/self/smaps_rollup').read_text())[1])


@pytest.mark.skipif(sys.platform != 'linux', reason='no other system is asked')
def test_linux_gives_large_pages():
    assert large_pages(PAGE - 1) is None
    room = large_pages(8 * PAGE + 1)
    assert isinstance(room, mmap.mmap) and len(room) == 9 * PAGE
    switch = Path('/sys/kernel/mm/transparent_hugepage/enabled')
    if not switch.exists() or '[never]' in switch.read_text():
        pytest.skip('switched off on this machine')
    before = huge_kilobytes()
    torch.frombuffer(room, dtype=torch.uint8).fill_(1)
    assert huge_kilobytes() - before >= 8 * PAGE // 1024 // 2


@pytest.mark.parametrize('refusal', [OSError(22, 'Invalid argument'), AttributeError('unknown')])
def test_a_kernel_without_them(monkeypatch, refusal):
    class Refuses(mmap.mmap):
        def madvise(self, *_):
            raise refusal

    monkeypatch.setattr('transformer_course.layout.mmap.mmap', Refuses)
    assert all(
        torch.equal(a, b) for a, b in zip(by_columns(made()).parameters(), made().parameters())
    )


PEAK = """
import re, sys
from pathlib import Path
import torch
from torch import nn
from transformer_course.layout import by_columns
status = lambda: Path('/proc/self/status').read_text()
megabytes = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status())[1]) // 1024
spare = torch.empty(7_000_000)
del spare  # from now on glibc keeps what is free, as in a process that has read a model
layers = nn.ModuleList(nn.Linear(1000, 1000, bias=False) for _ in range(100))
before = megabytes()
by_columns(layers)
print(megabytes() - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_a_model_is_not_in_memory_twice():
    done = subprocess.run([sys.executable, '-c', PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200  # MB; the matrices have 381, and 64 may wait to be given back
