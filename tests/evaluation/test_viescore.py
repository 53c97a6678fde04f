"""VIEScore: how the prompts are joined, how answers are read, and what becomes of those that say nothing."""

import math
import time
from pathlib import Path

import pytest
from PIL import Image

from unialign_jax.evaluation import viescore
from unialign_jax.evaluation.judging import FAILED, PARSED, UNPARSED, Judgement, Unparsed

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "eval" / "viescore"

# (answer, the least score that the official code takes, the scores of an answer that is asked for two). The second is
# what `mllm_output_to_dict` and `min` of TIGER-AI-Lab/VIEScore gave for the answer: None where it asks again, or fails.
ANSWERS = [
    ('{"score": [7, 8], "reasoning": "good"}', 7, [7, 8]),
    ('```json\n{"score": 5}\n```', 5, None),
    ("[6, 0]", 0, [6, 0]),
    ("7", 7, None),
    ('||V^=^V||\n{"score": [3, 4],\n"reasoning": "x"}\n||V^=^V||', 3, [3, 4]),
    ("{score: 7, reasoning: good}", 7, None),
    ("The score is [6.5, 7]", None, None),
    ('{"score": [7, 8], "reasoning": "the "big" hat"}', None, None),
    ('{"score": []}', None, None),
    ("", None, None),
    (" ", None, None),
    ("\n7\n", 7, None),
    ("11", None, None),
    ("-1", None, None),
    ("7.5", None, None),
    ("0", 0, None),
    ("10", 10, None),
    ("7/10", None, None),
    ("Score: 7", None, None),
    ("[7]", None, None),
    ("[7, 8, 9]", None, None),
    ("[7,8]", 7, [7, 8]),
    ("[7,  8]", None, None),
    ("[ 7, 8]", None, None),
    ("[07, 8]", None, None),
    ("[11, 3]", 3, None),
    ("I give [6, 0] overall", 0, [6, 0]),
    ("[6, 0] and [1, 2]", None, None),
    ("[[6, 0]]", None, None),
    ('{"score": [6.5, 7], "reasoning": ""}', 6.5, [6.5, 7]),
    ('{"score": [11, 7]}', 7, None),
    ('{"score": [-1, 7]}', -1, None),
    ('{"score": [NaN, 7]}', math.nan, None),
    ('{"score": [7, NaN]}', 7, None),
    ('{"score": [Infinity, 7]}', 7, None),
    ('{"score": [true, 7]}', True, None),
    ('{"score": ["7", "8"]}', None, None),
    ('{"score": ["7", 8]}', None, None),
    ('{"score": "7"}', None, None),
    ('{"score": null}', None, None),
    ('{"score": {}}', None, None),
    ('{"score": [[7, 8]]}', None, None),
    ('{"score": [7, null]}', None, None),
    ('{"score": [7]}', 7, None),
    ('{"score": [7, 8, 9]}', 7, None),
    ('{"Score": [7, 8]}', None, None),
    ('{"scores": [7, 8]}', None, None),
    ('{"reasoning": "no score"}', None, None),
    ('{"score": [7, 8]} {"score": [1, 2]}', None, None),
    ('Here: {"score": [7, 8], "reasoning": "ok"} Thanks', 7, [7, 8]),
    ('{"score": [7, 8],}', None, None),
    ('{"score": [7, 8]', 7, [7, 8]),
    ('"score": [7, 8]', 7, [7, 8]),
    ('{"score" : [7, 8], "reasoning" : "line\nbreak"}', 7, [7, 8]),
    ('{\n"score" : [7, 8],\n"reasoning" : "fine"\n}', 7, [7, 8]),
    ('{"score": [7, 8], "reasoning": "tab\there"}', None, None),
    ("{'score': [7, 8]}", None, None),
    ("{score: [7, 8]}", None, None),
    ("{score: 7.5}", 7.5, None),
    ("{score: -3}", -3, None),
    ("{score: high}", None, None),
    ("{score: 7, score: 8}", 8, None),
    ('{"score": 1e1}', 10.0, None),
    ('{"score": [1e400, 7]}', 7, None),
    ("||V^=^V||[7, 8]||V^=^V||", None, None),
    ("||V^=^V||||V^=^V||", None, None),
    ('||V^=^V||{"score": [7, 8]}', 7, [7, 8]),
    ("||V^=^V||7||V^=^V||", None, None),
    ('{"score": [7, 8]}||V^=^V||{"score": [1, 2]}||V^=^V||', 1, [1, 2]),
    ("} {", None, None),
    ("{}", None, None),
    ("{ }", None, None),
    ("null", None, None),
    ("true", None, None),
    ("rate_limit_exceeded", None, None),
    ('{"score": [7, 8], "reasoning": "a } b"}', 7, [7, 8]),
    ('{"score": [７, 8]}', None, None),
    ("[٧, 8]", None, None),
    ("٧", 7, None),
    ("1_0", 10, None),
    ("+7", 7, None),
    ('{"output": {"score": [7, 8]}}', None, None),
    ('[{"score": [7, 8]}]', 7, [7, 8]),
    ('{"score": [7 8]}', None, None),
    ('{"score": 7, "reasoning": "it\'s fine"}', 7, None),
    ("{score: true}", None, None),
    ('{"score": [7, 8]}\ufeff', 7, [7, 8]),
    ('\ufeff{"score": [7, 8]}', 7, [7, 8]),
]


@pytest.mark.parametrize("answer, official, two", ANSWERS, ids=range(len(ANSWERS)))
def test_answers_are_read_as_the_official_code_reads_them(answer, official, two):
    if official is None:
        with pytest.raises(Unparsed):
            viescore.official_scores(answer)
    else:
        found = min(viescore.official_scores(answer))
        assert found == official or (math.isnan(found) and math.isnan(official))
    if two is None:
        with pytest.raises(Unparsed):
            viescore.read_scores(answer, 2)
    else:
        assert viescore.read_scores(answer, 2) == two


def test_a_single_score_is_read_where_one_is_asked_for():
    assert viescore.read_scores('{"score": [7]}', 1) == [7] == viescore.read_scores("7", 1)
    with pytest.raises(Unparsed, match="has 2 scores, expected 1"):
        viescore.read_scores("[7, 8]", 1)


def test_a_score_that_no_float_holds_is_refused():
    """The official code takes it, and its means are then of it alone."""
    with pytest.raises(Unparsed, match="too large"):
        viescore.official_scores('{"score": 99999999999999999999}')


@pytest.mark.parametrize(
    "rubbish",
    [
        "{" + '"' * 16_000 + "}",
        viescore._DELIMITER + '":' * 8_000 + viescore._DELIMITER,
        "{" + "a" * 16_000 + "}",
        "{" * 16_000 + "}",
        '{"a":' * 3_000 + "}" * 1_000,
        "[" + "9" * 16_000 + ", 1]",
        "9" * 60_000,
    ],
    ids=range(7),
)
def test_no_answer_takes_long(rubbish):
    began = time.monotonic()
    with pytest.raises(Unparsed):
        viescore.official_scores(rubbish)
    assert time.monotonic() - began < 1


# Prompts


@pytest.fixture
def prompts_folder(tmp_path):
    texts = {
        "context_no_delimit.txt": "Context.",
        "prompts_0shot/two_image_edit_rule.txt": "Two images.\n",
        "prompts_0shot/tie_rule_SC.txt": "\nEdit: <instruction>",
        "prompts_0shot/one_image_gen_rule.txt": "One image.",
        "prompts_0shot/t2i_rule_SC.txt": "Prompt: <prompt>",
        "prompts_0shot/rule_PQ.txt": "Quality.",
    }
    for name, text in texts.items():
        path = tmp_path / "prompts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "prompts"


def test_prompts_are_joined_as_in_the_official_code(prompts_folder, tmp_path):
    prompts = viescore.read_prompts(prompts_folder)
    images = [tmp_path / "source.png", tmp_path / "edited.png"]
    edit, quality = viescore.questions(prompts, "tie", "i", "add <prompt>", images, images_first=True)
    assert edit.text == "Context.\nTwo images.\n\n\nEdit: add <prompt>"
    assert quality.text == "Context.\nQuality."
    assert edit.images == tuple(images) and quality.images == (images[1],)
    assert edit.images_first and quality.images_first
    image, _ = viescore.questions(prompts, "t2i", "i", "a fox", images[1:], images_first=False)
    assert image.text == "Context.\nOne image.\nPrompt: a fox" and not image.images_first
    assert image.read("7") == [7] and edit.read("[7, 8]") == [7, 8] and quality.read("[7, 8]") == [7, 8]
    assert len(prompts.changed) == 6


@pytest.mark.skipif(not SHARED.is_dir(), reason="the official prompts are not here (../shared/data/eval/viescore)")
def test_the_official_prompts_are_known():
    prompts = viescore.read_prompts(SHARED)
    assert prompts.changed == []
    assert prompts.texts["tie"].startswith("You are a professional digital artist.")
    assert prompts.texts["tie"].endswith("Editing instruction: <instruction>\n")
    assert (
        prompts.texts["PQ"]
        .rstrip()
        .endswith("Put the score in a list such that output score = [naturalness, artifacts]")
    )


@pytest.mark.bad_input
def test_prompts_that_are_not_there(prompts_folder, refuses):
    refuses(lambda: viescore.read_prompts(None), "--viescore-prompts=DIR", "TIGER-AI-Lab/VIEScore")
    (prompts_folder / "prompts_0shot/tie_rule_SC.txt").write_text("nothing to put in")
    refuses(lambda: viescore.read_prompts(prompts_folder), "tie_rule_SC.txt", "<instruction>")
    (prompts_folder / "prompts_0shot/tie_rule_SC.txt").write_bytes(b"\xff\xfe<instruction>")
    refuses(lambda: viescore.read_prompts(prompts_folder), "tie_rule_SC.txt", "UTF-8")
    (prompts_folder / "context_no_delimit.txt").unlink()
    refuses(lambda: viescore.read_prompts(prompts_folder), "context_no_delimit.txt", "expected a copy")


# Scores


def judgement(answer, *earlier, status=UNPARSED, value=None, name="SC"):
    return Judgement("k", "item", name, status, value=value, answer=answer, earlier=earlier, reason="no")


def test_the_least_score_counts_and_the_overall_is_a_root():
    semantics = judgement("[4, 9]", status=PARSED, value=[4, 9])
    quality = judgement("[10, 9]", status=PARSED, value=[10, 9], name="PQ")
    for mode in ("official", "corrected"):
        assert viescore.values_of(semantics, quality, mode) == ({"SC": 4, "PQ": 9, "O": 6}, "")


def test_official_mode_takes_what_corrected_mode_refuses():
    """A judge that gave 11 first, then one score of two, and never what was asked for."""
    semantics = judgement("7", '{"score": [11, 12]}', "what?")
    quality = judgement("[9, 9]", status=PARSED, value=[9, 9], name="PQ")
    values, failed = viescore.values_of(semantics, quality, "official")
    assert values == {"SC": 11, "PQ": 9, "O": pytest.approx(math.sqrt(99))} and not failed
    assert viescore.values_of(semantics, quality, "corrected") == ({}, "SC: no")


@pytest.mark.parametrize("answers", ['{"score": [-1, 5]}', '{"score": [NaN, 5]}', '{"score": [Infinity, Infinity]}'])
def test_scores_without_a_root_fail(answers):
    quality = judgement("[9, 9]", status=PARSED, value=[9, 9], name="PQ")
    values, failed = viescore.values_of(judgement(answers), quality, "official")
    assert values == {} and "no overall score" in failed


def test_nothing_is_guessed_unless_it_is_asked_for():
    quality = judgement("[9, 9]", status=PARSED, value=[9, 9], name="PQ")
    for mode in ("official", "corrected"):
        assert viescore.values_of(judgement("a hat"), quality, mode) == ({}, "SC: no")
    assert viescore.settle(judgement("a hat"), "corrected", guess=True) == (None, "SC: no")
    guesses = [viescore.settle(judgement("a hat"), "official", guess=True) for _ in range(3)]
    assert guesses[0] == guesses[1] == guesses[2] and guesses[0][0] in range(11)
    many = {viescore.settle(Judgement("k", str(i), "SC", UNPARSED, answer="?"), "official", guess=True)[0]
            for i in range(200)}  # fmt: skip
    assert many == set(range(11))
    # The official code does not guess for what has braces, nor where nothing was answered.
    assert viescore.settle(judgement("{a hat}"), "official", guess=True) == (None, "SC: no")
    assert viescore.settle(judgement("", status=FAILED), "official", guess=True) == (None, "SC: no")


def test_an_edit_of_another_size_is_shown_at_its_sources(tmp_path):
    Image.new("RGB", (40, 24), "red").save(tmp_path / "source.png")
    Image.new("RGB", (40, 24), "blue").save(tmp_path / "same.png")
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "other.png")
    target = tmp_path / "judged" / "other.png"
    assert viescore.resized(tmp_path / "same.png", tmp_path / "source.png", target) == tmp_path / "same.png"
    assert not target.exists()
    assert viescore.resized(tmp_path / "other.png", tmp_path / "source.png", target) == target
    with Image.open(target) as image:
        assert image.size == (40, 24) and image.getpixel((0, 0)) == (0, 0, 255)
