"""Models of the transformers library that score images: detectors, CLIP, answerers of questions. They need PyTorch."""

import importlib.util
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from unialign_jax.evaluation import objects
from unialign_jax.evaluation.objects import Detector, Found, Objects
from unialign_jax.files import first_line

# What models that were trained on COCO call GenEval's classes, where they call them otherwise.
COCO_NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


def need_torch(what: str) -> None:
    """Raises ValueError where PyTorch is not installed.

    Args:
      what: needs it.
    """
    if importlib.util.find_spec("torch") is None:
        raise ValueError(f"{what} needs PyTorch, which is not installed here: pip install torch")


def load(what: str, name: str, load_model: Callable, load_processor: Callable):
    """(model in evaluation mode on the best device, processor) of a name on the Hugging Face Hub, or a folder.

    Args:
      what: the option that gave the name, for messages.
      load_model, load_processor: get the name.

    Raises ValueError, in one line, without PyTorch, and for a model that cannot be loaded.
    """
    need_torch(f"{what}={name}")
    import torch

    try:
        model, processor = load_model(name), load_processor(name)
    except Exception as error:  # the library raises many kinds
        raise ValueError(
            f"{what}={name} cannot be loaded: {first_line(error)}; expected a folder, or a name on the Hugging Face "
            "Hub if this machine reaches it"
        ) from None
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor


def open_detector(name: str, classes: Sequence[str]) -> Detector:
    """A detector of boxes (DETR, YOLOS, ...) or of masks (Mask2Former, MaskFormer) that was trained on COCO.

    Args:
      classes: GenEval's names of the classes that must be among its labels.

    Raises ValueError for a model of another kind, or without one of the classes.
    """
    need_torch(f"--detector={name}")
    import torch
    import transformers

    def load_model(name):
        config = transformers.AutoConfig.from_pretrained(name)
        kind = (config.architectures or [""])[0]
        if kind.endswith("ForObjectDetection"):
            return transformers.AutoModelForObjectDetection.from_pretrained(name)
        if kind.endswith(("ForUniversalSegmentation", "ForInstanceSegmentation")):
            return transformers.AutoModelForUniversalSegmentation.from_pretrained(name)
        raise ValueError(f"it is a {kind or config.model_type}, no detector of objects")

    model, processor = load("--detector", name, load_model, transformers.AutoImageProcessor.from_pretrained)
    labels = {index: COCO_NAMES.get(label, label) for index, label in model.config.id2label.items()}
    lacking = sorted(set(classes) - set(labels.values()))
    if lacking:
        raise ValueError(
            f"--detector={name} does not know {', '.join(lacking[:5])}"
            f"{f' and {len(lacking) - 5} more' if len(lacking) > 5 else ''}: expected a detector trained on COCO"
        )
    gives_boxes = hasattr(processor, "post_process_object_detection") and type(model).__name__.endswith("Detection")
    options = {"threshold": objects.CONFIDENCE}

    def detect(image: Image.Image) -> Objects:
        inputs = processor(images=image, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            outputs = model(**inputs)
        size = [(image.height, image.width)]
        if gives_boxes:
            [result] = processor.post_process_object_detection(outputs, target_sizes=size, **options)
            found = [
                (int(label), Found(tuple(box.tolist()), float(score)))
                for label, box, score in zip(result["labels"], result["boxes"], result["scores"], strict=True)
            ]
        else:
            [result] = processor.post_process_instance_segmentation(
                outputs, target_sizes=size, return_binary_maps=True, **options
            )
            # Without a segment it is one map of -1, which `zip` leaves out.
            masks = result["segmentation"].cpu().numpy().astype(bool)
            found = [
                (segment["label_id"], Found(box_of(mask), float(segment["score"]), mask))
                for segment, mask in zip(result["segments_info"], masks, strict=False)
            ]
        by_name: Objects = {}
        for label, thing in found:
            by_name.setdefault(labels[label], []).append(thing)
        return by_name

    return detect


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The box around a mask: left, top, and right and bottom behind its last pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class Clip:
    """CLIP: unit vectors of images and texts."""

    def __init__(self, what: str, name: str):
        need_torch(f"{what}={name}")
        import transformers

        self._model, self._processor = load(
            what, name, transformers.CLIPModel.from_pretrained, transformers.CLIPProcessor.from_pretrained
        )

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """float32 [images, width]."""
        return self._features(self._model.get_image_features, images=[image.convert("RGB") for image in images])

    def is_cut(self, text: str) -> bool:
        """Whether a text is longer than CLIP reads."""
        return (
            len(self._processor.tokenizer(text)["input_ids"]) > self._model.config.text_config.max_position_embeddings
        )

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, width]; what is behind CLIP's last position is not read."""
        most = self._model.config.text_config.max_position_embeddings
        read = {"padding": True, "truncation": True, "max_length": most}
        return self._features(self._model.get_text_features, text=list(texts), **read)

    def _features(self, method, **inputs):
        import torch

        inputs = self._processor(return_tensors="pt", **inputs).to(self._model.device)
        with torch.inference_mode():
            features = method(**inputs)
        features = getattr(features, "pooler_output", features)
        return unit(features.float().cpu().numpy())


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def color_reader(clip: Clip) -> objects.ColorReader:
    """GenEval's reader of colors: the one whose mean over the templates is the nearest to an object's crop."""
    classifiers = {}

    def read(image: Image.Image, found: Sequence[Found], name: str) -> list[str]:
        if name not in classifiers:
            texts = [
                template.format(color=color, name=name) for color in objects.COLORS for template in objects.TEMPLATES
            ]
            vectors = clip.texts(texts).reshape(len(objects.COLORS), len(objects.TEMPLATES), -1)
            classifiers[name] = unit(vectors.mean(1))
        nearest = (clip.images([objects.crop(image, thing) for thing in found]) @ classifiers[name].T).argmax(1)
        return [objects.COLORS[index] for index in nearest]

    return read


def open_answerer(name: str) -> Callable[[Image.Image, str], str]:
    """A model that answers questions about images: ViLT, BLIP, or one that chats, such as Qwen2.5-VL.

    Raises ValueError for a model of another kind.
    """
    need_torch(f"--vqa={name}")
    import torch
    import transformers

    def load_model(name):
        config = transformers.AutoConfig.from_pretrained(name)
        kind = (config.architectures or [""])[0]
        if kind in ("ViltForQuestionAnswering", "BlipForQuestionAnswering"):
            return getattr(transformers, kind).from_pretrained(name)
        if kind.endswith("ForConditionalGeneration"):
            return transformers.AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
        raise ValueError(f"it is a {kind or config.model_type}, which answers no questions about images")

    model, processor = load("--vqa", name, load_model, transformers.AutoProcessor.from_pretrained)
    classifies = type(model).__name__ == "ViltForQuestionAnswering"
    chats = getattr(processor, "chat_template", None) is not None

    def answer(image: Image.Image, question: str) -> str:
        text = question
        if chats:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=image, text=text, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            if classifies:
                return model.config.id2label[int(model(**inputs).logits.argmax(-1))]
            made = model.generate(**inputs, max_new_tokens=10, do_sample=False)
        skipped = inputs["input_ids"].shape[1] if chats else 0
        return processor.batch_decode(made[:, skipped:], skip_special_tokens=True)[0].strip()

    return answer
