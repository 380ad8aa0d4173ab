"""The order of chapters, those of one number among them.

Three things say which of two chapters with one number comes first: what one imports of the other,
what a chapter calls "the next chapter" or "the last", and the table on the front page. They are
asked in this order; what they leave open the alphabet decides.
"""

import re
from pathlib import Path

from cells import code_of, module_of, read_cells

AFTER = re.compile(r'\bnext(?: chapter| notebook)?\b[^.\n]{0,40}\]\((\d\d_\w+\.ipynb)\)')
BEFORE = re.compile(r'\b(?:last chapter|goes on from)\b[^.\n]{0,40}\]\((\d\d_\w+\.ipynb)\)')
LINK = re.compile(r'\]\((\d\d_\w+\.ipynb)\)')


def told_before(path, modules):
    "The chapters that a notebook says, or shows by an import, to be before it, and after it."
    cells = read_cells(path)
    prose = '\n\n'.join(cell['source'] for cell in cells if cell['cell_type'] == 'markdown')
    code = '\n'.join(cell['source'] for cell in code_of(cells))
    used = set(re.findall(r'^\s*from transformer_course\.([\w.]+) import', code, re.M))
    imported = {modules[name] for name in used & modules.keys()}
    return imported | set(BEFORE.findall(prose)), set(AFTER.findall(prose)) - imported


def mapped(nbs):
    "The place of each chapter in the table on the front page."
    front = Path(nbs) / 'index.ipynb'
    cells = read_cells(front) if front.exists() else []
    prose = '\n'.join(cell['source'] for cell in cells if cell['cell_type'] == 'markdown')
    rows = '\n'.join(line for line in prose.splitlines() if line.startswith('|'))
    return {name: i for i, name in enumerate(dict.fromkeys(LINK.findall(rows)))}


def in_order(names, before, rank):
    "Names such that each comes after those in `before[name]`, otherwise by rank."
    left, out = sorted(names, key=lambda name: (rank.get(name, len(rank)), name)), []
    while left:
        free = [name for name in left if not before[name] & set(left) - {name}]
        out.append((free or left)[0])  # where they contradict each other, the rank decides
        left.remove(out[-1])
    return out


def chapters(nbs):
    "The chapters in folder `nbs`, as (number, file name), in the order to read them."
    paths = sorted(Path(nbs).glob('[0-9][0-9]_*.ipynb'))
    modules = {module_of(read_cells(path)): path.name for path in paths}
    before = {path.name: set() for path in paths}
    for path in paths:
        earlier, later = told_before(path, modules)
        before[path.name] |= earlier
        for name in later & before.keys():
            before[name].add(path.name)
    rank, found = mapped(nbs), []
    for number in sorted({path.name[:2] for path in paths}):
        names = [path.name for path in paths if path.name.startswith(number)]
        found += [(int(number), name) for name in in_order(names, before, rank)]
    return found
