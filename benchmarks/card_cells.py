"Cells that only a graphics card can run: where they are, and what of its notebook each needs."

import ast, builtins, json, re, symtable
from pathlib import Path

KNOWN = {*dir(builtins), '__name__', 'display'}
COMPREHENSIONS = {'listcomp', 'setcomp', 'dictcomp', 'genexpr'}


def read_cells(path):
    "The code cells of a notebook as (id, source); lines for the shell and for IPython are blanked."
    cells = json.loads(Path(path).read_text(encoding='utf-8'))['cells']
    found = [(c['id'], ''.join(c['source'])) for c in cells if c['cell_type'] == 'code']
    return [(name, re.sub(r'^[!%].*$', 'pass', source, flags=re.M)) for name, source in found]


def is_cuda(source):
    "True for a cell that does more where there is a card: it asks, or it is marked `#| cuda`."
    if re.search(r'^#\|\s*cuda\b', source, re.M):
        return True
    asks = [n.test for n in ast.parse(source).body if isinstance(n, ast.If)]
    return any('cuda.is_available()' in ast.unparse(test) for test in asks)


def loop_names(source):
    "What the `for` and `with` statements of some code bind before they read it."
    targets = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.For):
            targets.append(node.target)
        if isinstance(node, ast.withitem) and node.optional_vars:
            targets.append(node.optional_vars)
    return {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}


def symbols(source):
    "What top-level code binds, what it reads at once, and what its functions read later."
    top = symtable.symtable(source, 'cell', 'exec')
    bound = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    now = {s.get_name() for s in top.get_symbols() if s.is_referenced()} - loop_names(source)
    later, inside = set(), [(table, False) for table in top.get_children()]
    while inside:
        table, waits = inside.pop()
        waits = waits or table.get_name() not in COMPREHENSIONS
        found = {s.get_name() for s in table.get_symbols() if s.is_global()}
        later |= found if waits else set()
        now |= set() if waits else found
        inside += [(child, waits) for child in table.get_children()]
    return bound, now - KNOWN, later - KNOWN


def needed(cells, number):
    """The statements, in order, that cell `number` needs; a name that nobody binds is an error.

    A name is looked up as Python would: a statement sees the latest binding before it, a function
    the latest before it is called, which here means before the cell. What only shows, asserts or
    calls for its effect is left out.
    """
    split = [[ast.unparse(n) for n in ast.parse(source).body] for _, source in cells[: number + 1]]
    all_of_it = sum(split, [])
    start, end = len(all_of_it) - len(split[-1]), len(all_of_it)
    bound, now, later = zip(*map(symbols, all_of_it))
    taken, new = set(range(start, end)), list(range(start, end))
    while new:
        at = new.pop()
        for name, limit in [(n, at) for n in now[at]] + [(n, end) for n in later[at]]:
            place = next((i for i in reversed(range(limit)) if name in bound[i]), None)
            if place is None and name not in bound[at]:
                raise ValueError(f'cell {cells[number][0]} needs {name!r}, which no cell has')
            if place is not None and place not in taken:
                taken.add(place)
                new.append(place)
    return [all_of_it[i] for i in sorted(taken) if i < start]
