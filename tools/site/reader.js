// What a page does for its reader beyond smalldocs' own script: boxes that scroll sideways say so and
// can be reached by keyboard, sections of the sidebar open by keyboard, wide tables of words become
// cards on a phone, and a printed page has all its folds open. Without it everything can still be read.
(() => {
  'use strict';
  const all = (what, root = document) => [...root.querySelectorAll(what)];

  // ---- boxes wider than their place: a fade at the side that has more, and a place in the tab order
  const BOXES = 'main pre, main .sd-table, main .cell-output-display, main .katex-display, main blockquote';
  const mark = (box) => {
    const more = box.scrollWidth - box.clientWidth;
    const wide = more > 0 && getComputedStyle(box).overflowX !== 'visible';
    box.classList.toggle('scrolls', wide);
    box.classList.toggle('more-left', wide && box.scrollLeft > 2);
    box.classList.toggle('more-right', wide && box.scrollLeft < more - 2);
    const tall = box.scrollHeight - box.clientHeight > 0 && getComputedStyle(box).overflowY === 'auto';
    if (wide || tall) {
      box.tabIndex = 0;
      box.setAttribute('role', 'group');
      box.setAttribute('aria-label', 'scrolls');
    } else if (box.getAttribute('aria-label') === 'scrolls') {
      ['tabindex', 'role', 'aria-label'].forEach((name) => box.removeAttribute(name));
    }
  };
  const boxes = all(BOXES);
  const markAll = () => boxes.forEach(mark);
  boxes.forEach((box) => box.addEventListener('scroll', () => mark(box), { passive: true }));
  document.addEventListener('toggle', (event) => all(BOXES, event.target).forEach(mark), true);
  window.addEventListener('resize', markAll);
  window.addEventListener('load', markAll);

  // ---- the sidebar's sections, and other things that act as buttons, by keyboard
  document.addEventListener('keydown', (event) => {
    const button = event.target.closest('a[role="button"]:not([href])');
    if (!button || !['Enter', ' '].includes(event.key)) return;
    event.preventDefault();
    button.click();
  });

  // ---- the sidebar of a narrow window says whether it is open, and Escape closes it
  const side = document.getElementById('quarto-sidebar');
  const opener = document.querySelector('.quarto-btn-toggle');
  if (side && opener) {
    const tell = () => opener.setAttribute('aria-expanded', side.classList.contains('show'));
    new MutationObserver(tell).observe(side, { attributeFilter: ['class'] });
    tell();
    document.addEventListener('keydown', (event) => {
      if (event.key === 'Escape' && side.classList.contains('show')) opener.click();
    });
    const here = side.querySelector('.sidebar-link.active');
    if (here) side.scrollTop = Math.max(0, here.offsetTop - side.clientHeight / 3);
  }

  // ---- tables of words: each cell knows its column's name, for the cards of a phone
  all('main table').forEach((table) => {
    const names = all('thead th', table).map((cell) => cell.textContent.trim());
    const rows = all('tbody tr', table);
    const long = rows.some((row) => [...row.cells].some((cell) => cell.textContent.length > 40));
    if (names.length < 3 || !long || rows.some((row) => row.cells.length !== names.length)) return;
    table.classList.add('cards');
    table.setAttribute('role', 'table');
    rows.forEach((row) => {
      row.setAttribute('role', 'row');
      [...row.cells].forEach((cell, i) => {
        cell.setAttribute('role', 'cell');
        cell.dataset.column = names[i];
      });
    });
  });

  // ---- on paper nothing is folded
  let closed = [];
  window.addEventListener('beforeprint', () => {
    closed = all('main details:not([open])');
    closed.forEach((fold) => { fold.open = true; });
  });
  window.addEventListener('afterprint', () => closed.forEach((fold) => { fold.open = false; }));

  // ---- a link into a fold opens it
  const open = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let at = target; at; at = at.parentElement) if (at.tagName === 'DETAILS') at.open = true;
    if (target) target.scrollIntoView();
  };
  window.addEventListener('hashchange', open);
  if (location.hash) open();
  markAll();
})();
