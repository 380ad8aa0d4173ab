"""The house rules: how long lines, cells, functions and modules may be, which way imports point.

CONTRIBUTING.md says why. Texts and syntax trees are looked at; nothing is imported or executed.
"""

import ast
import subprocess
import sys

import pytest
from cells import code_lines, exported, tree
from conftest import ROOT
from notebooks import BY_MODULE, CHAPTERS, every_chapter, every_notebook

LINE, CELL, ONE_DEFINITION, FUNCTION, MODULE = 100, 25, 52, 40, 260
PACKAGE = ROOT / 'transformer_course'
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef
SCRIPTS = sorted(p for wing in ('tools', 'tests', 'benchmarks') for p in ROOT.glob(f'{wing}/*.py'))


def long_functions(parsed):
    "The functions of a syntax tree that are too long, in words."
    for node in ast.walk(parsed):
        lines = node.end_lineno - node.lineno + 1 if isinstance(node, FUNCTIONS) else 0
        if lines > FUNCTION:
            yield f'{node.name} has {lines} lines, at most {FUNCTION}'


# ---------------------------------------------------------------- layout


@pytest.mark.parametrize('command', ['check', 'format --check'])
def test_ruff(command):
    "Layout and lint, notebooks included, as pyproject.toml has them."
    command = [sys.executable, '-m', 'ruff', *command.split(), '.']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@every_notebook
def test_cells_are_short(nb):
    "A cell is one thought; one that holds a single class or function may be longer."
    long = []
    for cell in nb.code:
        body, lines = tree(cell['source']).body, len(code_lines(cell['source']))
        one = len(body) == 1 and isinstance(body[0], (ast.ClassDef, *FUNCTIONS))
        limit = ONE_DEFINITION if one else CELL
        if lines > limit:
            long.append(f'{nb.where(cell)}: {lines} lines, at most {limit}')
    assert not long, '\n'.join(long)


@every_notebook
def test_functions_of_notebooks_are_short(nb):
    for cell in nb.code:
        assert not list(long_functions(tree(cell['source']))), nb.where(cell)


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda p: f'{p.parent.name}/{p.name}')
def test_functions_of_scripts_are_short(path):
    assert not list(long_functions(ast.parse(path.read_text(encoding='utf-8'))))


@every_chapter
def test_prose_outweighs_code(nb):
    "Three words of prose, at least, for a line of code."
    words = sum(len(c['source'].split()) for c in nb.cells if c['cell_type'] == 'markdown')
    code = sum(len(code_lines(c['source'])) for c in nb.code)
    assert words >= 3 * code, f'{words} words of prose for {code} lines of code'


# ---------------------------------------------------------------- modules

MODULES = {
    '.'.join(path.relative_to(PACKAGE).with_suffix('').parts): path
    for path in sorted(PACKAGE.rglob('*.py'))
    if path.stem not in ('__init__', '_modidx')
}
PARSED = {name: ast.parse(path.read_text(encoding='utf-8')) for name, path in MODULES.items()}
every_module = pytest.mark.parametrize('name', MODULES)


def written_by_nbdev(parsed):
    "The lines that nbdev writes as long as it likes: the summary on top, and `__all__`."
    lines = {1}
    for node in parsed.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__':
            lines |= set(range(node.lineno, node.end_lineno + 1))
    return lines


@every_module
def test_modules_are_short(name):
    lines = MODULES[name].read_text(encoding='utf-8').splitlines()
    assert len(lines) <= MODULE, f'{len(lines)} lines'
    theirs = written_by_nbdev(PARSED[name])
    for n, line in enumerate(lines, 1):
        if n not in theirs and not line.startswith('# %%'):
            assert len(line) <= LINE, f'line {n} has {len(line)} columns'


# ---------------------------------------------------------------- imports point down

# support that chapters stand on from the first: none of it imports a chapter
FOUNDATION = {'cache', 'checkpoint', 'course.claims', 'course.long_runs', 'course.records', 'dates'}
FOUNDATION |= {'course.missing', 'course.scoreboard', 'course.walk', 'fetching'}
FOUNDATION |= {'figures', 'files', 'graphs', 'layout', 'logs', 'markov', 'matrices', 'plots'}
FOUNDATION |= {'progress', 'settings', 'sources', 'streams', 'vocabularies', 'wheels'}
TOPS = {'__main__', 'cli', 'course.exercises'}  # support that stands on the chapters


def lazy_homes():
    "Which module the lazy top level takes each of its names from."
    for node in ast.parse((PACKAGE / '__init__.py').read_text(encoding='utf-8')).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '_HOME':
            return ast.literal_eval(node.value)
    return {}


HOMES = lazy_homes()


def imported(parsed, module=''):
    "The modules of the package that code imports, inside functions too; `module` is its own name."
    inside = ['transformer_course', *module.split('.')[:-1]]
    found = set()
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else []
            base = '.'.join([*base, *([node.module] if node.module else [])])
            names = [alias.name for alias in node.names]
            found |= {base, *(f'{base}.{name}' for name in names)}
            if base == 'transformer_course':
                found |= {f'{base}.{HOMES[name]}' for name in names if name in HOMES}
    return {name.removeprefix('transformer_course.') for name in found} & MODULES.keys()


GRAPH = {name: imported(parsed, name) - {name} for name, parsed in PARSED.items()}


def reached(name):
    "Everything that importing a module may import in turn: module -> the way there."
    ways, todo = {}, [(name, (name,))]
    while todo:
        at, way = todo.pop()
        for other in GRAPH[at]:
            if other not in ways:
                ways[other] = (*way, other)
                todo.append((other, ways[other]))
    return ways


def order(name):
    "The place of a module among the chapters, or None for support."
    nb = BY_MODULE.get(name)
    return CHAPTERS.index(nb) if nb in CHAPTERS else None


@every_module
def test_no_circles(name):
    way = reached(name).get(name)
    assert not way, ' → '.join(way)


@every_module
def test_modules_import_downwards(name):
    "A chapter reaches earlier chapters only, through support too; the foundation reaches none."
    here = order(name)
    for other, way in reached(name).items():
        there, arrows = order(other), ' → '.join(way)
        if name in FOUNDATION:
            assert there is None, f'support that chapters stand on imports a chapter: {arrows}'
        if here is not None and there is not None:
            assert there < here, f'imports a later chapter: {arrows}'
        assert other not in TOPS or name in TOPS, f'imports what stands on top: {arrows}'


def test_the_foundation_is_there():
    assert FOUNDATION <= MODULES.keys()


@every_notebook
def test_cells_import_downwards(nb):
    "What a notebook imports to try things out lies below it too, but for what stands on top."
    here = CHAPTERS.index(nb) if nb in CHAPTERS else None
    for cell in nb.code:
        parsed = tree(cell['source'])
        stars = [n for n in ast.walk(parsed) if isinstance(n, ast.ImportFrom)]
        assert not any(a.name == '*' for n in stars for a in n.names), (
            f'{nb.where(cell)}: star import'
        )
        for name in imported(parsed) - {nb.module}:
            there = order(name)
            if here is not None and there is not None:
                assert there < here, f'{nb.where(cell)} imports {name}, a later chapter'
            if nb.module in FOUNDATION and exported(cell['source']):
                assert there is None, f'{nb.where(cell)} imports {name}, a chapter'
