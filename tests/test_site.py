"The site is built from the committed notebooks and read in a real browser, from the loopback interface only."

import functools, http.server, json, re, subprocess, sys, threading
import pytest
from conftest import ROOT, missing, notebook_paths

if sys.version_info < (3, 11):
    pytest.skip(
        'building the site needs Python 3.11 or later (smalldocs does)', allow_module_level=True
    )


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The built site's folder; the build itself fails on broken links and on anything loaded from elsewhere."
    if not (ROOT / 'node_modules' / 'katex').exists():
        missing('KaTeX is not there: run `npm i --ignore-scripts --no-package-lock`')
    out = tmp_path_factory.mktemp('site') / '_docs'
    done = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'build_docs.py', '--out', out],
        capture_output=True,
        text=True,
        timeout=300,
    )
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

    server = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), functools.partial(Quiet, directory=str(site))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


@pytest.fixture
def page(browser, address, request):
    "A page of the browser that notes errors and requests to elsewhere; the test's marker may set width and colours."
    options = {
        'viewport': {'width': 1280, 'height': 900},
        'color_scheme': 'light',
        **getattr(request, 'param', {}),
    }
    context = browser.new_context(**options)
    page = context.new_page()
    page.problems = []
    page.on(
        'console',
        lambda m: page.problems.append(f'console: {m.text}') if m.type == 'error' else None,
    )
    page.on('pageerror', lambda e: page.problems.append(f'error: {e}'))
    page.on(
        'requestfailed',
        lambda r: (
            page.problems.append(f'failed: {r.url}') if 'ERR_ABORTED' not in r.failure else None
        ),
    )  # aborted: the test went on
    page.on(
        'response',
        lambda r: page.problems.append(f'{r.status}: {r.url}') if r.status >= 400 else None,
    )
    page.on(
        'request',
        lambda r: (
            page.problems.append(f'elsewhere: {r.url}')
            if not r.url.startswith((address, 'data:'))
            else None
        ),
    )
    yield page
    context.close()


# elements that stick out of the window to the right and that no box of their own scrolls; the page's own frame clips them
STICKING_OUT = """[...document.querySelectorAll('main *')].filter(e => {
  const r = e.getBoundingClientRect();
  if (!r.width || !r.height || r.right <= innerWidth + 1) return false;
  for (let p = e; p && p.tagName !== 'MAIN'; p = p.parentElement) if (getComputedStyle(p).overflowX !== 'visible' && p.getBoundingClientRect().right <= innerWidth + 1) return false;
  return true;
}).map(e => e.outerHTML.slice(0, 120))"""


def luminance(color):
    "0 (black) to 255 (white) of a CSS rgb() colour."
    r, g, b = map(float, re.findall(r'[\d.]+', color)[:3])
    return 0.299 * r + 0.587 * g + 0.114 * b


def background(page, selector):
    return page.eval_on_selector(selector, 'e => getComputedStyle(e).backgroundColor')


def test_one_page_for_each_notebook(pages):
    assert len(pages) == len(notebook_paths())


def test_every_page_loads(page, address, pages, site):
    "No error, nothing from elsewhere, the maths rendered, no page wider than its window."
    for name in pages:
        page.goto(address + name, wait_until='networkidle')
        assert page.locator('main h1').count() == 1, f'{name} has no title'
        text = (site / name).read_text(encoding='utf-8')
        if 'katex.min.js' in text:
            assert page.locator('.katex').count() > 0, f'{name}: maths is not rendered'
            assert page.locator('.katex-error').count() == 0, (
                f'{name}: {page.locator(".katex-error").first.get_attribute("title")}'
            )
        assert page.evaluate('document.documentElement.scrollWidth - innerWidth') <= 0, (
            f'{name} is wider than its window'
        )
        assert not page.evaluate(STICKING_OUT), (
            f'{name}: sticks out of its window: {page.evaluate(STICKING_OUT)}'
        )
        assert page.evaluate('[...document.images].every(i => i.complete && i.naturalWidth > 0)'), (
            f'{name}: a picture did not load'
        )
        assert page.evaluate('[...document.images].every(i => i.closest("nav") || i.alt)'), (
            f'{name}: a picture has no description'
        )
        assert not page.problems, f'{name}: {page.problems}'


@pytest.mark.parametrize('page', [{'viewport': {'width': 390, 'height': 844}}], indirect=True)
def test_on_a_phone(page, address, pages):
    "At 390 px nothing sticks out, and the chapters can be opened."
    for name in pages:
        page.goto(address + name, wait_until='load')
        assert page.evaluate('document.documentElement.scrollWidth') <= 390, (
            f'{name} is wider than a phone'
        )
        assert not page.evaluate(STICKING_OUT), (
            f'{name}: sticks out of a phone: {page.evaluate(STICKING_OUT)}'
        )
    page.goto(address + 'index.html', wait_until='load')
    page.locator('.quarto-btn-toggle').first.click()
    page.wait_for_selector('#quarto-sidebar.show')
    page.locator('#quarto-sidebar a', has_text='00 ').first.click()
    page.wait_for_url(re.compile(r'/data\.html'))
    assert not page.problems


def test_search(page, address):
    "A word of the text is found, and its result leads to a page."
    page.goto(address + 'index.html', wait_until='load')
    words = json.dumps(page.request.get(address + 'search.json').json()).lower()
    word = 'rotary' if 'rotary' in words else 'bigram'
    page.locator('#quarto-search input').fill(word)
    page.wait_for_selector('.search-result')
    shown = page.locator('.search-result').all_inner_texts()
    assert any(word in text.lower() for text in shown)
    page.locator('.search-result').first.click()
    page.wait_for_load_state('load')
    assert page.locator('main h1').count() == 1
    page.locator('#quarto-search input').fill('zzqqxxzzqq')
    page.wait_for_selector('.search-none')
    assert not page.problems


def test_light_and_dark(page, address, pages, site):
    "The toggle darkens page, sidebar and code; figures keep a light card; the choice is remembered on the next page."
    figures = next(
        (n for n in pages if 'src="data:image/png' in (site / n).read_text(encoding='utf-8')), None
    )
    name = figures or 'index.html'
    page.goto(address + name, wait_until='load')
    assert luminance(background(page, 'body')) > 200
    page.locator('.quarto-color-scheme-toggle').first.click()
    page.wait_for_function('document.documentElement.classList.contains("quarto-dark")')
    assert luminance(background(page, 'body')) < 80
    side = background(page, '#quarto-sidebar')
    assert side == 'rgba(0, 0, 0, 0)' or luminance(side) < 80, (
        'the sidebar stays light in dark mode'
    )
    assert (
        luminance(
            page.eval_on_selector('#quarto-sidebar .sidebar-link', 'e => getComputedStyle(e).color')
        )
        > 150
    )
    if figures:
        card = '.cell-output-display img'
        assert luminance(background(page, card)) > 230, 'a figure has no light card to be read on'
        assert page.locator(card).first.is_visible()
    page.goto(address + 'index.html', wait_until='load')
    assert luminance(background(page, 'body')) < 80, 'the choice is forgotten'
    assert not page.problems


def test_copy_button(browser, address):
    "Each block of code has a button that puts its text on the clipboard."
    context = browser.new_context()
    context.grant_permissions(['clipboard-read', 'clipboard-write'], origin=address.rstrip('/'))
    page = context.new_page()
    page.goto(address + 'data.html', wait_until='load')
    block = page.locator(':has(> .code-copy-button)').first
    block.hover()
    block.locator('.code-copy-button').click()
    page.wait_for_selector('.code-copy-button-checked')
    copied = page.evaluate('navigator.clipboard.readText()')
    assert copied.strip() == block.locator('pre code').inner_text().strip()
    context.close()


def test_api_entries_and_navigation(page, address):
    "An exported name has an anchor, its source and a link to the file; the page leads to its neighbours."
    page.goto(address + 'attention.html#scaled_dot_product_attention', wait_until='load')
    assert page.locator('#scaled_dot_product_attention').is_visible()
    assert (
        page.locator('main a', has_text='source')
        .first.get_attribute('href')
        .endswith(tuple('0123456789'))
    )
    assert 'def scaled_dot_product_attention(' in page.locator('main').inner_text()
    page.locator('.page-navigation .nav-page-next a').click()
    page.wait_for_load_state('load')
    assert (
        'attention' in page.locator('main h1').inner_text().lower()
        or page.url != address + 'attention.html'
    )
    assert page.locator('footer').filter(has_text='Apache').count() == 1
    assert not page.problems
