"""The frame of the page: how it looks, and the few lines that move its sliders."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1200px; margin: 2em auto;
  padding: 0 1.2em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.25em; margin: 2em 0 .3em; } h3 { font-size: 1em; margin: 1.2em 0 .2em; }
.facts { color: #555; font-size: .85em; padding-left: 1.2em; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9em; margin: .8em 0; }
th, td { padding: .25em .7em; text-align: left; white-space: nowrap; }
th { border-bottom: 2px solid #444; font-weight: 600; }
tr.first td { border-top: 1px solid #ccc; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.published { color: #666; font-style: italic; }
.note { color: #666; font-size: .85em; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: .6em;
  margin: 1.4em 0; }
.plots figure { margin: 0; } .plots svg { width: 100%; height: auto; }
details { margin: .6em 0; } summary { cursor: pointer; font-weight: 600; }
.sliders { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 1em; margin: .8em 0; }
.slider { margin: 0; } figcaption { font-size: .85em; color: #555; }
.stack { position: relative; --at: 50%; line-height: 0; }
.stack img { width: 100%; display: block; image-rendering: auto; }
.stack .after, .stack .clean { position: absolute; inset: 0; height: 100%; }
.stack .after { clip-path: inset(0 0 0 var(--at)); }
.stack .clean { visibility: hidden; }
.stack.original .clean { visibility: visible; }
.stack::after { content: ""; position: absolute; top: 0; bottom: 0; left: var(--at); width: 2px; margin-left: -1px;
  background: #fff; box-shadow: 0 0 3px #000; pointer-events: none; }
.stack.original::after { display: none; }
.stack input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize; }
.stack input:focus-visible { outline: 3px solid #06c; opacity: .15; }
.stack button { position: absolute; right: .5em; bottom: .5em; z-index: 1; font: 13px system-ui, sans-serif;
  padding: .3em .7em; border: 0; border-radius: 4px; background: #000a; color: #fff; cursor: pointer; }
</style>
</head>
<body>
<h1>$title</h1>
<ul class="facts">$facts</ul>
$body
<script>
for (const stack of document.querySelectorAll(".stack")) {
  const range = stack.querySelector("input");
  range.addEventListener("input", () => stack.style.setProperty("--at", range.value + "%"));
  const button = stack.querySelector("button");
  if (!button) continue;
  const show = (on) => stack.classList.toggle("original", on);
  for (const name of ["pointerdown", "keydown"]) button.addEventListener(name, () => show(true));
  for (const name of ["pointerup", "pointerleave", "keyup", "blur"]) button.addEventListener(name, () => show(false));
}
</script>
</body>
</html>
"""
"""A `string.Template`: `title`, `facts` (list items) and `body`, all HTML already."""
