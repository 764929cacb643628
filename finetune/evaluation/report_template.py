"""The page of a comparison as a template. All values come in escaped; no script, no file and no font from elsewhere."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Evaluation of {{ result.base }}</title>
<style>
:root { --ink:#1c1c1a; --faint:#6d6a62; --line:#e4e0d6; --paper:#fbfaf7; --card:#fff; --good:#1d7a4f; --bad:#b23a2b }
* { box-sizing:border-box } body { margin:0; background:var(--paper); color:var(--ink); font:15px/1.5 system-ui,-apple-system,"Segoe UI","Noto Sans","Noto Sans CJK SC",sans-serif }
main { max-width:1120px; margin:0 auto; padding:40px 24px 80px } h1 { font-size:28px; margin:0 0 4px } h2 { font-size:19px; margin:44px 0 12px }
p { margin:6px 0 } .faint { color:var(--faint) } bdi { overflow-wrap:anywhere }
table { border-collapse:collapse; width:100%; background:var(--card); border:1px solid var(--line) } th,td { padding:7px 10px; text-align:left; border-bottom:1px solid var(--line); vertical-align:top }
th { font-weight:600; font-size:13px; color:var(--faint) } td.n { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap }
.better { color:var(--good); font-weight:600 } .worse { color:var(--bad); font-weight:600 } .unclear { color:var(--faint) }
.chart { display:grid; grid-template-columns:200px 1fr; gap:0 16px; background:var(--card); border:1px solid var(--line); padding:14px 16px; margin:10px 0; overflow-x:auto }
.chart h3 { grid-column:1/3; font-size:15px; margin:0 0 4px } .chart p { grid-column:1/3; margin:0 0 8px; font-size:13px } .names div { height:34px; line-height:34px; overflow:hidden; text-overflow:ellipsis; white-space:nowrap }
.sheet { overflow-x:auto } .sheet table { width:auto } .sheet td { border:0; padding:3px; font-size:12px; max-width:220px } .sheet th { border:0; padding:3px 8px }
img { display:block; image-rendering:auto; max-width:256px } .small img { image-rendering:pixelated }
.pairs { display:flex; flex-wrap:wrap; gap:16px } .pair { background:var(--card); border:1px solid var(--line); padding:10px; font-size:12px; max-width:420px } .pair div { display:flex; gap:6px }
</style></head><body><main>
<h1>Evaluation</h1>
<p class="faint">Base <bdi>{{ result.base }}</bdi> ({{ result.family }}), {{ result.prompts|length }} prompts, seeds {{ result.seeds|join(", ") }}, {{ result.settings.steps }} steps, guidance {{ result.settings.guidance }}, {{ result.settings.width }}x{{ result.settings.height }} pixels. Intervals: {{ result.interval }}.{% if result.caution %} {{ result.caution }}.{% endif %}</p>
{% for adapter in result.adapters %}<p class="faint"><bdi>{{ adapter.name }}</bdi>: <bdi>{{ adapter.file }}</bdi> at {{ adapter.weight }}, sha256 {{ adapter.sha256[:16] }}</p>{% endfor %}

<h2>Numbers</h2>
<table id="numbers"><tr><th>Measure</th><th>Who</th><th>Value</th><th>Difference to base</th><th>Interval</th><th>Prompts won</th><th>Prompts</th></tr>
{% for name, rows in by_measure.items() %}{% for row in rows %}<tr><td>{% if loop.first %}{{ name }}{% if result.measures[name].better != "none" %} <span class="faint">({{ result.measures[name].better }} is better)</span>{% endif %}{% endif %}</td><td><bdi>{{ row.adapter }}</bdi></td>
<td class="n">{{ number(row.value) }}</td><td class="n {{ row.verdict }}">{% if row.delta is not none %}{{ signed(row.delta) }}{% endif %}</td>
<td class="n">{% if row.low is not none %}{{ number(row.low) }} … {{ number(row.high) }}{% else %}{{ row.no_interval }}{% endif %}</td>
<td class="n">{% if row.win_rate is defined %}{{ "%.0f"|format(100 * row.win_rate) }} %{% endif %}</td><td class="n">{{ row.prompts }}</td></tr>{% endfor %}{% endfor %}</table>
{% if result.left_out %}<p class="faint">Not measured: {% for name, reason in result.left_out.items() %}{{ name }} ({{ reason }}){{ "; " if not loop.last }}{% endfor %}.</p>{% endif %}

<h2>Differences to the base</h2>
{% for name, chart in charts.items() %}<div class="chart"><h3>{{ name }}{% if result.measures[name].better != "none" %} <span class="faint">{{ "to the right" if result.measures[name].better == "higher" else "to the left" }} is better</span>{% endif %}</h3><p class="faint">{{ result.measures[name].meaning }}. {{ result.measures[name].source }}.</p>
<div class="names">{% for row in by_measure[name] if row.delta is not none %}<div><bdi>{{ row.adapter }}</bdi></div>{% endfor %}</div><div>{{ chart|safe }}</div></div>{% endfor %}

<h2>Pictures</h2>
<p class="faint">One row a prompt, the same seed in every column{% if hidden %}; {{ hidden }} more prompts are not shown here{% endif %}.</p>
<div class="sheet{{ ' small' if is_small }}"><table><tr>{% for name in subjects %}<th><bdi>{{ name }}</bdi></th>{% endfor %}<th></th></tr>
{% for row in sheet %}<tr>{% for uri in row.pictures %}<td><img src="{{ uri }}" alt=""></td>{% endfor %}<td><bdi>{{ row.prompt[:300] }}</bdi><br><span class="faint">seed {{ row.seed }}, {{ row.split }}</span></td></tr>{% endfor %}</table></div>

{% for entry in result.ranked %}<h2>Best and worst prompts of <bdi>{{ entry.adapter }}</bdi></h2>
<p class="faint">By {{ entry.measure }}, difference to the base.</p>
{% for kind in ("best", "worst") %}{% if entry[kind] %}<table><tr><th>{{ kind|capitalize }}</th><th>base</th><th><bdi>{{ entry.adapter }}</bdi></th><th>Prompt</th></tr>
{% for prompt in entry[kind] %}<tr><td class="n">{{ signed(prompt.delta) }}</td>{% for uri in pair_of(entry.adapter, prompt.prompt_id) %}<td class="{{ 'small' if is_small }}"><img src="{{ uri }}" alt=""></td>{% endfor %}<td><bdi>{{ prompt.prompt[:300] }}</bdi></td></tr>{% endfor %}</table><br>{% endif %}{% endfor %}{% endfor %}

<h2>Near-copies of training pictures</h2>
{% if result.training is none %}<p>Not looked for: the training pictures were not given.</p>
{% elif not copies %}<p>None among {{ pictures_looked_at }} pictures, compared with {{ result.training.pictures }} training pictures.</p>
{% else %}<p>{{ result.near_copies|length }} pictures; drawn at the left, training picture at the right.</p><div class="pairs{{ ' small' if is_small }}">{% for copy in copies %}<div class="pair"><div><img src="{{ copy.drawn }}" alt=""><img src="{{ copy.trained }}" alt=""></div><p><bdi>{{ copy.adapter }}</bdi>, seed {{ copy.seed }}: <bdi>{{ copy.prompt[:120] }}</bdi></p><p class="faint">like <bdi>{{ copy.training[:80] }}</bdi>, cosine {{ number(copy.similarity) }}, {{ copy.hash_bits }} of 64 hash bits apart</p></div>{% endfor %}</div>{% endif %}

{% if result.imported %}<h2>Imported results</h2><p class="faint">Numbers that this program did not measure. Compare only what was graded by the same grader on the same prompts.</p>
<table><tr><th>Model</th><th>Benchmark</th><th>Value</th><th>Grader</th><th>Version</th><th>Prompts</th><th>n</th><th>Seed</th><th>Source</th></tr>
{% for row in result.imported %}<tr><td><bdi>{{ row.model }}</bdi></td><td>{{ row.benchmark }}</td><td class="n">{{ number(row.value) if row.value is not none else "not given" }}{{ " of " ~ row.scale if row.scale else "" }}</td>{% for key in ("grader", "version", "prompts", "n", "seed", "source") %}<td><bdi>{{ row[key] if row[key] is not none else "not stated" }}</bdi></td>{% endfor %}</tr>{% endfor %}</table>{% endif %}
</main></body></html>
"""
