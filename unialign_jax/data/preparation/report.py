"""What was prepared, for people: `report.json`, and `report.html` with histograms and pictures, one file by itself."""

import html

import numpy as np

from unialign_jax.data.preparation.packing import Choice
from unialign_jax.data.preparation.pieces import Counts, Job, read_samples, read_table
from unialign_jax.data.text_lengths import TextLengths

NUM_SAMPLES = 24

_ASPECTS = (0.25, 1 / 3, 0.5, 2 / 3, 0.8, 0.95, 1.05, 1.25, 1.5, 2, 3, 4)  # width / height
_SIDES = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
_TOKENS = (8, 16, 32, 48, 64, 77, 96, 128, 192, 256, 384, 512, 1024, 2048)


def make(
    job: Job, names: list[str], counts: Counts, choice: Choice, lengths: TextLengths, parameters: dict, folders: dict
) -> dict:
    """The report as JSON. Histograms are of the records that were kept, held-out ones too.

    A histogram has `edges` and `counts`: number i counts what is below edges[i] and not below the edge before; the last
    one what is not below any.
    """
    sums = {"aspect": np.zeros(len(_ASPECTS) + 1, int), "shorter_side": np.zeros(len(_SIDES) + 1, int)}
    tokens = {name: np.zeros(len(_TOKENS) + 1, int) for name in lengths.fields}
    cut = dict.fromkeys(lengths.fields, 0)
    start = 0
    for name in names:
        table = read_table(job.work, name)
        kept = choice.split[start : start + len(table["key"])] >= 0
        start += len(kept)
        width, height = table["width"][kept].astype(float), table["height"][kept].astype(float)
        sums["aspect"] += _histogram(width / height, _ASPECTS)
        sums["shorter_side"] += _histogram(np.minimum(width, height), _SIDES)
        for text in tokens:
            found = table[f"tokens_{text}"][kept]
            tokens[text] += _histogram(found[:, 0], _TOKENS)
            cut[text] += int((found[:, 1] < found[:, 0]).sum())
    num_kept = int((choice.split >= 0).sum())
    unit = "tokens" if lengths.tokenizer is not None else "words"
    return {
        "kind": job.kind,
        "folders": folders,
        "rows": counts.num_rows,
        "bad_rows": counts.num_bad,
        "records": num_kept,
        "duplicates": choice.duplicates,
        "near_duplicates": choice.near_duplicates,
        "reasons": dict(counts.reasons.most_common()),
        "notes": dict(counts.notes.most_common()),
        "first_bad": counts.first_bad,
        "histograms": {
            "aspect": {"edges": _ASPECTS, "counts": sums["aspect"].tolist()},
            "shorter_side": {"edges": _SIDES, "counts": sums["shorter_side"].tolist()},
            **{f"{text}_{unit}": {"edges": _TOKENS, "counts": found.tolist()} for text, found in tokens.items()},
        },
        "text_length": job.text_length,
        "cut_share": {text: number / num_kept if num_kept else 0.0 for text, number in cut.items()}
        if job.text_length
        else None,
        "texts": [*lengths.lines(), *lengths.cuts()],
        "parameters": parameters,
        "samples": _samples(job, names),
    }


def _histogram(values: np.ndarray, edges: tuple[float, ...]) -> np.ndarray:
    return np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)


def _samples(job: Job, names: list[str]) -> list[dict]:
    """Samples of pieces that are evenly spaced, one or more of each."""
    count = min(len(names), NUM_SAMPLES)
    chosen = [names[number * len(names) // count] for number in range(count)]
    found = [read_samples(job.work, name) for name in chosen]
    each = max(1, NUM_SAMPLES // max(1, count))
    return [sample for samples in found for sample in samples[:each]]


def as_html(report: dict) -> str:
    """One page, without scripts and without anything from elsewhere; texts of strangers are escaped."""
    e = html.escape
    rows = [
        ("rows read", report["rows"]),
        ("bad rows", report["bad_rows"]),
        ("records", report["records"]),
        ("duplicates dropped", report["duplicates"]),
        ("near-duplicates dropped", report["near_duplicates"]),
        *((folder, f"{number:,} records") for folder, number in report["folders"].items()),
    ]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f'<meta http-equiv=Content-Security-Policy content="{_POLICY}">',
        f"<title>{e(report['kind'])}</title><style>{_STYLE}</style><h1>{e(report['kind'])}</h1>",
        _table(rows),
    ]
    if report["reasons"]:
        parts += ["<h2>Rejected, by reason</h2>", _table(report["reasons"].items())]
        parts += [f"<p class=line>{e(line)}</p>" for line in report["first_bad"]]
    if report["notes"]:
        parts += ["<h2>Notes</h2>", _table(report["notes"].items())]
    parts.append("<h2>Texts</h2>")
    parts += [f"<p class=line>{e(line)}</p>" for line in report["texts"]]
    for text, share in (report["cut_share"] or {}).items():
        parts.append(f"<p>{share:.1%} of the {e(text)}s are cut at {report['text_length']} tokens.</p>")
    for name, histogram in report["histograms"].items():
        parts += [f"<h2>{e(name.replace('_', ' '))}</h2>", _bars(histogram)]
    parts.append("<h2>Samples</h2><div class=sheet>")
    for sample in report["samples"]:
        pictures = "".join(f'<img alt="" src="data:image/jpeg;base64,{e(data)}">' for data in sample["images"])
        texts = "".join(f"<p><b>{e(name)}</b> {e(text)}</p>" for name, text in sample["texts"].items())
        parts.append(f"<figure>{pictures}<p class=line>{e(sample['key'])}</p>{texts}</figure>")
    return "\n".join([*parts, "</div></html>"]) + "\n"


def _table(rows) -> str:
    cells = (
        f"<tr><td>{html.escape(str(name))}<td>{f'{value:,}' if isinstance(value, int) else html.escape(str(value))}"
        for name, value in rows
    )
    return f"<table>{''.join(cells)}</table>"


def _bars(histogram: dict) -> str:
    edges, counts = histogram["edges"], histogram["counts"]
    labels = [f"under {edges[0]:.4g}", *(f"{a:.4g} to {b:.4g}" for a, b in zip(edges, edges[1:], strict=False))]
    labels.append(f"{edges[-1]:.4g} and more")
    most = max(*counts, 1)
    rows = (
        f"<tr><td>{label}<td>{count:,}<td class=bar><i style=width:{100 * count / most:.1f}%></i>"
        for label, count in zip(labels, counts, strict=True)
    )
    return f"<table>{''.join(rows)}</table>"


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 14px sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222; background: #fff }
td { padding: .1em 1em .1em 0; font-variant-numeric: tabular-nums } .bar { width: 24em }
i { display: block; height: .8em; background: #47a }
.line { font: 12px monospace; overflow-wrap: anywhere }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 1em }
figure { margin: 0; border: 1px solid #ddd; padding: .5em; overflow-wrap: anywhere }
img { max-width: 96px; margin: 2px }
figure img:last-of-type { max-width: 192px; display: block }
figure p { margin: .3em 0; max-height: 12em; overflow: auto }
"""
