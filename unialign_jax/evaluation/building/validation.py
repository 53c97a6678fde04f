"""Sixth stage: holds the drafts to the rules (`rules`), and asks for new ones where that is wanted.

The model that drafts is asked whether an edit needs reasoning. With --redraft=N a draft that is flagged is asked for
again, with the flags, at most N times. A draft that a reviewer rejected is always asked for again, with the reason.

items.jsonl has every prompt with its flags, flagged.jsonl those that have any.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from unialign_jax.evaluation.building import review, rules
from unialign_jax.evaluation.building.drafting import (
    GROUPS,
    JSON_MODE,
    MAX_TOKENS,
    Draft,
    Drafter,
    read_rubric,
    read_templates,
    template_digest,
)
from unialign_jax.evaluation.building.settings import Settings
from unialign_jax.evaluation.building.stages import Build, Stage, write_rows
from unialign_jax.evaluation.judging import Question
from unialign_jax.files import check_regular, sha256

MOST_REJECTED = 20  # drafts of one item that a reviewer may reject


def parameters(build: Build) -> dict:
    texts = read_templates(build.settings.templates)
    digests = {name: template_digest(texts[name]) for name in ("rubric", "retry")}
    tokenizer = build.settings.tokenizer
    if tokenizer != "words":
        path = Path(tokenizer) / "tokenizer.json" if Path(tokenizer).is_dir() else Path(tokenizer)
        check_regular(path)
        digests["tokenizer"] = sha256(path)
    rejected = sorted(review.rejected(build).items())
    names = ("long_tokens", "tokenizer", "max_overlap", "max_verb_share", "redraft")
    return build.settings.part(*names) | {
        "files": digests,
        "rejected": hashlib.sha256(repr(rejected).encode()).hexdigest()[:16] if rejected else "",
    }


def work(build: Build, folder: Path) -> dict:
    images = {str(image["image_id"]): image for image in build.rows("select/images.jsonl")}
    drafts = [Draft(**row) for row in build.rows("draft/drafts.jsonl")]
    rejected, again = review.rejected(build), 0
    with Drafter(build) as drafter:

        def checked_drafts():
            return check_all(drafts, build.settings, judged_reasoning(drafts, images, drafter))

        def draft_again(reasons: dict[int, str]):
            asked = [(images[image_of(drafts[n])], drafts[n].group, (drafts[n], why)) for n, why in reasons.items()]
            for number, draft in zip(reasons, drafter.draft(asked, "draft again"), strict=True):
                if draft.text or drafts[number].draft_id in rejected:
                    drafts[number] = draft
            return len(reasons)

        checked = checked_drafts()
        for _ in range(build.settings.redraft):
            flags = {number: "; ".join(checked[draft.item]["flags"]) for number, draft in enumerate(drafts)}
            again += draft_again({number: found for number, found in flags.items() if found})
            checked = checked_drafts()
        # After the flags: so what a reviewer rejects changes no other draft.
        for _ in range(MOST_REJECTED):
            turned_down = [number for number, draft in enumerate(drafts) if draft.draft_id in rejected]
            if not turned_down:
                break
            again += draft_again(
                {number: f"a reviewer rejected it: {rejected[drafts[number].draft_id]}" for number in turned_down}
            )
            checked = checked_drafts()
        else:
            raise ValueError(
                f"the model has no other draft of {drafts[turned_down[0]].item} than those that a reviewer rejected: "
                "decide edit, and write one"
            )
    rows = [dataclasses.asdict(draft) | checked[draft.item] for draft in drafts]
    flagged = [row for row in rows if row["flags"]]
    write_rows(folder / "items.jsonl", rows)
    write_rows(folder / "flagged.jsonl", ({name: row[name] for name in ("item", "flags", "text")} for row in flagged))
    counts = collections.Counter(flag.partition(":")[0] for row in flagged for flag in row["flags"])
    said = f"{len(rows)} prompts, {len(flagged)} flagged"
    if counts:
        said += " (" + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) + ")"
    said += f"; {again} drafts asked for again" if again else ""
    return {"said": said, "flagged": len(flagged), "flags": dict(counts), "asked_again": again}


STAGE = Stage("validate", ("select/images.jsonl", "draft/drafts.jsonl"), parameters, work)


def image_of(draft: Draft) -> str:
    """The number of a draft's image."""
    return draft.item.split("/")[0]


def judged_reasoning(drafts: Iterable[Draft], images: dict[str, dict], drafter: Drafter) -> dict[str, dict]:
    """{item: what the model says about whether the edit needs reasoning}, for those of edit_complex."""
    asked = [draft for draft in drafts if draft.group == "edit_complex" and draft.text]
    questions = [
        Question(
            draft.item,
            "reasoning",
            drafter.templates["rubric"].replace("<instruction>", draft.text),
            (Path(images[image_of(draft)]["file"]),),
            images_first=True,
            read=read_rubric,
            max_tokens=MAX_TOKENS,
            more=JSON_MODE,
        )
        for draft in asked
    ]
    found = {}
    for draft, answer in zip(asked, drafter.ask(questions, "reasoning"), strict=True):
        found[draft.item] = answer.value if answer.is_parsed else {"needs_reasoning": None, "why": answer.reason}
    return found


def check_all(drafts: list[Draft], given: Settings, reasoning: dict[str, dict]) -> dict[str, dict]:
    """{item: {"flags": those of all rules, "checks": what was measured}}."""
    count_tokens, found = rules.token_counter(given.tokenizer), {}
    for draft in drafts:
        found[draft.item] = {"flags": [], "checks": {}}
        if draft.text:
            flags, checks = check_one(draft.group, draft.text, draft.parts, count_tokens, given)
            found[draft.item] = {"flags": flags, "checks": checks}
        else:
            found[draft.item]["flags"].append(f"unreadable: {draft.reason}")
    for group in GROUPS:
        texts = {draft.item: draft.text for draft in drafts if draft.group == group and draft.text}
        for item, (share, other) in rules.overlaps(texts).items():
            if share > given.max_overlap:
                flag = f"overlap: {share:.0%} of its runs of {rules.RUN} words are in {other}"
                found[item]["flags"].append(f"{flag}, expected at most {given.max_overlap:.0%}")
    for group in ("edit_multi", "edit_complex"):
        edits = [
            (draft.item, edit)
            for draft in drafts
            if draft.group == group and draft.text
            for edit in draft.parts.get("edits", [draft.text])
        ]
        for item, flag in rules.common_verbs(edits, given.max_verb_share).items():
            found[item]["flags"].append(flag)
    for item, judged in reasoning.items():
        found[item]["checks"]["reasoning"] = judged
        if judged["needs_reasoning"] is None:
            found[item]["flags"].append(f"reasoning: not judged ({judged['why']})")
        elif not judged["needs_reasoning"]:
            found[item]["flags"].append(f"reasoning: it needs none ({judged['why']})")
    return found


def check_one(
    group: str, text: str, parts: dict, count_tokens: Callable[[str], int], given: Settings
) -> tuple[list[str], dict]:
    """(flags, what was measured) of the rules that look at one prompt alone."""
    if group == "t2i_long":
        tokens = count_tokens(text)
        return rules.long_flags(tokens, given.long_tokens), {"tokens": tokens, "tokenizer": given.tokenizer}
    if group == "t2i_complex":
        slots = rules.slots_of(text, parts.get("slots", {}))
        return rules.complex_flags(slots), {"slots": slots}
    if group == "edit_multi":
        return rules.multi_flags(parts["edits"]), {}
    return rules.imperative_flags(text), {}
