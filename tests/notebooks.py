"The notebooks of the course, read once, for the tests that look at files."

import re

import pytest
from cells import code_of, notebook_paths, read_cells
from cells import module_of as module_of_cells
from chapter_order import chapters
from conftest import ROOT

NBS = ROOT / 'nbs'


class Notebook:
    "A notebook's cells, and what it is in the course."

    def __init__(self, path):
        self.path, self.cells = path, read_cells(path)
        self.name = path.relative_to(NBS).as_posix()
        self.code = code_of(self.cells)
        self.module = module_of_cells(self.cells)  # such as 'course.claims', or None
        self.is_chapter = bool(re.match(r'\d\d_', path.name))

    def where(self, cell):
        "Words for a cell of this notebook."
        first = cell['source'].splitlines()[0][:60]
        return f'{self.path.name} cell {self.cells.index(cell)} ({first!r})'


ALL = [Notebook(path) for path in notebook_paths()]
PLACES = [name for _, name in chapters(NBS)]
CHAPTERS = sorted((nb for nb in ALL if nb.is_chapter), key=lambda nb: PLACES.index(nb.name))
BY_MODULE = {nb.module: nb for nb in ALL if nb.module}
every_notebook = pytest.mark.parametrize('nb', ALL, ids=[nb.name for nb in ALL])
every_chapter = pytest.mark.parametrize('nb', CHAPTERS, ids=[nb.path.stem for nb in CHAPTERS])
