"""Style sheet of the report: system fonts, light and dark, wide tables scroll, prints well."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfaf7; --panel: #ffffff; --ink: #1d2226; --muted: #667078; --line: #e3e0d8; --warn: #8a5a00;
  --c0: #5f6b76; --c1: #d55e00; --c2: #0072b2; --c3: #8c4bb5; --c4: #009e73; --c5: #b8860b; --c6: #c2447c;
  --c7: #3f8f9f; --good: #2a9d6f; --bad: #d1495b; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --panel: #1c2125; --ink: #e6e8e6; --muted: #97a1a8; --line: #30373d; --warn: #e0b052;
  --c0: #a3adb6; --c1: #f28e4b; --c2: #5ab4ee; --c3: #c08ae0; --c4: #45c79b; --c5: #e0b83f; --c6: #e985b2;
  --c7: #78c4d2; --good: #3fb886; --bad: #ec7384; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif }
main { max-width: 1020px; margin: 0 auto; padding: 40px 22px 80px }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.01em; margin: 0 0 4px }
header p { color: var(--muted); margin: 0 0 22px }
h2 { font-size: 20px; margin: 44px 0 12px; padding-top: 14px; border-top: 1px solid var(--line) }
.verdict { border-left: 5px solid var(--c2); padding: 2px 0 2px 18px }
.verdict.good { border-color: var(--c4) } .verdict.bad { border-color: var(--c1) }
.verdict.open { border-color: var(--c5) }
.verdict p { margin: 0 0 6px; color: var(--muted); font-size: 15px }
.verdict p:first-child { font-size: 20px; line-height: 1.4; color: var(--ink); font-weight: 600 }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: 12px;
  margin: 24px 0 18px }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px;
  display: flex; flex-direction: column }
.card b { font-size: 27px; line-height: 1.2; font-variant-numeric: tabular-nums }
.card span { font-size: 14px } .card small { color: var(--muted); min-height: 1.5em }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 14px }
a { color: var(--c2); text-decoration: none } a:hover { text-decoration: underline }
.scroll { overflow-x: auto; margin: 14px 0; background: var(--panel); border: 1px solid var(--line);
  border-radius: 10px }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums }
caption { caption-side: top; text-align: left; color: var(--muted); padding: 10px 14px 4px;
  font-size: 13px } caption span { display: block; max-width: calc(100vw - 56px) }
th, td { padding: 7px 14px; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top }
tbody tr:last-child > * { border-bottom: 0 }
th:first-child { text-align: left } tbody th { font-weight: 500; white-space: nowrap }
thead th { color: var(--muted); font-weight: 500; vertical-align: bottom }
thead th:nth-child(2):last-child { text-align: left }
td:only-of-type { text-align: left; overflow-wrap: anywhere }
td small, tbody th small { display: block; font-weight: 400; color: var(--muted); font-size: 12px;
  white-space: nowrap }
.heat { background-color: color-mix(in srgb, var(--good) calc(var(--heat) * .58), transparent) }
.heat.worse { background-color: color-mix(in srgb, var(--bad) calc(var(--heat) * .55), transparent) }
.moot { background-image: repeating-linear-gradient(135deg, transparent 0 5px,
  color-mix(in srgb, var(--muted) 22%, transparent) 5px 6px) }
.grid table { table-layout: fixed } .grid td, .grid thead th:not(:first-child) { text-align: center }
.grid td { border: 2px solid var(--panel); padding: 7px 4px } .grid th:first-child { width: 158px }
.grid.half th:first-child { width: 140px } .grid.half { font-size: 13px }
.many table { font-size: 13px } .many th, .many td { padding: 6px 7px }
.many td small, .many tbody th small { font-size: 11px }
.many tbody th, .many tbody th small { white-space: normal }
section > p { margin: 5px 0 } section > .intro { color: var(--muted); margin: 0 0 6px; max-width: 78ch }
h3 { font-size: 16px; margin: 22px 0 2px }
.flip { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 10px 14px;
  margin: 10px 0; break-inside: avoid } .flip p { margin: 0 0 8px; overflow-wrap: anywhere }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 12px }
.sides div { border-left: 3px solid var(--bad); padding-left: 10px; min-width: 0 }
.sides .right { border-color: var(--good) } .sides b { font-weight: 600 } .sides i { float: right }
.sides q { display: block; overflow-wrap: anywhere; white-space: pre-wrap; quotes: none;
  font-family: ui-monospace, monospace; font-size: 13px; margin: 4px 0 }
.sides small { color: var(--muted) }
figure { margin: 14px 0; background: var(--panel); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px 18px 12px }
section { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); column-gap: 14px }
section > * { grid-column: 1 / -1; min-width: 0 } section > .half { grid-column: auto; margin: 7px 0 }
.half svg { font-size: 16px }
figcaption { color: var(--muted); font-size: 13px; margin-top: 6px }
svg { display: block; width: 100%; max-width: 780px; height: auto; margin: 0 auto; font-size: 11px }
svg polyline { stroke-width: 2; stroke-linejoin: round }
svg text { fill: var(--muted) } svg .row { fill: var(--ink) }
svg .band { opacity: .16 } svg .grid { stroke: var(--line) } svg .zero { stroke: var(--ink) }
svg .mark { stroke: var(--muted); stroke-dasharray: 2 3 }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; justify-content: center; font-size: 13px }
.legend i { display: inline-block; width: 14px; height: 3px; margin-right: 6px; vertical-align: middle }
.warn { color: var(--warn); font-size: 14px }
details { margin: 12px 0; font-size: 14px } summary { cursor: pointer; color: var(--c2) }
pre { overflow-x: auto; white-space: pre-wrap; background: var(--panel); border: 1px solid var(--line);
  border-radius: 10px; padding: 12px 14px; font-size: 12.5px; line-height: 1.5 }
@media print { :root { color-scheme: light } body { font-size: 11px; background: #fff }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  .moot { background-image: none } nav { display: none } h2, h3, .intro { break-after: avoid }
  .scroll, figure, .card { break-inside: avoid }
  main { max-width: none; padding: 0 } .scroll { overflow: visible } caption span { max-width: none }
  section { display: block } section > .half { display: inline-block; width: 49%; vertical-align: top }
  table, .grid.half { font-size: 10px } th, td { padding: 3px 6px } caption { font-size: 10px }
  .many table { font-size: 9px } .many th, .many td { padding: 3px 4px }
  td small, tbody th small { font-size: 9px } tbody th, td small { white-space: normal }
  .many td small, .many tbody th small { font-size: 8px }
  .verdict p, figcaption, .legend, .warn, details { font-size: 10px }
  .verdict p:first-child { font-size: 15px } .card b { font-size: 19px } .card span { font-size: 11px }
  .card small { font-size: 10px } h1 { font-size: 22px } h2 { font-size: 16px; margin-top: 22px }
  h3 { font-size: 13px } .grid th:first-child, .grid.half th:first-child { width: 104px }
  .sides q { font-size: 10px } }
@media (max-width: 700px) { section { grid-template-columns: minmax(0, 1fr) }
  main { padding: 24px 12px } th, td { padding: 6px 8px } h1 { font-size: 24px }
  .grid table { table-layout: auto } .verdict p:first-child { font-size: 17px }
  figure { padding: 10px 8px } svg { font-size: 15px }
  tbody th { white-space: normal; min-width: 112px } .sides { grid-template-columns: 1fr } }
"""
