"""Models of transformers as scorers: tiny ones, whose heads are set so that the answer is known."""

import json

import numpy as np
import pytest
from PIL import Image

from unialign_jax.evaluation import torch_models
from unialign_jax.evaluation.objects import COLORS, Found, confident

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8))
NAMES = ["person", "motorbike", "car"]


class ColorsThemselves:
    """In place of CLIP: an image's vector is its mean color, a text's that of the color it names."""

    def __init__(self):
        self.read = []

    def images(self, images):
        return torch_models.unit(np.stack([np.asarray(image, np.float32).mean((0, 1)) + 1 for image in images]))

    def texts(self, texts):
        self.read += texts
        named = [next(color for color in COLORS if f" {color}" in text) for text in texts]
        pixels = [Image.new("RGB", (1, 1), color).getpixel((0, 0)) for color in named]
        return torch_models.unit(np.array(pixels, np.float32) + 1)


def test_colors_are_read_from_the_crop_alone():
    clip = ColorsThemselves()
    read = torch_models.color_reader(clip)
    image = Image.new("RGB", (20, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    things = [Found((0.0, 0.0, 10.0, 10.0), 0.9), Found((10.0, 0.0, 20.0, 10.0), 0.8)]
    assert read(image, things, "cow") == ["red", "blue"]
    assert len(clip.read) == 30 and clip.read[:3] == [
        "a photo of a red cow",
        "a photo of a red-colored cow",
        "a photo of a red object",
    ]
    read(image, things, "cow")
    assert len(clip.read) == 30  # a class's texts are read once


def test_the_box_of_a_mask_ends_behind_its_last_pixel():
    mask = np.zeros((10, 20), bool)
    mask[2:5, 7:11] = True
    assert torch_models.box_of(mask) == (7.0, 2.0, 11.0, 5.0)


@pytest.mark.bad_input
def test_without_pytorch(monkeypatch, refuses):
    monkeypatch.setattr(torch_models.importlib.util, "find_spec", lambda name: None)
    refuses(lambda: torch_models.open_detector("a/model", ["cow"]), "--detector=a/model needs PyTorch", "pip install")


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory):
    """A Mask2Former of random weights all of whose six queries are sure of the class "car"."""
    torch = pytest.importorskip("torch")
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32,
        embed_dim=16,
        depths=[1] * 4,
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=[f"stage{number}" for number in (1, 2, 3, 4)],
    )
    sizes = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
    config = Mask2FormerConfig(
        backbone_config=backbone,
        **sizes,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=6,
        id2label=dict(enumerate(NAMES)),
        label2id={name: index for index, name in enumerate(NAMES)},
    )
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.zero_()
        model.class_predictor.bias.copy_(torch.tensor([-20.0, -20.0, 20.0, -20.0]))
        model.model.transformer_module.decoder.mask_predictor.mask_embedder.layers[-1].layers[0].weight.mul_(
            50
        )  # sure masks
    folder = tmp_path_factory.mktemp("mask2former")
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_detector_of_masks(detector_folder):
    detect = torch_models.open_detector(str(detector_folder), ["motorcycle", "car"])
    found = detect(IMAGE)
    assert set(found) == {"car"} and 1 <= len(found["car"]) <= 6
    for thing in found["car"]:
        assert thing.mask.shape == (48, 80) and thing.box == torch_models.box_of(thing.mask)
        assert 0.5 <= thing.confidence <= 1  # the class is sure; within its mask every pixel has more than a half
    assert set(confident(found, "colors")) == {"car"}


@pytest.mark.slow
def test_a_detector_that_sees_nothing(detector_folder, tmp_path):
    import shutil

    import torch
    from transformers import Mask2FormerForUniversalSegmentation

    shutil.copytree(detector_folder, tmp_path / "blind")
    model = Mask2FormerForUniversalSegmentation.from_pretrained(detector_folder)
    with torch.no_grad():
        model.class_predictor.bias.copy_(torch.tensor([-20.0, -20.0, -20.0, 20.0]))  # the last is "nothing"
    model.save_pretrained(tmp_path / "blind")
    assert torch_models.open_detector(str(tmp_path / "blind"), ["car"])(IMAGE) == {}


@pytest.mark.slow
@pytest.mark.bad_input
def test_detectors_of_something_else(detector_folder, tmp_path, refuses):
    refuses(lambda: torch_models.open_detector(str(detector_folder), ["car", "zebra"]), "does not know zebra", "COCO")
    refuses(lambda: torch_models.open_detector(str(tmp_path / "nothing"), ["car"]), "--detector", "cannot be loaded")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    refuses(lambda: torch_models.open_detector(str(tmp_path), ["car"]), "BertForMaskedLM", "no detector")


@pytest.mark.slow
def test_a_detector_of_boxes(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=3,
        id2label=dict(enumerate(NAMES)),
        label2id={name: index for index, name in enumerate(NAMES)},
    )
    model = YolosForObjectDetection(config)
    with torch.no_grad():
        for layer in (model.class_labels_classifier.layers[-1], model.bbox_predictor.layers[-1]):
            layer.weight.zero_()
        # "motorbike" with the odds e^2 to one, in a box at the centre that has half of each side.
        model.class_labels_classifier.layers[-1].bias.copy_(torch.tensor([-30.0, 2.0, -30.0, 0.0]))
        model.bbox_predictor.layers[-1].bias.zero_()
    model.save_pretrained(tmp_path)
    YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(tmp_path)
    found = torch_models.open_detector(str(tmp_path), ["motorcycle"])(IMAGE)
    assert list(found) == ["motorcycle"] and len(found["motorcycle"]) == 3
    for thing in found["motorcycle"]:
        assert thing.box == pytest.approx((20, 12, 60, 36), abs=1e-3) and thing.mask is None
        assert thing.confidence == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-4)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of random weights with a tokenizer of letters."""
    torch = pytest.importorskip("torch")
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz-"
    units = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({unit: index for index, unit in enumerate(units)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    width = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(units) - 2, "eos_token_id": len(units) - 1, "pad_token_id": len(units) - 1}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=width | {"vocab_size": len(units), "max_position_embeddings": 24} | ends,
        vision_config=width | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_clip_gives_unit_vectors_as_the_model_compares_them(clip_folder):
    """Their products are the model's own logits of a whole forward, but for its scale."""
    import torch
    from transformers import CLIPModel, CLIPProcessor

    clip = torch_models.Clip("--color-model", str(clip_folder))
    images, texts = (
        [IMAGE, Image.new("RGB", (20, 40), "red")],
        ["a red cow", "a text that is much longer than the model reads"],
    )
    products = clip.images(images) @ clip.texts(texts).T
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True, truncation=True, max_length=24)
    with torch.no_grad():
        expected = (model(**inputs).logits_per_image / model.logit_scale.exp()).numpy()
    np.testing.assert_allclose(products, expected, atol=1e-5)
    colors = torch_models.color_reader(clip)(IMAGE, [Found((0.0, 0.0, 40.0, 40.0), 0.9)] * 2, "cow")
    assert len(colors) == 2 and colors[0] == colors[1] and colors[0] in COLORS


@pytest.mark.slow
def test_a_model_that_answers_questions(tmp_path, refuses):
    torch = pytest.importorskip("torch")
    from transformers import BertTokenizer, ViltConfig, ViltForQuestionAnswering, ViltImageProcessor, ViltProcessor

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "there", "?"]))
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    answers = {0: "no", 1: "yes"}
    config = ViltConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        id2label=answers,
        label2id={name: index for index, name in answers.items()},
    )
    model = ViltForQuestionAnswering(config)
    with torch.no_grad():
        model.classifier[-1].weight.zero_()
        model.classifier[-1].bias.copy_(torch.tensor([-1.0, 1.0]))
    model.save_pretrained(tmp_path)
    ViltProcessor(ViltImageProcessor(size={"shortest_edge": 32}), tokenizer).save_pretrained(tmp_path)
    assert torch_models.open_answerer(str(tmp_path))(IMAGE, "is there a cow?") == "yes"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    refuses(lambda: torch_models.open_answerer(str(tmp_path / "other")), "--vqa", "BertModel")


@pytest.mark.slow
def test_a_model_that_chats_says_its_own_words_alone(tmp_path):
    """A LLaVA whose every next token is "yes": the question and the image's tokens are not among what it says."""
    torch = pytest.importorskip("torch")
    import tokenizers
    import transformers

    words = {word: index for index, word in enumerate(["<pad>", "<image>", "</s>", "yes", "<unk>", "is", "there", "?"])}
    units = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    units.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    units.add_special_tokens(["<pad>", "<image>", "</s>"])
    named = {"eos_token": "</s>", "pad_token": "<pad>", "extra_special_tokens": {"image_token": "<image>"}}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=units, **named)
    width = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**width, image_size=32, patch_size=16),
        text_config=transformers.LlamaConfig(**width, vocab_size=len(words), **ends),
        image_token_id=1,
        vision_feature_layer=-1,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        text = model.model.language_model
        text.embed_tokens.weight.fill_(1)  # and nothing is added to it, so the last hidden state is positive
        text.layers[0].self_attn.o_proj.weight.zero_()
        text.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[words["yes"]] = 1
    model.save_pretrained(tmp_path)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    part = "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    template = f"{{% for part in messages[0]['content'] %}}{part}{{% endfor %}}"
    transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(tmp_path)
    assert torch_models.open_answerer(str(tmp_path))(IMAGE, "is there ?") == " ".join(["yes"] * 10)
