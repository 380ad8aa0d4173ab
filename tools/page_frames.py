"""What surrounds the text of a page: contents that fold, names of landmarks, the page's script.

smalldocs writes the pages; this goes over them once they are there.
"""

import base64
import re
import shutil
import struct
from pathlib import Path

from cells import ROOT, notebook_paths
from dark_figures import dark_drawings
from page_cells import addresses

SITE = Path(__file__).resolve().parent / 'site'
API = re.compile(
    r'<h[2-5][^>]*\bid="([^"]+)"[^>]*class="[^"]*\bapi\b[^"]*"[^>]*>(.*?)</h[2-5]>', re.S
)
TOC = re.compile(r'<nav id="TOC"[^>]*>(.*?)</nav>', re.S)
TITLE_ENDS = '<div class="quarto-title-meta"></div></header>'
NAMED = [  # landmarks get names of their own, and what acts as a button says so
    ('<nav class="navbar', '<nav aria-label="Site" class="navbar'),
    ('<nav class="quarto-secondary-nav"', '<div class="quarto-secondary-nav"'),
    ('</nav></div></nav></header>', '</nav></div></div></header>'),
    ('<nav id="quarto-sidebar"', '<nav aria-label="Chapters" id="quarto-sidebar"'),
    (
        '<nav class="page-navigation"',
        '<nav aria-label="Neighbouring pages" class="page-navigation"',
    ),
    ('role="navigation" aria-expanded', 'role="button" tabindex="0" aria-expanded'),
    ('href="" title="Toggle dark mode"', 'href="" role="button" aria-label="Light or dark"'),
    ('aria-label="Toggle sidebar navigation"', 'aria-label="Chapters" title="Chapters"'),
]


def page_of(path):
    "The name of a notebook's page."
    name = path.relative_to(ROOT / 'nbs').with_suffix('.html').as_posix()
    return re.sub(r'^\d\d_', '', name)


def api_list(text):
    "The names that a page defines, as a list that opens; empty where it defines none."
    found = API.findall(text)
    if not found:
        return ''
    names = [(anchor, re.sub(r'<a\b.*?</a>|<[^>]+>', '', name).strip()) for anchor, name in found]
    items = ''.join(
        f'<li><a href="#{anchor}"><code>{name}</code></a></li>' for anchor, name in names
    )
    is_open = '' if re.search(r'<nav id="TOC"[^>]*>.*?<li>', text, re.S) else ' open'
    summary = '<summary>Defined here</summary>'
    return f'<details class="api-names"{is_open}>{summary}<ul>{items}</ul></details>'


def links_row(path, title, up):
    "The row under a page's title: run it, have it, read it, change it, say what is wrong."
    items = []
    for text, (icon, address) in addresses(path, title).items():
        own = 'https://' not in address
        href = f'{up}{address}" download="{Path(path).name}' if own else address
        mark = f'<i class="bi bi-{icon}" aria-hidden="true"></i>'
        items.append(f'<li><a href="{href}">{mark} {text}</a></li>')
    return f'<ul class="notebook-links" aria-label="This notebook">{"".join(items)}</ul>'


def contents(text):
    """Contents beside the text, then the names that the page defines.

    On narrow windows both stand below the title, folded.
    """
    names = api_list(text)
    toc = TOC.search(text)
    listed = toc[1] if toc else '<h2 id="toc-title">On this page</h2>'
    if not toc and not names:
        return text
    inner = re.sub(r' (id|data-scroll-target)="[^"]*"', '', re.sub(r'<h2.*?</h2>', '', listed))
    fold = f'<details class="contents-fold"><summary>On this page</summary>{inner}{names}</details>'
    fold = f'<nav aria-label="On this page, folded" class="contents-nav">{fold}</nav>'
    if toc:
        label = '<nav id="TOC" aria-label="On this page" class="toc-active">'
        text = text.replace(toc[0], f'{label}{toc[1]}{names}</nav>', 1)
    return text.replace(TITLE_ENDS, TITLE_ENDS + fold, 1)


def wrapped(text):
    "Output that is prose, a message for example, may be wrapped; columns may not."
    printed = re.compile(r'(<div class="cell-output[^"]*">\n)<pre>(<code>.*?</code></pre>)', re.S)
    columns = re.compile(r'\S {2,}\S')

    def mark(m):
        return m[0] if columns.search(m[2]) else f'{m[1]}<pre class="prose">{m[2]}'

    return printed.sub(mark, text)


WIDE = 700  # a figure that is wider is not squeezed into a phone; it scrolls
DOTS = 110  # per inch, as a page shows them; transformer_course.figures stores twice as many


def size_of(png):
    "Width and height at which a page shows a picture, from its first bytes; None if not a PNG."
    if png[12:16] != b'IHDR':
        return None
    width, height = struct.unpack('>II', png[16:24])
    at = png.find(b'pHYs')
    per_metre = struct.unpack('>I', png[at + 4 : at + 8])[0] if at > 0 else 0
    scale = DOTS / (per_metre * 0.0254) if per_metre else 1
    return round(width * scale), round(height * scale)


def sized(text):
    "Say how large each figure is, so that nothing moves while a page loads."

    def size(m):
        found = size_of(base64.b64decode(m[2][:2000]))
        if not found:
            return m[0]
        wide = ' wide' if found[0] > WIDE else ''
        return f'{m[1]} width="{found[0]}" height="{found[1]}" class="img-fluid{wide}"'

    return re.sub(r'(src="data:image/png;base64,([^"]+)") class="img-fluid"', size, text)


def flags_whole(text):
    "In a command that is wrapped no flag is broken at its hyphens."
    command = re.compile(r'<pre class="sourceCode (?:sh|bash)\b.*?</pre>', re.S)
    flag = re.compile(r'(?<![\w-])(--?[A-Za-z][\w-]*)(?![^<]*>)')
    return command.sub(lambda m: flag.sub(r'<span class="flag">\1</span>', m[0]), text)


def framed(text, path, up):
    "The page of the notebook at `path`, with what surrounds its text."
    for old, new in NAMED:
        text = text.replace(old, new)
    title = re.sub(r'<[^>]+>', '', re.search(r'<h1[^>]*>(.*?)</h1>', text, re.S)[1])
    text = contents(sized(flags_whole(wrapped(text))))
    text = text.replace(TITLE_ENDS, TITLE_ENDS + links_row(path, title, up), 1)
    script = f'<script src="{up}site_libs/reader.js" defer></script>'
    return text.replace('</body>', f'{script}</body>')


def frame(site):
    "Go over all pages of a built site."
    paths = {page_of(path): path.relative_to(ROOT).as_posix() for path in notebook_paths()}
    for page in site.rglob('*.html'):
        name = page.relative_to(site).as_posix()
        up = '../' * name.count('/')
        text = framed(page.read_text(encoding='utf-8'), paths[name], up)
        text = dark_drawings(text, site / 'site_libs' / 'dark', f'{up}site_libs/dark')
        page.write_text(text, encoding='utf-8')
    shutil.copy(SITE / 'reader.js', site / 'site_libs' / 'reader.js')
