"""How the HTML page looks: light and dark, from a phone to a wide screen, and on paper.

Blue and orange are told apart by all kinds of colour sight; a line's dashes and a panel's name say it again. The heat
maps' steps are one hue of even lightness (OKLab), each of which carries either ink or paper at a contrast of 4.5.
"""

from __future__ import annotations

LIGHT = """
color-scheme: light dark; --paper: #ffffff; --raised: #f6f8fa; --ink: #1f2328; --quiet: #59636e; --faint: #d0d7de;
--front: #0a5fb4; --other: #8c6a00; --teacher: #57606a; --alone: #b35900; --student: #0a5fb4; --compressed: #7b3fb5;
--right: #1a6e34; --wrong: #b3261e; --bar: #d6e6f7; --on4: var(--ink);
--h0: #eaf5ff; --h1: #c5dcf6; --h2: #a0c3eb; --h3: #7cabdf; --h4: #5792d3; --h5: #2d79c6; --h6: #0d61ac; --h7: #114b83;
--h8: #00356b;
""".strip()

DARK = """
--paper: #0d1117; --raised: #161b22; --ink: #e6edf3; --quiet: #9198a1; --faint: #30363d;
--front: #6cb6ff; --other: #d9b13c; --teacher: #b1bac4; --alone: #f0a04b; --student: #6cb6ff; --compressed: #c8a2f8;
--right: #5bc474; --wrong: #ff8b82; --bar: #1b3a5c; --on4: var(--paper);
--h0: #101e2a; --h1: #1b354a; --h2: #254d6c; --h3: #2f6691; --h4: #3a80b7; --h5: #459bdf; --h6: #74b6ee; --h7: #a0d2fd;
--h8: #caedff;
""".strip()

PAGE = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
h1, h2, h3 { line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h1 { font-size: clamp(1.6rem, 5vw, 2.2rem); letter-spacing: -.01em; }
h2 { font-size: 1.35rem; }
h3 { font-size: 1.15rem; }
p { margin: 0 0 .75rem; max-width: 46rem; overflow-wrap: anywhere; }
a { color: var(--front); }
.over { color: var(--quiet); font-size: .85rem; margin: 0 0 .25rem; }
.lead { font-size: 1.125rem; }
.note, figcaption { color: var(--quiet); font-size: .875rem; }
.left-out { border-left: 3px solid var(--faint); color: var(--quiet); padding-left: .75rem; }
section { margin-top: 2.5rem; }
main > section.run:first-child { margin-top: 0; }
main > section.run:not(:first-child) { border-top: 3px solid var(--faint); margin-top: 4rem; padding-top: 1.75rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: 1rem 0 0; font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.25rem, 1fr)); gap: .75rem; margin: 1.25rem
  0; }
.tile { background: var(--raised); border: 1px solid var(--faint); border-radius: 8px; padding: .75rem .9rem; }
.tile b { display: block; font-size: 1.5rem; font-weight: 650; line-height: 1.25; font-variant-numeric:
  tabular-nums; }
.tile span { color: var(--quiet); display: block; font-size: .8125rem; line-height: 1.35; }
.scroll { overflow-x: auto; margin: 0 0 1rem; max-width: 100%; }
table { border-collapse: separate; border-spacing: 0; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { caption-side: top; color: var(--ink); font-weight: 600; padding: .25rem 0 .4rem; text-align: left; }
caption span { display: inline-block; left: 0; max-width: calc(100vw - 2.5rem); position: sticky; }
th:first-child { background: var(--paper); left: 0; position: sticky; }
th, td { border-bottom: 1px solid var(--faint); padding: .35rem .75rem; text-align: right; vertical-align: baseline;
  white-space: nowrap; }
thead th { color: var(--quiet); font-weight: 600; vertical-align: bottom; white-space: normal; min-width: 4.5rem; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
tbody th { font-weight: 500; }
.names2 :is(th, td):nth-child(2), .names9 :is(th, td) { text-align: left; }
details { margin: 0 0 1rem; }
summary { color: var(--front); cursor: pointer; font-size: .9rem; width: fit-content; }
details[open] > summary { margin-bottom: .5rem; }
pre { background: var(--raised); border: 1px solid var(--faint); border-radius: 8px; font-size: .8125rem;
  line-height: 1.45; margin: 0 0 1rem; max-height: 30rem; overflow: auto; padding: .75rem; }
code { font-size: .8125rem; overflow-wrap: anywhere; white-space: normal; }
figure { margin: 1rem 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: 1rem 1.25rem;
  }
.panels > * { min-width: 0; max-width: 30rem; width: 100%; }
.panels.wide { grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.panels.wide > * { max-width: 31rem; }
.panels.four { grid-template-columns: repeat(auto-fit, minmax(min(15.5rem, 100%), 1fr)); }
.panels.four > * { max-width: 24rem; }
.keys { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin-top: .4rem; }
.key { align-items: center; display: inline-flex; gap: .4rem; white-space: nowrap; }
svg.chart.swatch { flex: none; width: 28px; }
.steps { display: flex; flex-wrap: wrap; align-items: center; gap: 0 .9rem; margin-top: .4rem; }
.steps span { align-items: center; display: inline-flex; gap: .35rem; }
.steps i { border: 1px solid var(--faint); display: inline-block; height: .9em; width: 1.4em; }
.beside { display: flex; flex-wrap: wrap; gap: 0 2.5rem; align-items: flex-start; }
.beside > * { flex: 1 1 20rem; min-width: 0; max-width: 36rem; }
section.run > h2 { font-size: clamp(1.5rem, 5vw, 1.9rem); }
.tables { display: flex; flex-wrap: wrap; gap: 0 2.5rem; align-items: flex-start; }
.group { font-weight: 600; margin: 1.1rem 0 .5rem; }
.cards + .cards { margin-top: .75rem; }
.cards + .note { margin-top: 1.25rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; }
  nav, summary { display: none; }
  figure, .card, tr { break-inside: avoid; }
  .scroll, pre { max-height: none; overflow: visible; }
  section { margin-top: 1.5rem; }
}
""".strip()

CHARTS = """
svg.chart { display: block; height: auto; width: 100%; }
svg.chart text { fill: var(--ink); font-family: inherit; }
svg.chart .tick { fill: var(--quiet); }
.grid { stroke: var(--faint); fill: none; }
.axis { stroke: var(--quiet); fill: none; }
.step { stroke: var(--front); fill: none; stroke-width: 2; }
.bar, .lead-line { stroke: var(--quiet); fill: none; }
svg .lead { stroke: var(--quiet); fill: none; stroke-dasharray: 2 3; }
.on { fill: var(--front); }
.off { fill: var(--paper); stroke: var(--other); stroke-width: 2; }
.thin, .mean, .faded { fill: none; stroke: var(--c, var(--quiet)); stroke-linejoin: round; stroke-linecap: round; }
.thin { opacity: .5; stroke-width: .8; }
.mean { stroke-width: 2.4; }
.faded { stroke: var(--quiet); opacity: .45; stroke-width: 1.2; stroke-dasharray: 3 3; }
.end { fill: var(--c); }
svg.chart text.of { fill: var(--c); font-weight: 600; }
.k-teacher { --c: var(--teacher); }
.k-alone { --c: var(--alone); }
.k-student { --c: var(--student); }
.k-compressed { --c: var(--compressed); }
.k-alone .mean, .k-alone.swatch .mean { stroke-dasharray: 7 3; }
.k-teacher .mean, .k-teacher.swatch .mean { stroke-dasharray: 1.5 4; }
.l0 { --c: var(--student); }
.l1 { --c: var(--alone); }
.l2 { --c: var(--compressed); }
.l3 { --c: var(--right); }
.l4 { --c: var(--other); }
.l5 { --c: var(--wrong); }
.l1 .mean { stroke-dasharray: 7 3; }
.l2 .mean { stroke-dasharray: 2 4; }
.l3 .mean { stroke-dasharray: 9 3 2 3; }
.l4 .mean { stroke-dasharray: 4 3; }
.few { opacity: .35; }
.ideal { stroke: var(--quiet); stroke-dasharray: 4 3; fill: none; }
.fill { fill: var(--c); opacity: .8; }
.gap { fill: none; stroke: var(--wrong); stroke-width: 1.5; stroke-dasharray: 3 2; }
.held { fill: var(--c); opacity: .45; }
.none { fill: var(--raised); }
svg.heat { shape-rendering: crispEdges; }
""".strip()

CARDS = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(16.5rem, 100%), 1fr)); gap: .75rem; }
.card { background: var(--raised); border: 1px solid var(--faint); border-radius: 8px; display: grid; gap: .25rem
  .8rem; grid-template-columns: 92px minmax(0, 1fr); margin: 0; padding: .75rem; font-size: .8125rem; line-height:
  1.35; }
.card img { border-radius: 3px; display: block; width: 92px; height: auto; background: var(--faint); }
.card img.small { image-rendering: pixelated; }
.card .what { color: var(--quiet); margin-top: .35rem; overflow-wrap: anywhere; }
.card .what b { color: var(--ink); display: block; }
.said { margin: 0; }
.said dt { color: var(--quiet); font-size: .75rem; margin-top: .3rem; }
.said dt:first-child { margin: 0; }
.said dd { display: flex; gap: .5rem; justify-content: space-between; margin: 1px 0; padding: 0 .35rem; background:
  linear-gradient(var(--bar), var(--bar)) no-repeat 0 0 / var(--share, 0) 100%; }
.said dd span:last-child { flex: none; }
.said dd span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.said .hit { font-weight: 650; }
.said .mark { color: var(--right); }
.said .mark.no { color: var(--wrong); }
""".strip()

HEAT = "\n".join(
    f".v{level} {{ fill: var(--h{level}); background: var(--h{level}); }} svg.chart .t{level} {{ fill: {ink}; }}"
    for level, ink in enumerate(["var(--ink)"] * 4 + ["var(--on4)"] + ["var(--paper)"] * 4)
)

NUM_LEVELS = 9
"""Steps of a heat map's colours."""

STYLE = "\n".join(
    [f":root {{ {LIGHT} }}", f"@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}", PAGE, CHARTS, CARDS, HEAT]
)
