"The site is built from the committed notebooks and read in a real browser, from loopback only."

import functools
import http.server
import re
import subprocess
import sys
import threading
from urllib.parse import unquote

import pytest
from cells import notebook_paths, settings
from conftest import ROOT, missing
from page_cells import COLAB_BRANCH
from page_frames import page_of

if sys.version_info < (3, 11):
    pytest.skip(
        'building the site needs Python 3.11 or later (smalldocs does)', allow_module_level=True
    )


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The built site's folder; the build fails on broken links and on what comes from elsewhere."
    if not (ROOT / 'node_modules' / 'katex').exists():
        missing('KaTeX is not there: run `npm i --ignore-scripts --no-package-lock`')
    out = tmp_path_factory.mktemp('site') / '_docs'
    command = [sys.executable, ROOT / 'tools' / 'build_docs.py', '--out', out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope='module')
def pages(site):
    return sorted(p.relative_to(site).as_posix() for p in site.rglob('*.html'))


@pytest.fixture(scope='module')
def address(site):
    "The site, served."

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


def note_problems(page, address):
    "Have a page of the browser keep a list of errors, and of requests to elsewhere."
    page.problems = []
    note = lambda text: page.problems.append(text)

    def console(message):
        if message.type == 'error':
            note(f'console: {message.text}')

    def failed(request):
        if 'ERR_ABORTED' not in request.failure:  # aborted: the test went on
            note(f'failed: {request.url}')

    def response(answer):
        if answer.status >= 400:
            note(f'{answer.status}: {answer.url}')

    def request(asked):
        if not asked.url.startswith((address, 'data:')):
            note(f'elsewhere: {asked.url}')

    page.on('console', console)
    page.on('pageerror', lambda e: note(f'error: {e}'))
    page.on('requestfailed', failed)
    page.on('response', response)
    page.on('request', request)


@pytest.fixture
def page(browser, address, request):
    "A page of the browser that notes problems; the test's marker may set its width and colours."
    usual = {'viewport': {'width': 1280, 'height': 900}, 'color_scheme': 'light'}
    context = browser.new_context(**{**usual, **getattr(request, 'param', {})})
    page = context.new_page()
    note_problems(page, address)
    yield page
    context.close()


# elements that stick out of the window to the right and that no box of their own scrolls; the
# page's own frame clips them
STICKING_OUT = """[...document.querySelectorAll('main *')].filter(e => {
  const r = e.getBoundingClientRect(), inside = box => box.right <= innerWidth + 1;
  if (!r.width || !r.height || inside(r)) return false;
  for (let p = e; p && p.tagName !== 'MAIN'; p = p.parentElement) {
    const scrolls = getComputedStyle(p).overflowX !== 'visible';
    if (scrolls && inside(p.getBoundingClientRect())) return false;
  }
  return true;
}).map(e => e.outerHTML.slice(0, 120))"""


def luminance(color):
    "0 (black) to 255 (white) of a CSS rgb() colour."
    r, g, b = map(float, re.findall(r'[\d.]+', color)[:3])
    return 0.299 * r + 0.587 * g + 0.114 * b


def style(page, selector, name):
    "A property of the first element that a selector finds, as the browser computes it."
    return page.eval_on_selector(selector, f'e => getComputedStyle(e).{name}')


def background(page, selector):
    return style(page, selector, 'backgroundColor')


def repository_paths(text):
    "The (path, line or '') of each address in the repository that a page names."
    known = settings()
    at = rf'{re.escape(known["git_url"])}/(?:blob|tree|raw|edit)/{known["branch"]}/'
    repo = f'{known["user"]}/{known["repo"]}'
    colab = rf'https://colab\.research\.google\.com/github/{re.escape(repo)}/blob/{COLAB_BRANCH}/'
    return re.findall(rf'(?:{at}|{colab})' + r'([^"\'#\s)<>]+)(?:#L(\d+))?', text)


def missing_path(path, line):
    "Whether a path is not in the repository, or nothing is defined in that line of its file."
    file = ROOT / unquote(path)
    if not line or not file.is_file():
        return not file.exists()
    lines = file.read_text(encoding='utf-8').splitlines()
    return not re.match(r'\s*(def|class|@)', ''.join(lines[int(line) - 1 : int(line)]))


def test_paths_into_the_repository_exist(site, pages):
    "Each page links to its notebook, and to the line of the source of what it exports."
    own = {page_of(path): path.relative_to(ROOT).as_posix() for path in notebook_paths()}
    for name in pages:
        found = repository_paths((site / name).read_text(encoding='utf-8'))
        wrong = [path for path, line in found if missing_path(path, line)]
        assert not wrong, f'{name} links to {wrong}, which the repository does not have'
        assert (own[name], '') in found, f'{name} does not link to its notebook, {own[name]}'


def test_no_link_is_left_as_it_was_written(site, pages):
    for name in pages:
        text = re.sub(r'<pre.*?</pre>', '', (site / name).read_text(encoding='utf-8'), flags=re.S)
        left = re.findall(r'.{0,60}\]\([\w./#-]+\.(?:ipynb|html)[^)]*\)', text)
        assert not left, f'{name}: {left}'


def test_one_page_for_each_notebook(pages):
    assert len(pages) == len(notebook_paths())


WIDTH = 'document.documentElement.scrollWidth'
# a drawing's other version, for the other colours, is not fetched before it is shown
LOADED = """[...document.images].every(
    i => getComputedStyle(i).display === 'none' || (i.complete && i.naturalWidth > 0))"""
DESCRIBED = '[...document.images].every(i => i.closest("nav") || i.alt)'


def check_width(page, name, width):
    "Neither the page nor anything on it is wider than the window."
    assert page.evaluate(WIDTH) <= width, f'{name} is wider than {width} px'
    out = page.evaluate(STICKING_OUT)
    assert not out, f'{name}: sticks out of {width} px: {out}'


def check_maths(page, name):
    "All formulas are rendered."
    assert page.locator('.katex').count() > 0, f'{name}: maths is not rendered'
    errors = page.locator('.katex-error')
    found = errors.first.get_attribute('title') if errors.count() else None
    assert not found, f'{name}: {found}'


# blocks of code that have more to show than they have room for
CLIPPED = """[...document.querySelectorAll('main pre.sourceCode')]
  .filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1)
  .map(e => e.innerText.slice(0, 120))"""

# boxes that scroll sideways, and that the keyboard does not reach or that do not show it
HIDDEN = """[...document.querySelectorAll('main pre')]
  .map(e => [e, e.scrollWidth - e.clientWidth])
  .filter(([e, more]) => e.clientWidth && more > 0)
  .filter(([e, more]) => e.tabIndex !== 0 || (more > 4 && getComputedStyle(e).maskImage === 'none'))
  .map(([e]) => e)
  .map(e => e.innerText.slice(0, 120))"""


@pytest.mark.parametrize('page', [{'viewport': {'width': 1440, 'height': 900}}], indirect=True)
def test_every_page_loads(page, address, pages, site):
    "No error, nothing from elsewhere, the maths rendered, nothing wider than its place."
    for name in pages:
        page.goto(address + name, wait_until='networkidle')
        assert page.locator('main h1').count() == 1, f'{name} has no title'
        if 'katex.min.js' in (site / name).read_text(encoding='utf-8'):
            check_maths(page, name)
        check_width(page, name, page.evaluate('innerWidth'))
        clipped = page.evaluate(CLIPPED)
        assert not clipped, f'{name}: code is clipped at 1440 px: {clipped}'
        assert page.evaluate(LOADED), f'{name}: a picture did not load'
        assert page.evaluate(DESCRIBED), f'{name}: a picture has no description'
        assert not page.problems, f'{name}: {page.problems}'


@pytest.mark.parametrize('page', [{'viewport': {'width': 390, 'height': 844}}], indirect=True)
def test_on_a_phone(page, address, pages):
    "At 390 px nothing sticks out, and the chapters can be opened."
    for name in pages:
        page.goto(address + name, wait_until='load')
        check_width(page, name, 390)
        page.wait_for_function('document.readyState === "complete"')
        hidden = page.evaluate(HIDDEN)
        assert not hidden, f'{name}: code goes on beyond the edge, and nothing says so: {hidden}'
    page.goto(address + 'attention.html', wait_until='load')
    page.locator('.contents-fold summary').first.click()
    page.locator('.contents-fold a', has_text='Why divide').click()
    page.wait_for_url(re.compile('#why-divide'))
    assert page.locator('#quarto-search input').is_visible(), 'the search is not in the bar'
    page.goto(address + 'index.html', wait_until='load')
    page.locator('.quarto-btn-toggle').first.click()
    page.wait_for_selector('#quarto-sidebar.show')
    page.locator('#quarto-sidebar a', has_text='00 ').first.click()
    page.wait_for_url(re.compile(r'/data\.html'))
    assert not page.problems


QUESTIONS = {  # typed into the search: a page that answers it
    'how do I train on my own text': 'questions.html',
    'RoPE': 'positions.html',
    'flash attention': 'multihead.html',
    'weight tying': 'gpt.html',
    'KV cache': 'support/cache.html',
    'byte pair encoding': 'tokenizer.html',
    'chain of thought': 'scratchpad.html',
    'load GPT-2 weights': 'support/weights.html',
    'top-p': 'generation.html',
    'what is attention': 'attention.html',
}


def test_search(page, address):
    "Each of ten questions finds its page among the first three results, which lead there."
    page.goto(address + 'index.html', wait_until='load')
    results = page.locator('.search-result')
    for question, wanted in QUESTIONS.items():
        page.locator('#quarto-search input').fill('')
        page.wait_for_function('!document.querySelector(".smalldocs-search-results.show")')
        page.locator('#quarto-search input').fill(question)
        page.wait_for_selector('.smalldocs-search-results.show .search-result')
        found = [link.get_attribute('href') for link in results.all()[:3]]
        there = [link.split('#')[0].removeprefix('./') for link in found]
        assert wanted in there, f'{question!r} finds {there}'
    results.first.click()
    page.wait_for_load_state('load')
    assert page.locator('main h1').count() == 1
    page.locator('#quarto-search input').fill('zzqqxxzzqq')
    page.wait_for_selector('.search-none')
    assert not page.problems


LOOKS = """figures => figures.map(e => [
    ['on-light', 'on-dark'].find(kind => e.classList.contains(kind)) || 'picture',
    getComputedStyle(e).display, getComputedStyle(e).backgroundColor])"""


def test_light_and_dark(page, address, pages, site):
    "The toggle darkens page, sidebar and drawings; pictures keep their paper; it is remembered."
    text = {name: (site / name).read_text(encoding='utf-8') for name in pages}
    figures = [name for name in pages if 'src="data:image/png' in text[name]]
    page.goto(address + figures[0], wait_until='load')
    assert luminance(background(page, 'body')) > 200
    page.locator('.quarto-color-scheme-toggle').first.click()
    page.wait_for_function('document.documentElement.classList.contains("quarto-dark")')
    assert luminance(background(page, 'body')) < 80
    side = background(page, '#quarto-sidebar')
    dark = side == 'rgba(0, 0, 0, 0)' or luminance(side) < 80
    assert dark, 'the sidebar stays light in dark mode'
    assert luminance(style(page, '#quarto-sidebar .sidebar-link', 'color')) > 150
    looks = page.locator('.cell-output-display img').evaluate_all(LOOKS)
    assert {'on-light', 'on-dark'} <= {kind for kind, *_ in looks}, 'no drawing'
    for kind, display, paper in looks:
        assert (display == 'none') == (kind == 'on-light'), f'a dark page shows {kind}'
        light = paper != 'rgba(0, 0, 0, 0)' and luminance(paper) > 230
        assert light == (kind != 'on-dark'), 'a picture without paper, or a drawing on it'
    page.evaluate("document.querySelectorAll('.on-dark').forEach(i => (i.loading = 'eager'))")
    page.wait_for_function(LOADED)
    page.goto(address + 'index.html', wait_until='load')
    assert luminance(background(page, 'body')) < 80, 'the choice is forgotten'
    assert not page.problems


def test_copy_button(browser, address):
    "Each block of code has a button that puts its text on the clipboard."
    context = browser.new_context()
    context.grant_permissions(['clipboard-read', 'clipboard-write'], origin=address.rstrip('/'))
    page = context.new_page()
    page.goto(address + 'data.html', wait_until='load')
    block = page.locator(':has(> .code-copy-button):visible').first
    block.hover()
    block.locator('.code-copy-button').click()
    page.wait_for_selector('.code-copy-button-checked')
    copied = page.evaluate('navigator.clipboard.readText()')
    assert copied.strip() == block.locator('pre code').inner_text().strip()
    context.close()


def test_api_entries_and_navigation(page, address):
    "An exported name has an anchor, its source and a link to the file; a page leads to the next."
    page.goto(address + 'attention.html#scaled_dot_product_attention', wait_until='load')
    assert page.locator('#scaled_dot_product_attention').is_visible()
    source = page.locator('main a', has_text='source').first.get_attribute('href')
    assert source[-1].isdigit(), f'{source} leads to no line'
    assert 'def scaled_dot_product_attention(' in page.locator('main').inner_text()
    page.locator('.page-navigation .nav-page-next a').click()
    page.wait_for_url(lambda url: not url.startswith(address + 'attention.html'))
    assert page.locator('main h1').count() == 1
    assert page.locator('footer').filter(has_text='Apache').count() == 1
    assert not page.problems


# ---------------------------------------------------------------- for every reader

TEN = (  # pages of each kind: start, questions, ledger, lessons short and long, tools
    'index questions ledger bibliography attention seq2seq speculative sets '
    'support/claims support/cache'
).split()
AXE = """([what, rules]) => axe.run(
  what ? {include: what.filter(one => document.querySelector(one))} : document,
  {runOnly: rules, resultTypes: ['violations']},
).then(found => found.violations
  .filter(v => ['serious', 'critical'].includes(v.impact) || v.id.startsWith('landmark'))
  .map(v => [v.id, v.nodes.length, v.nodes[0].html.slice(0, 160)]))"""
RULES = 'wcag2a wcag2aa wcag21a wcag21aa best-practice'.split()
CHANGING = [
    '#quarto-header',
    '.notebook-links',
    '.contents-nav',
    '.measured',
    'table.cards',
    'footer',
]
WAYS = (  # each width and each colour in full; what changes with the width in the others
    (1440, 'light', None, RULES),
    (390, 'light', CHANGING, ['color-contrast']),
    (390, 'dark', None, RULES),
    (1440, 'dark', CHANGING, ['color-contrast']),
)

# axe-core takes seconds for the words of coloured code; TOKENS looks at one of each colour
PLAIN_CODE = (
    "document.querySelectorAll('main pre code').forEach(e => { e.textContent = e.textContent; })"
)
TOKENS = """() => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const over = (top, below) => {  // a colour that lets some of the one below through
    const [t, s] = [top, below].map(c => c.match(/[\\d.]+/g).map(Number)), a = t[3] ?? 1;
    return `rgb(${[0, 1, 2].map(i => a * t[i] + (1 - a) * s[i]).join(',')})`;
  };
  const seen = new Map();
  for (const e of document.querySelectorAll('main pre code span'))
    if (!seen.has(e.className)) seen.set(e.className, e);
  const page = getComputedStyle(document.body).backgroundColor;
  return [...seen].map(([name, e]) => {
    const [pre, block] = ['pre', 'div.sourceCode']
      .map(box => getComputedStyle(e.closest(box)).backgroundColor);
    const paper = over(pre, over(block, page));
    const [a, b] = [light(over(getComputedStyle(e).color, paper)), light(paper)];
    return [name, Math.max(a, b) / Math.min(a, b)];
  }).filter(([, contrast]) => contrast < 4.5);
}"""
SETTLED = 'new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))'


def seen_as(page, width, colours):
    "Show a page in a window of this width and in these colours."
    page.set_viewport_size({'width': width, 'height': 900})
    page.emulate_media(color_scheme=colours, reduced_motion='reduce')
    dark = 'document.documentElement.classList.contains("quarto-dark")'
    page.wait_for_function(f'{dark} === {str(colours == "dark").lower()}')
    page.evaluate(SETTLED)


def test_accessibility(page, address):
    "axe-core has nothing serious to say of ten pages, light and dark, on a desk and on a phone."
    axe = ROOT / 'node_modules' / 'axe-core' / 'axe.min.js'
    if not axe.exists():
        missing('axe-core is not there: run `npm i --ignore-scripts --no-package-lock`')
    for name in TEN:
        page.goto(f'{address}{name}.html', wait_until='load')
        for colours in ('light', 'dark'):
            seen_as(page, 1440, colours)
            faint = page.evaluate(TOKENS)
            assert not faint, f'{name}, {colours}: contrast of code below 4.5: {faint}'
        page.evaluate(PLAIN_CODE)
        page.evaluate(axe.read_text(encoding='utf-8'))
        for width, colours, what, rules in WAYS:
            seen_as(page, width, colours)
            found = page.evaluate(AXE, [what, rules])
            assert not found, f'{name} at {width} px, {colours}: {found}'


def test_folds_and_rows(page, address):
    "Imports and tests of messages are folded and can be opened; figures measured stand in rows."
    page.goto(address + 'attention.html', wait_until='load')
    for kind in ('Setup', 'Checks'):
        fold = page.locator('details.fold', has=page.locator(f'summary:text-is("{kind}")')).first
        assert not fold.locator('pre').first.is_visible(), f'{kind} is not folded'
        fold.locator('summary').first.press('Enter')
        assert fold.locator('pre').first.is_visible(), f'{kind} does not open'
    assert 'import math' in page.locator('details.setup').all_inner_texts()[0]
    listed = page.locator('#TOC > ul a').all_inner_texts()
    assert listed and not any(re.fullmatch(r'[a-z]+(_[a-z]+)+', text) for text in listed)
    names = page.locator('#TOC .api-names code').all_text_contents()
    assert 'scaled_dot_product_attention' in names
    rows = page.locator('ul.measured li')
    assert rows.count() > 10
    first = {part: rows.first.locator(f'.{part}').inner_text() for part in PARTS}
    assert first['claim'] == 'A1' and first['verdict'] == 'holds', first
    assert re.match(r'[\d.e−-]+', first['value']) and 'loops' in first['name'], first


PARTS = 'claim', 'name', 'value', 'verdict'


def test_printing(page, address):
    "On paper no line of code is cut off, and no fold is closed."
    page.goto(address + 'attention.html', wait_until='load')
    page.set_viewport_size({'width': 700, 'height': 900})
    page.emulate_media(media='print')
    page.evaluate('window.dispatchEvent(new Event("beforeprint"))')
    assert not page.evaluate(CLIPPED)
    assert page.locator('main details:not([open])').count() == 0
    page.evaluate('window.dispatchEvent(new Event("afterprint"))')
    assert page.locator('main details:not([open])').count() > 0
