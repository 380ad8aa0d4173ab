"The command line as a person meets it: a subprocess, its output, its exit status."

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name('transformer-course')
SMALL = (
    '--n_layer 1 --n_head 2 --n_embd 32 --block_size 16 --batch_size 4 --sample_tokens 20'.split()
)
TEXT = 'To be, or not to be, that is the question:\nWhether tis nobler in the mind to suffer\n' * 60


@pytest.fixture
def run(tmp_path):
    "Run the command in an empty folder that holds one text."
    (tmp_path / 'my.txt').write_text(TEXT)

    def call(*args, **kw):
        return subprocess.run(
            [COMMAND, *map(str, args)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            **kw,
        )

    call.folder = tmp_path
    return call


@pytest.fixture
def trained(run):
    "The same, after a short training run."
    result = run('train', '--text', 'my.txt', *SMALL, '--max_iters', 30, '--eval_interval', 10)
    assert result.returncode == 0, result.stderr
    run.output = result.stdout
    return run


def about(folder):
    return json.loads((folder / 'out/checkpoint/checkpoint.json').read_text())


def test_train_says_what_it_does(trained):
    out = trained.output
    assert 'my.txt' in out and 'characters to train on' in out
    steps = re.findall(r'step +(\d+) +val loss (\d+\.\d{4})', out)
    assert [int(s) for s, _ in steps] == [0, 10, 20, 30]
    assert float(steps[-1][1]) < float(steps[0][1])
    assert (trained.folder / 'out/loss.png').read_bytes().startswith(b'\x89PNG')
    assert 'transformer-course sample' in out


def test_sample_continues_the_prompt_and_repeats_itself(trained):
    first, second, other = (
        trained('sample', '--prompt', 'To be', '--max_new_tokens', 40, '--seed', s).stdout
        for s in (1, 1, 2)
    )
    assert first == second != other
    assert first.startswith('To be') and len(first) == len('To be') + 40 + 1


def test_prompt_understands_a_written_newline(trained):
    assert trained('sample', '--prompt', '\\nTo', '--max_new_tokens', 1).stdout.startswith('\nTo')


def test_info_tells_what_the_checkpoint_holds(trained):
    out = trained('info').stdout
    assert '1 layers' in out and '30 of 30 steps' in out and 'my.txt' in out


def test_info_and_version_need_no_checkpoint(run):
    assert 'none in' in run('info').stdout and run('info').returncode == 0
    assert run('--version').stdout.startswith('transformer_course ')


def test_resume_goes_on_where_the_run_ended(trained):
    result = trained('train', '--resume', '--text', 'my.txt', '--max_iters', 40)
    assert result.returncode == 0, result.stderr
    assert (
        about(trained.folder)['step'] == 40
        and len(about(trained.folder)['history']['losses']) == 40
    )


def test_flags_win_over_the_file_and_the_file_over_defaults(run):
    (run.folder / 'c.json').write_text(
        json.dumps(dict(n_layer=2, n_head=2, n_embd=32, max_iters=2, text='my.txt'))
    )
    assert run('train', '--config', 'c.json', '--n_layer', 1, '--block_size', 16).returncode == 0
    config = about(run.folder)['config']
    assert config['n_layer'] == 1 and config['n_embd'] == 32 and config['position'] == 'rotary'


def test_flags_may_be_written_with_hyphens(run):
    assert (
        run('train', '--text', 'my.txt', *SMALL, '--max-iters=1', '--tie-weights').returncode == 0
    )
    assert about(run.folder)['config']['tie_weights'] is True


def test_help_explains_every_flag(run):
    result = run('train', '--help')
    flags = re.findall(r'^  (--\w+)(.*(?:\n {30,}.*)*)', result.stdout, re.M)
    assert result.returncode == 0 and len(flags) > 35
    for flag, rest in flags:
        assert len(rest.split()) > 2, f'{flag} has no explanation'


BAD = [
    (['train', '--text', 'nope.txt'], ['nope.txt', 'no such file']),
    (['train', '--text', 'empty.txt'], ['empty.txt', 'empty']),
    (['train', '--text', 'short.txt'], ['block_size=64', 'longer text']),
    (['train', '--text', 'latin1.txt'], ['UTF-8', 'latin1.txt']),
    (['train', '--text', '.'], ['directory']),
    (
        ['train', '--text', 'my.txt', '--n_embd', '30', '--n_head', '4'],
        ['n_embd=30', 'n_head=4', 'multiple'],
    ),
    (['train', '--text', 'my.txt', '--n_layer', 'many'], ['--n_layer', 'whole number']),
    (['train', '--text', 'my.txt', '--n_layr', '2'], ['--n_layr', 'did you mean --n_layer']),
    (['train', '--text', 'my.txt', '--position', 'gps'], ["position='gps'", 'rotary']),
    (['train', '--text', 'my.txt', '--max_iters', '0'], ['max_iters=0', 'at least 1']),
    (['train', '--text', 'my.txt', '--vocab_size', '3'], ['vocab_size=3', 'different characters']),
    (['train', '--text', 'my.txt', '--val_fraction', '2'], ['val_fraction=2']),
    (['train', '--text', 'my.txt', '--device', 'abacus'], ['--device abacus', 'cpu']),
    (['train', '--text', 'my.txt', '--bias', 'perhaps'], ['--bias', 'true or false']),
    (['train', '--config', 'nope.json'], ['nope.json', 'JSON']),
    (['train', '--config', 'my.txt'], ['my.txt', 'not JSON']),
    (['train', '--config', 'odd.json'], ["'colour'", '--help']),
    (['train', '--resume'], ['no checkpoint', 'out']),
    (['sample'], ['no checkpoint', 'train one first']),
    (['train', '--text', 'my.txt', '--parallel', 'fsdp'], ["parallel='fsdp'", 'torchrun']),
    (['train', '--text', 'my.txt', '--parallel', 'carpool'], ["parallel='carpool'", 'ddp']),
    (['sample', '--int8', '--device', 'cuda'], ['--int8', 'CPU']),
    (['fly'], ['fly', 'train']),
    ([], ['train']),
]


@pytest.mark.parametrize(
    'args, words', BAD, ids=lambda x: ' '.join(x) if isinstance(x, list) else None
)
def test_bad_input_gets_one_line_and_status_2(run, args, words):
    for name, content in dict(empty=b'', short=b'abc', latin1=b'caf\xe9 ' * 100).items():
        (run.folder / f'{name}.txt').write_bytes(content)
    (run.folder / 'odd.json').write_text('{"colour": 1}')
    result = run(*args)
    assert result.returncode == 2
    assert result.stderr.count('\n') == 1 and 'Traceback' not in result.stderr
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize(
    'args, words',
    [
        (['sample', '--prompt', '☃'], ['☃', 'vocabulary']),
        (['sample', '--prompt', ''], ['prompt is empty']),
        (['sample', '--temperature', '-1'], ['temperature=-1', 'at least 0']),
        (['sample', '--top_k', '0'], ['top_k=0', 'at least 1']),
        (['sample', '--top_p', '1.5'], ['top_p=1.5']),
        (['train', '--resume', '--n_layer', '2'], ['n_layer=1', 'without --resume']),
        (['train', '--resume', '--text', 'other.txt'], ['another text', 'my.txt']),
    ],
)
def test_bad_input_to_a_checkpoint(trained, args, words):
    (trained.folder / 'other.txt').write_text('x' * 1000)
    result = trained(*args)
    assert result.returncode == 2 and result.stderr.count('\n') == 1
    for word in words:
        assert word in result.stderr
    assert '☃' not in result.stdout


def test_damaged_checkpoint(trained):
    weights = trained.folder / 'out/checkpoint/model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-10])
    result = trained('sample')
    assert result.returncode == 2 and 'checksum' in result.stderr and result.stderr.count('\n') == 1


def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(run):
    result = run(
        'train',
        '--text',
        'my.txt',
        *SMALL,
        '--max_iters',
        60,
        '--eval_interval',
        1,
        '--optimizer',
        'adamw',
        '--learning_rate',
        '1e30',
        '--warmup_iters',
        0,
    )
    assert result.returncode == 2 and result.stderr.count('\n') == 1
    step = int(re.search(r'at step (\d+)', result.stderr)[1])
    assert 'is kept' in result.stderr and about(run.folder)['step'] <= step


def test_a_full_disk_is_said_in_one_line(run):
    limit = lambda: __import__('resource').setrlimit(
        __import__('resource').RLIMIT_FSIZE, (20_000, 20_000)
    )
    result = run(
        'train',
        '--text',
        'my.txt',
        *SMALL,
        '--max_iters',
        5,
        preexec_fn=lambda: (limit(), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)),
    )
    assert (
        result.returncode == 2
        and result.stderr.count('\n') == 1
        and 'free some space' in result.stderr
    )


def test_ctrl_c_says_how_to_go_on(run):
    process = subprocess.Popen(
        [
            COMMAND,
            'train',
            '--text',
            'my.txt',
            *SMALL,
            '--max_iters',
            '100000',
            '--eval_interval',
            '10',
        ],
        cwd=run.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith('step    20'):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and '--resume' in err and 'Traceback' not in err


def lines(folder):
    return [json.loads(line) for line in (folder / 'out/log.jsonl').read_text().splitlines()]


def test_a_log_has_every_update_once_also_after_a_resume(trained):
    assert trained('train', '--resume', '--max_iters', 40).returncode == 0
    updates = [r['step'] for r in lines(trained.folder) if 'loss' in r]
    assert updates == list(range(1, 41)) and [
        r['step'] for r in lines(trained.folder) if 'val' in r
    ] == [0, 10, 20, 30, 40]
    assert [r['loss'] for r in lines(trained.folder) if 'loss' in r] == about(trained.folder)[
        'history'
    ]['losses']


def test_without_a_log(run):
    assert run('train', '--text', 'my.txt', *SMALL, '--max_iters', 1, '--log', 'no').returncode == 0
    assert not (run.folder / 'out/log.jsonl').exists()


def test_sample_with_weights_of_one_byte(trained):
    first, again = (
        trained('sample', '--prompt', 'To be', '--max_new_tokens', 20, '--int8').stdout
        for _ in range(2)
    )
    assert first == again and first.startswith('To be') and len(first) == len('To be') + 20 + 1


@pytest.mark.parametrize('how', ['ddp', 'fsdp'])
def test_two_processes_learn_what_one_does(run, how):
    "The whole command under torchrun: the same split, batches and losses (up to rounding), one voice, one checkpoint that samples."
    args = [
        'train',
        '--text',
        'my.txt',
        *SMALL,
        '--max_iters',
        '6',
        '--eval_interval',
        '3',
        '--device',
        'cpu',
    ]
    assert run(*args, '--out_dir', 'one').returncode == 0
    torchrun = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        '--no-python',
        str(COMMAND),
        *args,
        '--parallel',
        how,
    ]
    two = subprocess.run(
        torchrun,
        cwd=run.folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    assert two.returncode == 0, two.stderr
    assert (
        two.stdout.count('val loss') == 3
        and two.stdout.count('wrote ') == 1
        and '2 processes' in two.stdout
    )
    one = json.loads((run.folder / 'one/checkpoint/checkpoint.json').read_text())['history'][
        'losses'
    ]
    assert losses(run.folder) == pytest.approx(one, abs=1e-4)
    assert run('sample', '--max_new_tokens', 5).returncode == 0


def test_a_mistake_under_torchrun_is_said_once(run):
    torchrun = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        '--no-python',
        str(COMMAND),
        'train',
        '--text',
        'my.txt',
        '--n_embd',
        '30',
    ]
    done = subprocess.run(
        torchrun,
        cwd=run.folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode and done.stderr.count('n_embd=30') == 1


KILLED = """import os, signal, sys
from transformer_course import cli
report = cli.Reporter.__call__
def report_and_die(self, step, history):
    report(self, step, history)
    if step == int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)
cli.Reporter.__call__ = report_and_die
cli.main(sys.argv[2:])
"""


def losses(folder):
    return about(folder)['history']['losses']


@pytest.mark.parametrize('kill_at', [20, 40])
def test_kill_and_resume_gives_the_same_losses(run, kill_at, tmp_path_factory):
    args = [
        'train',
        '--text',
        str(run.folder / 'my.txt'),
        *SMALL,
        '--dropout',
        '0.1',
        '--max_iters',
        '60',
        '--eval_interval',
        '10',
    ]
    whole = tmp_path_factory.mktemp('whole')
    subprocess.run([COMMAND, *args], cwd=whole, check=True, capture_output=True)
    killed = subprocess.run(
        [sys.executable, '-c', KILLED, str(kill_at), *args], cwd=run.folder, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL and about(run.folder)['step'] == kill_at
    assert run('train', '--resume').returncode == 0
    assert losses(run.folder) == losses(whole)
    model = [(f / 'out/checkpoint/model.safetensors').read_bytes() for f in (run.folder, whole)]
    assert model[0] == model[1]
