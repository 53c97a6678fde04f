"""The parts of the builder on cases worked by hand, and on the official set."""

import json
import threading

import numpy as np
import pytest
from PIL import Image

from unialign_jax.data.endpoint import Retry
from unialign_jax.evaluation.building import drafting, embedding, filters, review, rules, selection
from unialign_jax.evaluation.building.settings import Settings
from unialign_jax.evaluation.judging import Unparsed

from .conftest import SHARED, write_picture


@pytest.fixture(scope="module")
def official():
    path = SHARED / "semgen_bench.jsonl"
    if not path.is_file():
        pytest.skip("../shared/data has no semgen_bench.jsonl")
    return list(map(json.loads, path.read_text().splitlines()))


# Filters


def test_figures_of_an_image():
    grey = np.zeros((5, 5), np.uint8)
    grey[2, 2] = 255  # the Laplacian is -4 x 255 there, 255 at its four neighbours, 0 in the corners; the mean is 0
    found = filters.measure(grey)
    assert found["sharpness"] == 20 * 255**2 / 9 and found["brightness"] == 255 / 25
    assert found["clipped"] == 24 / 25 and (found["width"], found["height"]) == (5, 5)


def test_reasons_against_an_image():
    good = {"width": 500, "height": 400, "sharpness": 100.0, "brightness": 120.0, "clipped": 0.5}
    assert filters.faults(good, ["dog", "cat"], Settings()) == []
    assert filters.faults(good, None, Settings()) == []  # the source lists no objects
    words = {"width": ["side"], "height": ["side", "aspect"], "sharpness": ["blur"], "brightness": ["exposure"]}
    for name, expected in words.items():
        bad = good | {name: 390 if name == "width" else 300 if name == "height" else 39.9}
        assert [reason.partition(":")[0] for reason in filters.faults(bad, ["dog", "cat"], Settings())] == expected
    assert filters.faults(good | {"clipped": 0.51}, None, Settings())[0].startswith("exposure: 51")
    assert filters.faults(good, ["dog", "dog"], Settings()) == ["objects: 1 kinds, expected at least 2"]


# Selection


def test_near_duplicates_of_what_stays():
    """1 is like 0; 2 is like 1 but not like 0, and 1 is gone: so 2 stays."""
    angles = np.radians([0, 15, 30, 90, 91])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    assert selection.near_duplicates(vectors, np.cos(np.radians(16)), block=2) == {1: 0, 4: 3}


@pytest.mark.parametrize("shape", [(30, 7), (7, 30)])
def test_principal_components_keep_distances(shape):
    vectors = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    components = selection.principal_components(vectors, 128)
    assert components.shape[1] == 7
    distances = [np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (vectors.astype(float), components)]
    np.testing.assert_allclose(*distances, atol=1e-5)
    assert (np.diff(components.var(0)) <= 1e-9).all()  # the largest first


def test_clusters_of_three_heaps():
    points = np.array([[0.0], [0.1], [0.2], [0.3], [5.0], [5.1], [5.2], [9.0], [9.1]])
    labels, cut = selection.clusters_of(points, 3, 2, seed=0)
    assert labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2] and cut == 3  # by size


def test_a_small_cluster_goes_to_the_nearest_of_the_large_ones():
    """Two heaps and one point far off: two clusters of at least two need a cut into three, and 30 goes to 5."""
    points = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [30.0]])
    labels, cut = selection.clusters_of(points, 2, 2, seed=0)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1] and cut == 3


def test_small_clusters_come_first_when_there_are_many_points(monkeypatch):
    monkeypatch.setattr(selection, "MOST_JOINED", 50)
    monkeypatch.setattr(selection, "SMALL_CLUSTERS", 12)
    heaps = np.repeat([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0]], 40, axis=0)
    points = heaps + np.random.default_rng(0).normal(size=heaps.shape)
    labels, _ = selection.clusters_of(points, 3, 10, seed=0)
    assert [len(set(labels[begin : begin + 40])) for begin in (0, 40, 80)] == [1, 1, 1] and len(set(labels)) == 3


def test_k_center_takes_the_farthest_first():
    points = np.array([[0.0], [1.0], [5.0], [10.0]])
    assert selection.k_center(points, 0) == [0, 3, 2, 1]
    assert selection.k_center(points, 2) == [2, 0, 3, 1]


def test_reserves_take_the_places_of_excluded_images():
    ordered = [{"key": key} for key in "abcdef"]
    assert [row["key"] for row in selection.with_reserves(ordered, 3, {"b", "d"}, 0)] == ["a", "e", "c"]


@pytest.mark.bad_input
def test_clusters_that_cannot_be(refuses):
    refuses(lambda: selection.clusters_of(np.zeros((5, 2)), 2, 3, 0), "5 images", "2 clusters with 3 each")
    refuses(lambda: selection.clusters_of(np.array([[0.0], [0.0], [0.1], [9.0]]), 2, 2, 0), "no cut of the tree")
    refuses(lambda: selection.with_reserves([{"key": "a"}, {"key": "b"}], 2, {"a"}, 7), "cluster 7 has no more images")


# Rules


def test_the_official_prompts_against_the_rules(official):
    """What docs/semgen_builder.md says of the official set. No outside source: counted once, and looked at by eye."""
    count = rules.token_counter("words")
    assert max(count(line["t2i_long"]) for line in official) == 127  # so none has the 200 that the paper says
    edits = [rules.split_sentences(line["edit_multi"]) for line in official]
    assert all(len(found) == 3 and not rules.multi_flags(found) for found in edits)
    assert not any(rules.imperative_flags(line["edit_complex"]) for line in official)
    assert sum(not rules.complex_flags(rules.slots_of(line["t2i_complex"], {})) for line in official) == 130
    shares = {
        group: rules.overlaps({str(line["image_id"]): line[group] for line in official}) for group in drafting.GROUPS
    }
    kept = [sum(share <= Settings().max_overlap for share, _ in found.values()) for found in shares.values()]
    assert kept == [150, 150, 145, 144]
    most = Settings().max_verb_share
    parallel = [(str(number), edit) for number, found in enumerate(edits) for edit in found]
    flags = rules.common_verbs(parallel, most)
    assert 150 - len(flags) == 115 and "'add' begins 234 of 450" in flags["149"]
    assert not rules.common_verbs([(str(line["image_id"]), line["edit_complex"]) for line in official], most)


def test_slots_are_what_is_quoted_or_the_first_word_of_a_kind():
    text = "Three dogs sleep to the left of a brown box."
    assert rules.slots_of(text, {}) == {"count": "three", "color": "brown", "relation": "left", "background": ""}
    quoted = {"count": "Three dogs", "color": "dogs", "relation": "above", "background": "a brown box"}
    found = rules.slots_of(text, quoted)  # "dogs" is no colour, and "above" is not in the text
    assert found == {"count": "Three dogs", "color": "brown", "relation": "left", "background": "a brown box"}
    assert rules.complex_flags(rules.slots_of("A dog.", {})) == [f"slots: no {name}" for name in drafting.SLOTS]


@pytest.mark.parametrize(
    "edits, words",
    [
        (["Add a hat.", "Remove the dog."], ["2, expected exactly 3"]),
        (["Add a hat.", "The dog is blue.", "Paint the wall."], ["imperative", "edit 2"]),
        (["Add a hat. Add a scarf.", "Remove the dog.", "Paint the wall."], ["more than one sentence", "edit 1"]),
        (["Add a hat.", "Then remove the dog.", "Paint the wall."], ["independent", "'Then'", "edit 2"]),
        (["Add a hat.", "Paint it red.", "Remove the dog."], ["independent", "'Paint it'"]),
        (["Add a hat.", "Paint the added hat red.", "Remove the dog."], ["independent", "'the added'"]),
        (["Add a red hat.", "Put a red hat on.", "Remove the dog."], ["edits 1 and 2 say nearly the same"]),
    ],
)
def test_edits_that_are_not_three_independent_imperatives(edits, words):
    flags = "; ".join(rules.multi_flags(edits))
    assert all(word in flags for word in words), flags


def test_three_independent_imperatives():
    assert rules.multi_flags(["Add a hat to the man.", "Remove the dog.", "Paint the wall blue."]) == []


def test_overlap_is_the_share_of_runs_in_another_prompt():
    found = rules.overlaps({"a": "one two three four five", "b": "zero one two three four", "c": "six seven"})
    assert found == {"a": (0.5, "b"), "b": (0.5, "a"), "c": (0.0, "")}


def test_a_verb_that_is_too_common_is_flagged_from_where_it_is():
    edits = [(str(n), "Add a hat.") for n in range(4)] + [(str(n), "Move the hat.") for n in range(4, 10)]
    assert set(rules.common_verbs(edits, 0.5)) == {"9"}
    assert "'move' begins 6 of 10 edits, expected 50% at most" in rules.common_verbs(edits, 0.5)["9"]


def test_tokens_of_a_declared_tokenizer(tmp_path):
    import tokenizers

    found = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    found.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    found.enable_truncation(2)
    found.save(str(tmp_path / "tokenizer.json"))
    assert rules.token_counter(str(tmp_path))("a b, a b") == 4 and rules.token_counter("words")("a b, a b") == 5


@pytest.mark.bad_input
def test_what_is_no_tokenizer(refuses, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    refuses(lambda: rules.token_counter(str(tmp_path)), "is no tokenizer.json")
    refuses(lambda: rules.token_counter(str(tmp_path / "none.json")), "there is no such file")


# Answers


def test_answers_are_read_in_a_fence_and_between_words():
    answer = 'Here it is:\n```json\n{"prompt": "A  dog\\n sleeps."}\n```'
    assert drafting.READERS["t2i_long"](answer) == {"text": "A dog sleeps.", "parts": {}}
    edits = json.dumps({"edits": ["Add a hat", "Remove the dog!", "Paint the wall."]})
    assert drafting.READERS["edit_multi"](edits)["text"] == "Add a hat. Remove the dog! Paint the wall."
    slots = json.dumps({"prompt": "Two dogs.", "count": "Two", "color": 3})
    assert drafting.READERS["t2i_complex"](slots) == {"text": "Two dogs.", "parts": {"slots": {"count": "Two"}}}
    assert drafting.read_rubric('{"needs_reasoning": false}') == {"needs_reasoning": False, "why": ""}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "group, answer",
    [
        ("t2i_long", "A dog."),
        ("t2i_long", "} {"),
        ("t2i_long", '{"prompt": }'),
        ("t2i_long", '{"prompt": ""}'),
        ("t2i_long", '{"prompt": ["A dog."]}'),
        ("t2i_long", '{"prompt": "=SUM(A1)"}'),
        ("t2i_long", '{"prompt": "A \\u0007 bell."}'),
        ("t2i_long", '{"prompt": "half \\ud800 a character"}'),
        ("t2i_long", json.dumps({"prompt": "long " * 2000})),
        ("t2i_complex", '{"text": "Two dogs."}'),
        ("edit_multi", '{"edits": ["Add a hat.", "Remove it."]}'),
        ("edit_multi", '{"edits": ["Add a hat.", "Remove it.", 3]}'),
        ("edit_multi", '{"edits": {"1": "Add a hat."}}'),
        ("edit_complex", '{"instruction": null, "reasoning": "none"}'),
    ],
)
def test_answers_that_are_no_drafts(group, answer):
    with pytest.raises(Unparsed):
        drafting.READERS[group](answer)


@pytest.mark.bad_input
@pytest.mark.parametrize("answer", ["", "yes", '{"needs_reasoning": "yes"}', '{"needs_reasoning": 1}'])
def test_answers_that_are_no_judgement(answer):
    with pytest.raises(Unparsed):
        drafting.read_rubric(answer)


@pytest.mark.bad_input
def test_templates_that_lack_something(refuses, tmp_path):
    for name, text in drafting.read_templates("").items():
        (tmp_path / f"{name}.txt").write_text(text)
    assert drafting.read_templates(str(tmp_path)) == drafting.read_templates("")
    (tmp_path / "rubric.txt").write_text("Is it good?")
    refuses(lambda: drafting.read_templates(str(tmp_path)), "rubric.txt lacks the mark <instruction>")
    (tmp_path / "edit_multi.txt").unlink()
    refuses(lambda: drafting.read_templates(str(tmp_path)), "edit_multi.txt", "no such file")


# The page


def test_no_prompt_breaks_the_page(tmp_path):
    write_picture(tmp_path / "a.jpg", 0, size=(40, 40))
    prompt = "A </script> <b>dog</b> & a cat"
    row = {"item": "1/t2i_long", "draft_id": "0", "key": "a", "text": prompt, "parts": {}, "flags": ["<i>"]}
    image = {"image_id": 1, "file": str(tmp_path / "a.jpg"), "key": "<a>", "cluster": {"id": 0, "label": "<b>"}}
    page = review.page([row], [image], "sheet-0.csv")
    assert page.count("</script>") == 2 and "<b>dog" not in page and "<i>" not in page and "<a>" not in page
    data = page.partition("id=sheet>")[2].partition("</script>")[0]
    assert json.loads(data)["rows"][0]["prompt"] == prompt


# Embedding


def test_the_histogram_tells_pictures_and_words_apart(tmp_path):
    for name, color in (("red", "red"), ("also_red", "red"), ("blue", "blue")):
        Image.new("RGB", (50, 50), color).save(tmp_path / f"{name}.png")
    vector = lambda name, text: embedding.normalised(  # noqa: E731
        embedding.Histogram().vector(tmp_path / f"{name}.png", text, threading.Event())
    )
    first = vector("red", "a dog")
    np.testing.assert_allclose(first, vector("also_red", "a dog"))
    assert abs(np.linalg.norm(first) - 1) < 1e-6 and np.isfinite(first).all()
    assert first @ vector("blue", "a dog") < 0.9 and first @ vector("red", "the cat") < 0.9


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "answer",
    [b"", b"{}", b'{"data": []}', b'{"data": [{"embedding": "x"}]}', b'{"data": [{"embedding": [1, NaN]}]}',
     b'{"data": [{"embedding": [0, 0]}]}', b'{"data": [{"embedding": [[1, 2]]}]}', b'{"data": [{"embedding": [1]}]}'],
)  # fmt: skip
def test_answers_without_a_vector(answer):
    with pytest.raises(Retry, match="without a vector"):
        embedding.read_vector(answer)


def test_vectors_are_asked_of_the_endpoint_as_chat_messages(model, tmp_path):
    Image.new("RGB", (8, 8), "white").save(tmp_path / "a.png")
    served = embedding.Served(model.url, "gme", "secret")
    vector = served.vector(tmp_path / "a.png", "a dog", threading.Event())
    np.testing.assert_allclose(vector, np.full(48, 0.5), atol=1e-6)
    path, body, text, headers = model.bodies[-1]
    assert path == "/v1/embeddings" and body == {"model": "gme", "encoding_format": "float"} and text == "a dog"
    assert headers["Authorization"] == "Bearer secret"


def test_vectors_that_are_there_are_not_made_again(tmp_path):
    """A file whose last line was cut off by a kill: that vector alone is made again."""
    rows = [{"key": f"k{n}", "file": "", "sha256": str(n), "captions": ["a dog"]} for n in range(3)]

    class Counting:
        name, concurrency, made = "counting", 2, []

        def vector(self, path, text, stop):
            self.made.append(text)
            return np.array([3.0, 4.0])

    path = tmp_path / "vectors.jsonl"
    found = embedding.embed_all(Counting(), rows, path)
    assert len(Counting.made) == 3 and all(np.allclose(vector, [0.6, 0.8]) for vector in found.values())
    path.write_bytes(path.read_bytes()[:-5])
    assert len(embedding.embed_all(Counting(), rows, path)) == 3 and len(Counting.made) == 4
    rows[0]["captions"] = ["a cat"]
    embedding.embed_all(Counting(), rows, path)
    assert len(Counting.made) == 5


@pytest.mark.slow
def test_vectors_of_a_local_clip(tmp_path):
    """The image half and the text half are transformers' own features, each of length 1."""
    torch = pytest.importorskip("torch")
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision, text = (
        sizes | {"image_size": 32, "patch_size": 16},
        sizes | {"vocab_size": 50, "max_position_embeddings": 12},
    )
    config = transformers.CLIPConfig(vision_config=vision, text_config=text | {"eos_token_id": 1, "bos_token_id": 0},
                                     projection_dim=8)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1} | {c: n for n, c in enumerate("abcdefghijklmnop", 2)}
    vocabulary |= {f"{c}</w>": n for n, c in enumerate("abcdefghijklmnop", 20)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(pictures, tokenizer).save_pretrained(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / "a.png")

    local = embedding.open_embedder(str(tmp_path), "")
    found = local.vector(tmp_path / "a.png", "a bad " * 20, threading.Event())  # longer than the model can read
    assert found.shape == (16,) and np.allclose([np.linalg.norm(found[:8]), np.linalg.norm(found[8:])], 1, atol=1e-5)
    pixels = pictures(Image.open(tmp_path / "a.png"), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = model(pixel_values=pixels, input_ids=torch.tensor([[0, 1]])).image_embeds[0].numpy()
    np.testing.assert_allclose(found[:8], expected, atol=1e-5)
    assert not local.vector(tmp_path / "a.png", "", threading.Event())[8:].any()
    assert not np.allclose(found[8:], local.vector(tmp_path / "a.png", "a cab", threading.Event())[8:])


@pytest.mark.bad_input
def test_what_is_no_embedder(refuses, tmp_path):
    refuses(lambda: embedding.open_embedder("", ""), "--embedder is not given", "histogram")
    refuses(lambda: embedding.open_embedder("nowhere", ""), "--embedder is nowhere")
    refuses(lambda: embedding.open_embedder("http://localhost:1/v1", ""), "needs --embedder-model=NAME")
    (tmp_path / "vectors.jsonl").write_text("{}\n")
    refuses(lambda: embedding.read_vectors(tmp_path / "vectors.jsonl"), "line 1 is no vector")
