"""The files of the benchmarks that anyone may download, as data: where they lie, their sizes and hashes.

`launch/evaluate.py fetch` downloads them, and reports say whether a run used them. Addresses name a commit where
there are commits. A hash that is missing was not known when this was written: size and format alone are checked then.
"""

import dataclasses
import functools
import json
from pathlib import Path

_RAW = "https://raw.githubusercontent.com"
_MMBENCH = "https://opencompass.openxlab.space/utils/benchmarks/MMBench"
_SEMGEN = f"{_RAW}/glimmer16/UniAlignment/ed20eb74b5f3d7f8f16a8e85d65192faa46fecd8/SemGen-Bench/benchmark"
_VIESCORE = f"{_RAW}/TIGER-AI-Lab/VIEScore/2cbea4e8ce57/viescore/prompts_raw"


@dataclasses.dataclass(frozen=True)
class OfficialFile:
    """A file of a benchmark.

    Attributes:
      path: in the user's folder of data.
      url: where it is.
      licence: of the file, in words.
      size: bytes; None where it is not known.
      sha256, md5, git_blob: hashes in hexadecimal; "" where not known. That of a Git blob may be its beginning alone.
    """

    path: str
    url: str
    licence: str
    size: int | None = None
    sha256: str = ""
    md5: str = ""
    git_blob: str = ""

    @property
    def is_hashed(self) -> bool:
        """Whether a hash says that a download is the official file."""
        return bool(self.sha256 or self.md5 or self.git_blob)


def _semgen_images() -> list[OfficialFile]:
    found = json.loads(Path(__file__).with_name("semgen_images.json").read_text())
    licence = "photographs of COCO, under the terms of their Flickr pages"
    return [
        OfficialFile(f"images/{name}", f"{_SEMGEN}/images/{name}", licence, size, digest)
        for name, (size, digest) in found.items()
    ]


def _viescore() -> list[OfficialFile]:
    context = ("context_no_delimit.txt", 403, "446482c9035af15092f48235470d6daf29c9930e3f9faa2cd0f722363c74adde")
    rules = (
        ("tie_rule_SC.txt", 769, "5b9aa479977bc3175329e9ee14d75b55773080e87e3e2181721985be30db6cc6"),
        ("t2i_rule_SC.txt", 328, "8d74dbc9de223d9fb17166c2c2911094cf9d25e90fb00eccfd2b8d3b217389ce"),
        ("rule_PQ.txt", 780, "cd929b5619a3ad9311e3054b80afca75f8ee407be89345c324be0b0ca8b5c96b"),
        ("one_image_gen_rule.txt", 149, "8e4b9821913be8c340c3d083b6d9afd6a32f00365420c553102ab664775a70a0"),
        ("two_image_edit_rule.txt", 338, "369c6b21479e6a853ffe85b11186c9d5ee3ef7388b8c9b5866a434bf113d0f8f"),
    )
    rows = [context, *((f"prompts_0shot/{name}", size, digest) for name, size, digest in rules)]
    return [OfficialFile(f"viescore/{name}", f"{_VIESCORE}/{name}", "MIT", size, digest) for name, size, digest in rows]


@functools.cache
def of_suite(suite: str) -> tuple[OfficialFile, ...]:
    """The files of a suite that can be downloaded."""
    return tuple(_FILES.get(suite, list)())


def sha256_of(suite: str) -> dict[str, str]:
    """{name without folders: SHA-256} of those that are known."""
    return {Path(file.path).name: file.sha256 for file in of_suite(suite) if file.sha256}


_FILES = {
    "semgen": lambda: [
        OfficialFile(
            "semgen_bench.jsonl",
            f"{_SEMGEN}/semgen_bench.jsonl",
            "MIT",
            172251,
            "283526686ecad80dd56c618669ab97dc893a1f553b3b712e56766e149678c00c",
        ),
        *_viescore(),
        *_semgen_images(),
    ],
    "geneval": lambda: [
        OfficialFile(
            "evaluation_metadata.jsonl",
            f"{_RAW}/djghosh13/geneval/af4902f24d3c/prompts/evaluation_metadata.jsonl",
            "MIT",
            85209,
            "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
        ),
        OfficialFile(
            "object_names.txt",
            f"{_RAW}/djghosh13/geneval/af4902f24d3c/evaluation/object_names.txt",
            "MIT",
            642,
            "608f6a0e5c8ca1c7a92b818430141fe268c85b7930b50f4160f1d65893b5bacd",
        ),
        OfficialFile(
            "evaluation_metadata_long.jsonl",
            f"{_RAW}/ByteDance-Seed/Bagel/056b5fd51a88/eval/gen/geneval/prompts/evaluation_metadata_long.jsonl",
            "Apache-2.0 (BAGEL), of MIT (GenEval)",
            397873,
        ),
    ],
    "dpg": lambda: [
        OfficialFile(
            "prompts.json",
            f"{_RAW}/open-compass/GenEditEvalKit/103b2839a92c/benchmarks/dpgbench/eval_prompts/dpgbench_prompts.json",
            "MIT (GenEditEvalKit), of Apache-2.0 (ELLA)",
            462868,
        ),
        OfficialFile(
            "dpg_bench.csv",
            f"{_RAW}/TencentQQGYLab/ELLA/3c228f1dc6c4/dpg_bench/dpg_bench.csv",
            "Apache-2.0",
            git_blob="98457fc9",
        ),
    ],
    "gedit": _viescore,
    "imgedit": lambda: [
        OfficialFile(
            "basic_edit.json",
            f"{_RAW}/PKU-YuanGroup/ImgEdit/547185d12c08/Benchmark/Basic/basic_edit.json",
            "none stated in the repository",
            138282,
        ),
        OfficialFile(
            "prompts.json",
            f"{_RAW}/PKU-YuanGroup/ImgEdit/547185d12c08/Benchmark/Basic/prompts.json",
            "none stated in the repository",
            19535,
        ),
    ],
    "mmbench": lambda: [
        OfficialFile(
            "MMBench_DEV_EN.tsv",
            f"{_MMBENCH}/MMBench_DEV_EN.tsv",
            "Apache-2.0 (MMBench); its pictures are of many sources",
            md5="b6caf1133a01c6bb705cf753bb527ed8",
        ),
        OfficialFile(
            "multiple_choice.py",
            f"{_RAW}/open-compass/VLMEvalKit/e8e78f05f308/vlmeval/dataset/utils/multiple_choice.py",
            "Apache-2.0; for --judge-prompt, it is read and not run",
        ),
    ],
    "mmmu": lambda: [
        OfficialFile(
            "answer_dict_val.json",
            f"{_RAW}/MMMU-Benchmark/MMMU/bb0b95a94599/mmmu/answer_dict_val.json",
            "Apache-2.0",
            102911,
            "76080f5597b8f4d29abba8551489c4b82e4a285b9d62b946fd67a1952e95502c",
        ),
    ],
    "mmvet": lambda: [
        OfficialFile(
            "mm-vet_evaluator.py",
            f"{_RAW}/yuweihao/MM-Vet/acde843e02da/mm-vet_evaluator.py",
            "Apache-2.0; for --judge-prompt, it is read and not run",
        ),
    ],
}

# What `fetch` does not bring, and how to get it.
ELSEWHERE = {
    "geneval": (
        "The weights of the official detector (Mask2Former Swin-S of the mmdet v2.0 zoo, open_clip ViT-L-14): see the "
        "README of github.com/djghosh13/geneval.",
    ),
    "geneval2": (
        "Prompts and questions: geneval2_data.jsonl of github.com/facebookresearch/GenEval2 (CC BY-NC 4.0: no "
        "commercial use): read the licence, then download it there.",
    ),
    "dpg": ("The official answerer, damo/mplug_visual-question-answering_coco_large_en, is downloaded by modelscope.",),
    "gedit": (
        "Instructions and pictures: huggingface.co/datasets/stepfun-ai/GEdit-Bench (MIT by its card), Parquet: "
        "hf download stepfun-ai/GEdit-Bench --repo-type dataset --local-dir DIR",
    ),
    "imgedit": (
        "Source pictures: Benchmark.tar of huggingface.co/datasets/sysuyy/ImgEdit (no licence stated; photographs of "
        "LAION): hf download sysuyy/ImgEdit Benchmark.tar --repo-type dataset --local-dir DIR; then tar -xf "
        "Benchmark.tar. The basic_edit.json of GenEditEvalKit differs in 57 prompts: use the one that this command "
        "brings.",
    ),
    "mmbench": (
        "Other splits and versions (V11, TEST, CN) lie beside it, by the names of VLMEvalKit; answers of TEST are "
        "scored by mmbench.opencompass.org.cn alone.",
    ),
    "mmmu": (
        "Questions and pictures: huggingface.co/datasets/MMMU/MMMU (Apache-2.0), Parquet, a folder for each subject: "
        "hf download MMMU/MMMU --repo-type dataset --local-dir DIR",
    ),
    "mmvet": (
        "Questions and pictures: mm-vet.zip of the releases of github.com/yuweihao/MM-Vet (CC BY-NC 4.0: no "
        "commercial use): read the licence, then https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip",
    ),
    "captions": ("The references are your own: a JSONL of pictures and captions.",),
}
