"The house rules for notebooks, checked on the files as they are committed; none is executed here."

import ast, json, re, subprocess, sys
import pytest
from conftest import ROOT, notebook_paths

PATHS = notebook_paths()
NAMES = [p.relative_to(ROOT / 'nbs').as_posix() for p in PATHS]
CHAPTERS = [p for p in PATHS if re.match(r'\d\d_', p.name)]
FOUNDATION = {
    'sources',
    'plots',
    'claims',
    'checkpoint',
}  # support that chapters stand on; it imports no chapter
TOPS = {'cli', 'exercises'}  # support that stands on the chapters
MACHINE_PATH = re.compile(
    r'/home/\w|/root\b|/Users/\w|/tmp/\w|/work/\w|/usr/lib/|site-packages|[A-Z]:\\\\?Users'
)


class Notebook:
    "A notebook's cells, read once."

    def __init__(self, path):
        self.path, self.bytes = path, path.read_bytes()
        self.cells = json.loads(self.bytes)['cells']
        for cell in self.cells:
            cell['source'] = ''.join(cell['source'])
        self.code = [c for c in self.cells if c['cell_type'] == 'code' and c['source'].strip()]
        found = [re.search(r'^#\|\s*default_exp\s+(\w+)', c['source'], re.M) for c in self.code]
        self.module = next((m[1] for m in found if m), None)
        self.number = int(path.name[:2]) if re.match(r'\d\d_', path.name) else None


def directives(cell):
    "The names of a cell's `#|` directives."
    return {m[1] for m in re.finditer(r'^#\|\s*([\w-]+)', cell['source'], re.M)}


def skipped(cell):
    "True for a cell that neither nbdev_test nor tools/execute.py runs."
    return bool(
        directives(cell) & {'slow', 'cuda'}
        or re.search(r'^#\|\s*eval:\s*false', cell['source'], re.M)
        or 'nbdev_export' + '(' in cell['source']
    )


def exported(cell):
    return bool(directives(cell) & {'export', 'exports', 'exporti'})


def tree(cell):
    "The cell's syntax tree, without shell lines and magics."
    return ast.parse(
        '\n'.join(
            'pass' if re.match(r'[!%]', line) else line for line in cell['source'].splitlines()
        )
    )


def lines(cell):
    return [l for l in cell['source'].splitlines() if l.strip() and not l.startswith('#|')]


ALL = {p: Notebook(p) for p in PATHS}
notebook = pytest.mark.parametrize('nb', ALL.values(), ids=NAMES)
chapter = pytest.mark.parametrize('nb', [ALL[p] for p in CHAPTERS], ids=[p.stem for p in CHAPTERS])


def where(nb, cell):
    return f'{nb.path.name} cell {nb.cells.index(cell)} ({cell["source"].splitlines()[0][:60]!r})'


def test_in_sync():
    "Notebooks are clean; the modules, README.md and the sidebar are what the notebooks make them."
    done = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'test.py', 'sync'], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@notebook
def test_first_cell_is_title_and_summary(nb):
    first = nb.cells[0]
    assert first['cell_type'] == 'markdown' and re.fullmatch(
        r'# [^\n]+\n+> [^\n]+\s*', first['source']
    ), (
        'the first cell becomes the front matter: "# Title", an empty line, "> one line", and nothing else'
    )


@notebook
def test_smaller_than_a_megabyte(nb):
    assert len(nb.bytes) < 1_000_000


@notebook
def test_cells_are_short(nb):
    long = [
        where(nb, c) for c in nb.code if len(lines(c)) > 25 or len(c['source'].splitlines()) > 30
    ]
    assert not long, f'more than 25 lines of code: {long}'


@notebook
def test_outputs_are_clean(nb):
    "No errors, no warnings, nothing of the machine they were made on."
    for cell in nb.code:
        for out in cell['outputs']:
            assert out['output_type'] != 'error', f'{where(nb, cell)} shows an error'
            assert out.get('name') != 'stderr', (
                f'{where(nb, cell)} writes to stderr: {"".join(out["text"])[:200]}'
            )
            text = json.dumps(
                [
                    out.get('text', ''),
                    {k: v for k, v in out.get('data', {}).items() if not k.startswith('image/')},
                ]
            )
            found = MACHINE_PATH.search(text)
            assert not found, (
                f'{where(nb, cell)} shows a machine path: {text[max(0, found.start() - 20) : found.end() + 40]}'
            )


@notebook
def test_cells_that_print_have_outputs(nb):
    "The site shows committed outputs: what prints or ends in a value has been executed."
    for cell in nb.code:
        if skipped(cell) or exported(cell) or cell['outputs']:
            continue
        body = tree(cell).body
        prints = any(
            isinstance(s, ast.Expr)
            and isinstance(s.value, ast.Call)
            and getattr(s.value.func, 'id', '') == 'print'
            for s in body
        )
        value = (
            body
            and isinstance(body[-1], ast.Expr)
            and not cell['source'].rstrip().endswith(';')
            and isinstance(
                body[-1].value,
                (
                    ast.Name,
                    ast.Attribute,
                    ast.Subscript,
                    ast.Compare,
                    ast.BinOp,
                    ast.Tuple,
                    ast.List,
                    ast.Dict,
                ),
            )
        )
        assert not prints and not value, (
            f'{where(nb, cell)} has no output: run `python tools/execute.py {nb.path.relative_to(ROOT)}`'
        )


@notebook
def test_imports_stand_alone(nb):
    "Building the site with nbdev executes import cells: one that also does something else would do it there too."
    for cell in nb.code:
        if (
            exported(cell)
            or re.search(r'^#\|\s*eval:\s*false', cell['source'], re.M)
            or 'nbdev_export' + '(' in cell['source']
        ):
            continue
        nodes = tree(cell).body  # an import inside a function is not run there
        imports = any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes)
        assert not imports or not any(
            not isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes
        ), f'{where(nb, cell)} imports and does something else'


@notebook
def test_public_names_are_documented_and_tested(nb):
    "Each exported function and class has a docstring, and cells that are not exported use it."
    used = '\n'.join(c['source'] for c in nb.code if not exported(c))
    for cell in nb.code:
        if not exported(cell):
            continue
        for node in tree(cell).body:
            if not isinstance(
                node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            ) or node.name.startswith('_'):
                continue
            if any(
                getattr(d, 'id', getattr(getattr(d, 'func', None), 'id', '')) == 'patch'
                for d in node.decorator_list
            ):
                continue
            assert ast.get_docstring(node), f'{node.name} has no docstring'
            assert re.search(rf'\b{node.name}\b', used), (
                f'{node.name} is exported, but no cell of its notebook tries it'
            )
    if nb.module:
        assert 'assert' in used, 'nothing is asserted'


@notebook
def test_imports_point_down(nb):
    "A chapter imports earlier chapters and support; the support that chapters stand on imports no chapter."
    if not nb.module:
        return
    by_module = {other.module: other for other in ALL.values() if other.module}
    for cell in nb.code:
        for node in ast.walk(tree(cell)):
            if not isinstance(node, ast.ImportFrom) or not (node.module or '').startswith(
                'transformer_course.'
            ):
                continue
            name = node.module.split('.')[1]
            other = by_module.get(name)
            assert not any(a.name == '*' for a in node.names), f'{where(nb, cell)}: star import'
            if other is None or other is nb or nb.module in TOPS:
                continue
            if nb.number is not None and other.number is not None:
                down = other.number < nb.number
            elif nb.number is not None:
                down = name not in TOPS or not exported(cell)
            else:
                down = (
                    other.number is None
                    and name not in TOPS
                    or nb.module not in FOUNDATION
                    or not exported(cell)
                )
            assert down, f'{where(nb, cell)} imports {name}'


@notebook
def test_library_needs_only_its_requirements(nb):
    "Exported cells import nothing of the development tools, and matplotlib and IPython only inside functions."
    for cell in nb.code:
        if not exported(cell):
            continue
        parsed = tree(cell)
        top = {id(n) for n in parsed.body}
        for node in ast.walk(parsed):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or '']
                if isinstance(node, ast.ImportFrom)
                else []
            )
            banned = {'nbdev', 'fastcore', 'execnb', 'pytest'} | (
                {'IPython', 'matplotlib'} if id(node) in top else set()
            )
            assert not {n.split('.')[0] for n in names} & banned, (
                f'{where(nb, cell)} imports {names}'
            )


@chapter
def test_prose_outweighs_code(nb):
    words = sum(len(c['source'].split()) for c in nb.cells if c['cell_type'] == 'markdown')
    code = sum(len(lines(c)) for c in nb.code)
    assert words >= 3 * code, f'{words} words of prose for {code} lines of code'


def test_modules_come_from_notebooks():
    "Every module is exported by exactly one notebook."
    modules = [nb.module for nb in ALL.values() if nb.module]
    assert len(modules) == len(set(modules))
    files = {p.stem for p in (ROOT / 'transformer_course').glob('*.py')} - {'__init__', '_modidx'}
    assert files == set(modules)
