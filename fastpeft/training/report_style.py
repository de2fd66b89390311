"""The report's style sheet: one page, light and dark, from a phone to a wide screen and to paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #f7f6f3; --surface: #ffffff; --ink: #1b212c; --muted: #667080; --line: #e5e2db; --soft: #f1efea;
  --after: #0e7c6b; --after-soft: 14 124 107; --before: #9aa1ac; --second: #c8701a; --bad: #b8433a;
  --bad-soft: 184 67 58;
  --v0: #0e7c6b; --v1: #c8701a; --v2: #3b6fb6; --v3: #a3478f; --v4: #7a8b1f; --v5: #b8433a; --v6: #5b5f97; --v7: #3f95a5;
  --sans: ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, "SF Mono", Menlo, Consolas, "Liberation Mono", "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0f1217; --surface: #171b22; --ink: #e7eaee; --muted: #929cab; --line: #272d37; --soft: #1e242d;
    --after: #4cc9b0; --after-soft: 76 201 176; --before: #7d8795; --second: #e5a057; --bad: #ee8078;
    --bad-soft: 238 128 120;
    --v0: #4cc9b0; --v1: #e5a057; --v2: #7aaaf0; --v3: #d987c6; --v4: #b5c65a; --v5: #ee8078; --v6: #a3a8e6; --v7: #7fcbd8;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans);
  font-variant-numeric: tabular-nums; -webkit-font-smoothing: antialiased;
}
main { max-width: 1080px; margin: 0 auto; padding: 56px 28px 72px; }
header { margin-bottom: 36px; }
.eyebrow { margin: 0 0 10px; color: var(--after); font-size: 13px; font-weight: 600; letter-spacing: .08em;
  text-transform: uppercase; }
h1 { margin: 0 0 8px; font-size: clamp(28px, 5vw, 42px); line-height: 1.12; letter-spacing: -.022em;
  font-weight: 700; text-wrap: balance; }
h2 { margin: 52px 0 16px; font-size: 21px; letter-spacing: -.012em; }
h3 { margin: 0 0 12px; font-size: 15px; }
p { margin: 0 0 12px; }
.subtitle, .note { color: var(--muted); }
.note { font-size: 14px; max-width: 76ch; margin-top: 14px; }
.grid { display: grid; gap: 18px; grid-template-columns: repeat(2, minmax(0, 1fr)); }
.stack { display: grid; gap: 18px; align-content: start; min-width: 0; }
.cards { display: grid; gap: 18px; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); }
.card, figure, .facts { background: var(--surface); border: 1px solid var(--line); border-radius: 14px; }
.card { padding: 22px 24px; min-width: 0; }
.metric .name { color: var(--muted); font-size: 14px; font-weight: 600; }
.metric .values { display: flex; align-items: baseline; gap: 10px; margin: 8px 0 8px; white-space: nowrap; }
.metric .old { color: var(--muted); font-size: 20px; }
.metric .arrow { color: var(--before); font-size: 20px; }
.metric .new { color: var(--after); font-size: 42px; line-height: 1; font-weight: 700; letter-spacing: -.03em; }
.metric .delta { font-size: 14px; color: var(--muted); }
.metric .delta b { color: var(--ink); font-weight: 600; }
.metric.worse .new, .metric.worse .delta b { color: var(--bad); }
.facts { display: grid; grid-template-columns: repeat(4, 1fr); margin: 18px 0 0; }
.facts div { padding: 18px 24px; border-left: 1px solid var(--line); }
.facts div:first-child { border-left: 0; }
.facts dt { color: var(--muted); font-size: 13px; }
.facts dd { margin: 2px 0 0; font-size: 19px; font-weight: 600; letter-spacing: -.01em; }
.facts small { display: block; color: var(--muted); font-size: 13px; font-weight: 400; letter-spacing: 0; }
figure { margin: 0; padding: 18px 20px 10px; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 2px 18px; font-size: 14px;
  margin-bottom: 10px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; color: var(--muted); }
.key::before { content: ""; display: inline-block; width: 16px; height: 3px; border-radius: 2px; margin-right: 7px;
  vertical-align: middle; background: currentColor; }
.key.after::before { background: var(--after); } .key.before::before { background: var(--before); }
.key.second::before { background: var(--second); }
.v0 { --mine: var(--v0); } .v1 { --mine: var(--v1); } .v2 { --mine: var(--v2); } .v3 { --mine: var(--v3); } .v4 {
--mine: var(--v4); } .v5 { --mine: var(--v5); } .v6 { --mine: var(--v6); } .v7 { --mine: var(--v7); }
.key.series::before { background: var(--mine); }
svg .curve.series { stroke: var(--mine); } svg .dots.series { fill: var(--mine); }
svg .bar { fill: var(--after); } svg .bar.series { fill: var(--mine); }
svg text.label { fill: var(--ink); }
.compare small { display: block; color: var(--muted); font-size: 12px; white-space: nowrap; }
.compare .first > * { font-weight: 600; } .compare .first small { font-weight: 400; }
.compare .sure { color: var(--after); font-weight: 600; }
.table.compare tbody th[scope=row] { min-width: 130px; white-space: normal; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--muted); font: 12px var(--sans); font-variant-numeric: tabular-nums; }
svg .rule { stroke: var(--line); fill: none; } svg .axis { stroke: var(--before); fill: none; }
svg .chance { stroke: var(--before); stroke-dasharray: 3 5; fill: none; }
svg .area { fill: rgb(var(--after-soft) / .09); }
svg .curve { fill: none; stroke-width: 2.4; stroke-linejoin: round; stroke-linecap: round; }
svg .curve.faint { stroke-width: 1.1; opacity: .38; }
svg .curve.after { stroke: var(--after); } svg .curve.before { stroke: var(--before);
  } svg .curve.second { stroke: var(--second); }
svg .dots { stroke: var(--surface); stroke-width: 2; }
svg .dots.after { fill: var(--after); } svg .dots.before { fill: var(--before);
  } svg .dots.second { fill: var(--second); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
.confusion { table-layout: fixed; border-collapse: separate; border-spacing: 5px; }
.confusion th { font-weight: 500; color: var(--ink); text-align: center; overflow-wrap: anywhere; }
.confusion th[scope=row] { text-align: right; padding-right: 8px; }
.confusion .axis { color: var(--muted); font-size: 13px; }
.confusion td[class] { text-align: center; border-radius: 10px; padding: 34px 6px; }
.small .confusion td[class] { padding: 14px 6px; } .small .confusion b { font-size: 19px; }
.confusion .hit { background: rgb(var(--after-soft) / calc(.06 + .4 * var(--share))); }
.confusion .miss { background: rgb(var(--bad-soft) / calc(.05 + .5 * var(--share))); }
.confusion b { display: block; font-size: 24px; letter-spacing: -.02em; line-height: 1.2; }
.confusion span { font-size: 13px; opacity: .75; }
.parameters .bar { display: flex; height: 18px; border-radius: 6px; overflow: hidden; background: var(--soft);
  margin: 6px 0 14px; }
.parameters .bar i { background: var(--after); min-width: 4px; }
.parameters .legend { font-size: 14px; }
.examples { display: grid; gap: 12px; }
.example { display: grid; grid-template-columns: 30px minmax(0, 1fr); gap: 4px 14px; padding: 16px 20px; }
.mark { width: 26px; height: 26px; border-radius: 50%; display: grid; place-items: center; font-size: 14px;
  font-weight: 700; }
.right .mark { color: var(--after); background: rgb(var(--after-soft) / .14); }
.wrong .mark { color: var(--bad); background: rgb(var(--bad-soft) / .14); }
.example p { margin: 0; overflow-wrap: anywhere; }
.example .verdict { grid-column: 2; font-size: 14px; color: var(--muted); }
.example .verdict b { color: var(--ink); font-weight: 600; } .wrong .verdict b { color: var(--bad); }
.completion { padding: 18px 22px; }
.completion dl { display: grid; grid-template-columns: 92px minmax(0, 1fr); gap: 8px 16px; margin: 14px 0 0;
  font-size: 15px; }
.completion dt { color: var(--muted); font-size: 13px; padding-top: 2px; }
.completion dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.completion .is-before { color: var(--muted); } .completion .is-after { color: var(--after); font-weight: 600; }
pre { font-family: var(--mono); font-size: 12px; }
pre { margin: 0; padding: 14px 16px; border-radius: 10px; background: var(--soft); overflow-x: auto; line-height: 1.6; }
.completion pre { font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere; }
.table th { text-align: left; font-weight: 500; color: var(--muted); padding: 7px 14px 7px 0;
  border-bottom: 1px solid var(--line); vertical-align: top; }
.table td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere;
  vertical-align: top; }
.table tr:last-child > * { border-bottom: 0; }
.table.numbers td { text-align: right; white-space: nowrap; } .table.numbers thead th { text-align: right; }
.table.numbers thead th:first-child { text-align: left; }
.table tbody th[scope=row] { width: 42%; }
.table.numbers tbody th { color: var(--ink); width: auto; }
footer { margin-top: 56px; color: var(--muted); font-size: 13px; }
@media (max-width: 760px) {
  main { padding: 32px 16px 48px; }
  .grid { grid-template-columns: minmax(0, 1fr); }
  .facts { grid-template-columns: repeat(2, 1fr); }
  .facts div:nth-child(odd) { border-left: 0; } .facts div:nth-child(n+3) { border-top: 1px solid var(--line); }
  .completion dl { grid-template-columns: minmax(0, 1fr); gap: 2px; } .completion dd { margin-bottom: 8px; }
}
@media print { body { background: #fff; } main { max-width: none; padding: 0; }
.card, figure, .facts { break-inside: avoid; } }
"""
