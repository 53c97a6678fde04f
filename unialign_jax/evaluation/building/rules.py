"""The rules that prompts are held to. A broken rule is a flag for the reviewer, "RULE: what was found"; it decides
nothing by itself.
"""

import collections
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from unialign_jax.evaluation.building.drafting import SLOTS
from unialign_jax.files import check_regular, first_line

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
TOKEN = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]")
RUN = 4  # words
COUNTS = (
    "one two three four five six seven eight nine ten eleven twelve single both pair couple dozen trio twin twins "
    "a-dozen half-dozen"
).split()
COLORS = (
    "red orange yellow green blue purple violet pink brown black white grey gray beige tan cream ivory silver "
    "gold golden turquoise teal cyan magenta maroon navy olive crimson scarlet amber bronze copper khaki lavender "
    "lilac burgundy charcoal blond blonde tabby rust peach mint"
).split()
RELATIONS = (
    "left right above below under underneath beneath behind before beside between near nearest next in inside "
    "within on onto atop over across along around against among amid beyond opposite facing through "
    "outside toward towards by at surrounded flanked leading alongside"
).split()
BACKGROUNDS = (
    "background backdrop behind sky skies wall walls horizon distance surround surrounds surrounded surroundings "
    "scenery setting against beyond ceiling floor ground grass grassy field lawn court street road beach sand "
    "snow snowy slope forest trees room kitchen bathroom bedroom office counter table indoors outdoors night dusk "
    "daylight sunset water"
).split()
VERBS = (
    "add adjust age alter apply arrange attach blur break brighten bring build bend change clear close clean "
    "color colour combine convert cover crack crop cut darken decorate deepen deflate detach dim divide double "
    "draw dress drop dry duplicate empty enhance enlarge erase exchange expand extend extinguish fade fill flip "
    "flatten fold freeze give grow hang hide highlight illuminate include increase inflate insert invert keep "
    "leave lengthen let lift light lighten lower make melt merge mirror mix modify move multiply narrow open "
    "overlay paint park peel pile place plant polish position pour pull put raise recolor rearrange reduce "
    "reflect remove repaint replace reposition reshape resize restore reverse roll rotate scale scatter set shade "
    "sharpen shift shorten show shrink shut sit soften split spread stack straighten stretch swap switch take "
    "texture throw tidy tie tilt tint transfer transform transplant trim turn twist uncover unfold unroll wet "
    "widen wrap write"
).split()
# What one edit says when it stands on another.
LEANS = re.compile(
    r"^(then|also|next|finally|afterwards?)\b|^\w+ (it|them|these|those)\b|"
    r"\b(after that|the (newly )?(added|replaced|moved|new) |newly added|as before|the (first|second|previous) edit)\b",
    re.IGNORECASE,
)
ALIKE = 0.5  # share of common words from which on two edits are one


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def token_counter(tokenizer: str) -> Callable[[str], int]:
    """The function that counts the tokens of a text.

    Args:
      tokenizer: "words", for words and punctuation marks, or a tokenizer.json or its folder.

    Raises ValueError or OSError, in one line, where there is no such tokenizer.
    """
    if tokenizer == "words":
        return lambda text: len(TOKEN.findall(text))
    import tokenizers

    path = Path(tokenizer) / "tokenizer.json" if Path(tokenizer).is_dir() else Path(tokenizer)
    check_regular(path, 2**26)
    try:
        found = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"--tokenizer={tokenizer} is no tokenizer.json: {first_line(error)}") from None
    found.no_truncation()
    found.no_padding()
    return lambda text: len(found.encode(text, add_special_tokens=False).ids)


def long_flags(tokens: int, least: int) -> list[str]:
    return [f"length: {tokens} tokens, expected at least {least}"] if tokens < least else []


def slots_of(text: str, quoted: dict[str, str]) -> dict[str, str]:
    """{slot: the words of a prompt that fill it}, "" for a slot that is empty.

    What a draft quotes for a slot counts where the prompt has it and it holds a word of that kind; else the first such
    word of the prompt counts. A background may be any words that are quoted.
    """
    kinds = {"count": COUNTS, "color": COLORS, "relation": RELATIONS, "background": BACKGROUNDS}
    found = {}
    for slot in SLOTS:
        quote = quoted.get(slot, "")
        if quote.lower() not in text.lower():
            quote = ""
        if quote and (slot == "background" or _first_of(quote, kinds[slot])):
            found[slot] = quote
        else:
            found[slot] = _first_of(text, kinds[slot])
    return found


def _first_of(text: str, kind: Sequence[str]) -> str:
    for word in words(text):
        if any(part in kind or (kind is COUNTS and part.isdigit()) for part in (word, *word.split("-"))):
            return word
    return ""


def complex_flags(slots: dict[str, str]) -> list[str]:
    return [f"slots: no {name}" for name in SLOTS if not slots[name]]


def multi_flags(edits: Sequence[str]) -> list[str]:
    """Flags of the edits of one prompt, which should be exactly three imperatives that do not need each other."""
    flags = []
    if len(edits) != 3:
        return [f"edits: {len(edits)}, expected exactly 3"]
    for number, edit in enumerate(edits, start=1):
        flags += [f"{flag} (edit {number})" for flag in imperative_flags(edit)]
        if LEANS.search(edit):
            flags.append(f"independent: {LEANS.search(edit)[0].strip()!r} speaks of another edit (edit {number})")
    sets = [set(words(edit)) - {"the", "a", "an", "to", "of", "in", "on", "with", "and"} for edit in edits]
    for first in range(3):
        for second in range(first + 1, 3):
            either = sets[first] | sets[second]
            if either and len(sets[first] & sets[second]) / len(either) >= ALIKE:
                flags.append(f"independent: edits {first + 1} and {second + 1} say nearly the same")
    return flags


def imperative_flags(text: str) -> list[str]:
    verb = first_verb(text)
    if not verb:
        return ["imperative: it does not begin with a verb that is known"]
    if len(split_sentences(text)) > 1:
        return ["imperative: more than one sentence"]
    return []


def first_verb(text: str) -> str:
    """The verb that an instruction begins with; "" where it is none that is known."""
    found = words(text)[:1]
    return found[0] if found and found[0] in VERBS else ""


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, also where no space stands between them, as in the official set."""
    return [part.strip() for part in re.split(r"(?<=[.!?])\s*(?=[A-Z])", text.strip()) if part.strip()]


def overlaps(texts: dict[str, str]) -> dict[str, tuple[float, str]]:
    """{item: (the largest share of its runs of four words that another text has, the item of that text)}."""
    runs = {item: _runs(text) for item, text in texts.items()}
    holders = collections.defaultdict(list)
    for item, own in runs.items():
        for run in own:
            holders[run].append(item)
    found = {}
    for item, own in runs.items():
        shared = collections.Counter(other for run in own for other in holders[run] if other != item)
        other, count = max(shared.items(), key=lambda pair: pair[1], default=("", 0))
        found[item] = (count / len(own) if own else 0.0, other)
    return found


def _runs(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[place : place + RUN]) for place in range(len(found) - RUN + 1)}


def common_verbs(instructions: Sequence[tuple[str, str]], most: float) -> dict[str, str]:
    """{item: flag} of those whose verb begins more than the share `most` of all instructions.

    Only those beyond the share are flagged, the last ones.

    Args:
      instructions: (item, instruction) in order; an item may have several.
    """
    allowed, seen, flags = int(most * len(instructions)), collections.Counter(), {}
    counts = collections.Counter(first_verb(text) for _, text in instructions)
    for item, text in instructions:
        verb = first_verb(text)
        seen[verb] += 1
        if verb and seen[verb] > max(allowed, 1):
            flags[item] = (
                f"verbs: {verb!r} begins {counts[verb]} of {len(instructions)} edits, expected {most:.0%} at most"
            )
    return flags
