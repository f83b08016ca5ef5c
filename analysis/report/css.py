"""The style sheet of the report, for screens, paper and keyboards; it loads nothing and imports nothing."""

CSS = """
:root { --ink: #1a1a1a; --soft: #595959; --line: #c9c9c9; --band: #f4f6f8; --link: #00528a; }
* { box-sizing: border-box; }
html { font-size: 100%; }
body { margin: 0; color: var(--ink); background: #fff;
  font: 1rem/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
.skip { position: absolute; left: -100rem; }
.skip:focus { left: 1rem; top: .5rem; background: #fff; padding: .4rem .8rem; z-index: 2; }
header, main, footer { max-width: 84rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 1.8rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 48rem; }
a { color: var(--link); }
:focus-visible { outline: 3px solid #d55e00; outline-offset: 2px; }
nav ul { list-style: none; padding: 0; margin: .9rem 0 0; display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; }
.scroll { overflow-x: auto; margin: .8rem 0 .4rem; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0 0 .4rem; }
thead th { border-top: 2px solid var(--ink); border-bottom: 1px solid var(--ink); vertical-align: bottom; }
tbody tr:last-child > * { border-bottom: 2px solid var(--ink); }
th, td { padding: .28rem .45rem; text-align: left; vertical-align: top; }
th:first-child { padding-left: .2rem; }
thead th.num { white-space: normal; }
tbody th { font-weight: 600; }
.num { text-align: right; white-space: nowrap; }
#problems td:last-child { white-space: normal; }
main:focus { outline: none; }
tr.floor > * { background: var(--band); font-weight: 400; font-style: italic; }
tr.run + tr.floor > * { border-top: 1px solid var(--ink); }
tr.published-first > * { border-top: 1px solid var(--line); }
.missing { color: var(--soft); }
.notes { margin: .2rem 0 1rem; padding-left: 1.1rem; font-size: .85rem; color: var(--soft); max-width: 60rem; }
div.published table { color: #333; }
.measured caption::before, .published caption::before, .modelled caption::before, .joined caption::before {
  font-size: .7rem; letter-spacing: .06em; font-weight: 700;
  border: 1.5px solid var(--ink); border-radius: 2px; padding: .05rem .35rem; margin-right: .6rem; }
div.published caption::before { content: "PUBLISHED"; }
div.modelled caption::before { content: "MODELLED"; border-style: dashed; }
div.joined caption::before { content: "JOINED"; }
.joined tr.modelled > *, .joined tr.modelled-first > * { color: var(--soft); font-weight: 400; }
.joined tr.modelled-first > * { border-top: 1px dashed var(--soft); }
.joined tr.measured > *, .joined tr.measured-first > * { background: var(--band); font-weight: 600; }
.joined tr.published > *, .joined tr.published-first > * { font-style: italic; font-weight: 400; }
.joined tr.measured-first > * { border-top: 1px solid var(--ink); }
div.modelled { border-left: 4px dashed var(--soft); padding-left: 1rem; }
.measured caption::before { content: "MEASURED"; color: #fff; background: var(--ink); }
div.published { border-left: 4px double var(--soft); padding-left: 1rem; }
figure { margin: 1.6rem 0; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { font-size: .875rem; color: var(--soft); max-width: 52rem; margin-top: .4rem; }
figcaption strong { color: var(--ink); }
.pair { columns: 2 26rem; column-gap: 3rem; }
.pair figure { break-inside: avoid; margin: 0 0 1.8rem; }
.key { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem 1.5rem;
  margin: 1.2rem 0; }
.key div { border-top: 2px solid var(--ink); padding-top: .3rem; }
.key dt { font-size: .8rem; color: var(--soft); }
.key dd { margin: 0; font-size: 1.25rem; font-weight: 600; overflow-wrap: anywhere; }
details { margin: .3rem 0; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
details dl { columns: 2 26rem; column-gap: 3rem; font-size: .82rem; margin: .4rem 0 1.2rem 1rem; }
details dl div { break-inside: avoid; display: grid; grid-template-columns: 9.5rem 1fr; gap: 0 .8rem; }
details dt { color: var(--soft); }
details dd { margin: 0; overflow-wrap: anywhere; }
code { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: .9em; }
footer { margin-top: 3rem; padding-bottom: 2rem; color: var(--soft); font-size: .85rem; }
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  html { font-size: 78%; }
  header, main, footer { max-width: none; padding: 0; }
  nav, .skip { display: none; }
  .scroll { overflow: visible; }
  table { font-size: 7.6pt; }
  details:not(:has(table)) { break-inside: avoid; }
  details::details-content { content-visibility: visible; display: block; }
  th, td { padding: .15rem .35rem; }
  figure, tr { break-inside: avoid; }
  h2, h3, caption, summary { break-after: avoid; }
  .measured caption::before, tr.floor > * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  figure img { max-height: 165mm; }
}
@media (max-width: 40rem) {
  header, main, footer { padding-left: 1rem; padding-right: 1rem; }
  details dl div { grid-template-columns: 1fr; }
}
"""
