"""Published values of the benchmarks, as data: whose, where they were read, and what they were measured with.

They are copied, not measured here. Most papers take the rows of others from other papers, with judges and prompts that
differ. A value says how it was measured where that is known, and COMPARABLE what must agree for a comparison.
"""

import dataclasses

# Where a value was read; the last two are not to be relied on.
SOURCES = {
    "P": "UniAlignment's paper (arXiv 2509.23760)",
    "O": "README of Ovis-U1",
    "B": "README of BAGEL",
    "L": "README of LongCat-Image",
    "Z": "text of Z-Image's paper",
    "D": "tables of DeepGen's paper",
    "LU": "text of Lumina-DiMOO's paper",
    "S": "notes of a third party",
    "U": "from memory, not checked",
}
REWRITTEN = "prompts rewritten by a language model"


@dataclasses.dataclass(frozen=True)
class Published:
    """A published value.

    Attributes:
      suite, figure: what it is a value of; the figure is the suite's leading one where it is "".
      model: whose.
      value: on the scale of SCALES.
      source: a key of SOURCES; "" where several papers have it and none is the first.
      setting: how it was measured, where that is not the benchmark's usual way.
      note: what is wrong or doubtful.
    """

    suite: str
    model: str
    value: float
    source: str = ""
    setting: str = ""
    note: str = ""
    figure: str = ""

    @property
    def where(self) -> str:
        """Its source in words."""
        return SOURCES[self.source] if self.source else "several papers, the first not known"


# The highest value on the scale of the published figures.
SCALES = {
    "semgen": 10.0,
    "geneval": 1.0,
    "dpg": 100.0,
    "gedit": 10.0,
    "imgedit": 5.0,
    "mmbench": 100.0,
    "mmmu": 100.0,
    "mmvet": 100.0,
}

# What a run must share with a published value to be compared with it.
COMPARABLE = {
    "semgen": (
        "Only with Qwen2.5-VL-72B-Instruct-AWQ as the judge, in official mode, which judges the text-to-image items as "
        "if they were edits. The paper is the only source; it calls SC IC, t2i_complex T2I-Sem, edit_complex Edit-Sem."
    ),
    "geneval": (
        "Only with the official detector (Mask2Former Swin-S) and the same prompts: values with rewritten prompts are "
        "higher and marked. Another detector gives other numbers."
    ),
    "dpg": (
        "Only with mPLUG-large as the answerer. Repeated measurements of one model differ from papers by 1 to 6 points "
        "(81.5 for 83.5 of Infinity, 82.3 for 87.65 of X-Omni)."
    ),
    "gedit": (
        "Only with the same judge: most values are by GPT-4.1, which drifts (0.1 between runs, 6.97 for 7.50 scored "
        "again); the judge that can be repeated is Qwen2.5-VL-72B-Instruct-AWQ. VLMEvalKit and lmms-eval average over "
        "items, not over the 11 groups."
    ),
    "imgedit": (
        "Only with the same judge: gpt-4o-2024-08-06 at first, gpt-4.1 for the present list, gpt-4o-2024-11-20 in "
        "BAGEL's. The papers average over the nine types; BAGEL's script averages over all items (3.28 for 3.20)."
    ),
    "mmbench": (
        "Which of MMBench's versions and splits the paper used is not stated; values of TEST come from the official "
        "server alone."
    ),
    "mmmu": (
        "VLMEvalKit makes choices of the open questions and asks a judge: about 4 points above the official parsing "
        "for one model (54.78 for 50.67). BAGEL's value uses chain of thought and GPT-4o for the open answers."
    ),
    "mmvet": (
        "The official judge is gpt-4-0613, the mean of five runs; VLMEvalKit's is gpt-4-turbo, and BAGEL's value "
        "comes from the official server."
    ),
}

# What is wrong in the tables of UniAlignment's paper, so that nobody copies it unread.
ERRORS = {
    "geneval": (
        "In the paper's tables SD3-medium has GenEval 0.62 (Table 1) and 0.74 (Table 2), FLUX .66 and .67.",
        "Its row of Janus-Pro mixes sizes: GenEval and DPG-Bench are of 7B, MMBench 75.5, MMMU 36.3 and MM-Vet 39.8 "
        "of 1B.",
    ),
    "dpg": (
        "In the paper's row of Janus-Pro, GenEval and DPG-Bench are of 7B, the benchmarks of understanding of 1B.",
    ),
    "gedit": (
        "The paper says that its SC on GEdit-Bench is the highest: its table has 7.25, and BAGEL 7.36.",
        "It ranks second there only beside the old Step1X-Edit (6.70); OmniGen2 has 6.41 in one table, 6.42 in "
        "another.",
    ),
    "imgedit": ("Most rows of the paper's table are copied from other papers, with judges that differ.",),
    "mmbench": (
        "In the paper's row of LLaVA-1.5, MMBench 36.4 and MMMU 67.8 are swapped.",
        "Its Janus-Pro here is 1B (75.5); 7B has 79.2 by BAGEL's README.",
    ),
    "mmmu": (
        "In the paper's row of LLaVA-1.5, MMBench 36.4 and MMMU 67.8 are swapped.",
        "Its Janus-Pro here is 1B (36.3); 7B has 41.0 by BAGEL's README.",
        "61.3 is above BAGEL's 7B + 7B with chain of thought and above Qwen2.5-VL-7B (58.6), for a model of 2B "
        "without a language model; no code of its evaluation is released. Treat it as not reproduced.",
    ),
    "mmvet": (
        "Its Janus-Pro here is 1B (39.8); 7B has 50.0 by BAGEL's README.",
        "63.0 comes without code of its evaluation. Treat it as not reproduced.",
    ),
}


def _rows(suite: str, *rows: tuple) -> list[Published]:
    return [Published(suite, *row) for row in rows]


PUBLISHED = (
    *_rows(
        "geneval",
        ("UniAlignment", 0.81, "P"),
        ("DualDiffusion", 0.65, "P"),
        ("SD3-medium", 0.62, "P", "", "the paper's other table has 0.74"),
        ("BAGEL", 0.82, "B"),
        ("BAGEL", 0.88, "B", REWRITTEN),
        ("OmniGen2", 0.77, "P"),
        ("OmniGen2", 0.80, "O"),
        ("OmniGen2", 0.86, "O", REWRITTEN),
        ("UniWorld-V1", 0.80, "O"),
        ("UniWorld-V1", 0.84, "O", REWRITTEN),
        ("Janus-Pro-7B", 0.80),
        ("Show-o2-7B", 0.76, "D"),
        ("MMaDA", 0.63, "U"),
        ("UniDisc", 0.42, "U"),
        ("Muddit 1B", 0.61, "S"),
        ("MF-1 1.6B", 0.821, "S"),
        ("Ovis-U1 3B", 0.89, "O"),
        ("Lumina-DiMOO 8B", 0.88, "D"),
        ("Qwen-Image", 0.87, "L"),
        ("Qwen-Image, after reinforcement learning", 0.91, "U"),
        ("LongCat-Image 6B", 0.87, "L"),
        ("DeepGen 1.0 3B+2B, fine-tuned", 0.86, "D"),
        ("DeepGen 1.0 3B+2B, after reinforcement learning", 0.87, "D"),
        ("LLaDA2.0-Uni 16B", 0.89, "S"),
        ("LaViDa-O", 0.89, "S"),
        ("BLIP3o-NEXT", 0.91, "S"),
        ("UniDFlow", 0.95, "S"),
    ),
    *_rows(
        "dpg",
        ("UniAlignment", 85.64, "P"),
        ("DualDiffusion", 81.3, "P"),
        ("SD3-medium", 84.1, "P"),
        ("BAGEL", 85.07),
        ("Show-o2", 86.14, "D"),
        ("Lumina-DiMOO", 86.04, "D"),
        ("LongCat-Image", 86.80, "L"),
        ("X-Omni", 87.65, "D", "", "measured again by others: 82.3"),
        ("LLaDA2.0-Uni", 87.76, "S"),
        ("DeepGen 1.0, fine-tuned", 87.05, "D"),
        ("DeepGen 1.0, after reinforcement learning", 87.90, "D"),
        ("Z-Image", 88.14, "Z"),
        ("Qwen-Image", 88.32, "L"),
        ("Ovis-U1", 83.72, "O"),
        ("MF-1", 83.44, "S"),
        ("BLIP3o-NEXT", 82.05, "S"),
        ("UniDFlow", 91.19, "S"),
    ),
    *_rows(
        "imgedit",
        ("UniAlignment", 3.25, "P"),
        ("BAGEL", 3.20),
        ("OmniGen2", 3.44),
        ("UniWorld-V1", 3.26),
        ("SenseNova-U1", 3.90, "S"),
        ("Ovis-U1", 4.00, "O"),
        ("DeepGen 1.0, fine-tuned", 4.09, "D"),
        ("DeepGen 1.0, after reinforcement learning", 4.14, "D"),
        ("GPT-Image-1", 4.20, "Z"),
        ("Qwen-Image-Edit", 4.27, "Z"),
        ("Qwen-Image-Edit-2509", 4.35, "Z"),
        ("Z-Image-Edit", 4.30, "Z"),
        ("UniWorld-V2", 4.49, "Z"),
        ("LongCat-Image-Edit", 4.50, "D"),
        ("SenseNova-U1.5", 4.59, "S"),
    ),
    *_rows(
        "gedit",
        ("UniAlignment", 6.57, "P"),
        ("BAGEL", 6.52),
        ("OmniGen2", 6.41),
        ("Ovis-U1", 6.42, "O"),
        ("Step1X-Edit v1.0", 6.70),
        ("Step1X-Edit, later", 6.97, "Z"),
        ("DeepGen 1.0, fine-tuned", 7.12, "D"),
        ("DeepGen 1.0, after reinforcement learning", 7.17, "D"),
        ("GPT-Image-1", 7.53),
        ("Qwen-Image-Edit", 7.56, "Z"),
        ("Z-Image-Edit", 7.57, "Z"),
        ("LongCat-Image-Edit", 7.60, "D"),
        ("UniWorld-V2", 7.83, "Z"),
    ),
    *_rows(
        "mmbench",
        ("UniAlignment", 80.6, "P"),
        ("BAGEL", 85.0, "B"),
        ("Lumina-DiMOO", 84.5, "LU"),
        ("UniWorld-V1, BLIP3-o", 83.5, "LU"),
        ("Show-o2", 79.3, "S"),
        ("Janus-Pro-7B", 79.2, "B"),
        ("Ovis-U1", 77.8, "O"),
        ("MMaDA", 68.5, "LU"),
        ("MF-1", 67.2, "S"),
        ("UniDFlow", 91.2, "S", "version 1.1"),
    ),
    *_rows(
        "mmmu",
        ("UniAlignment", 61.3, "P", "", "not reproduced: no code of its evaluation is released"),
        ("Lumina-DiMOO", 58.6, "LU"),
        ("UniWorld-V1", 58.6, "P", "", "that of its frozen Qwen2.5-VL"),
        ("BAGEL", 55.3, "", "chain of thought; GPT-4o for open answers"),
        ("OmniGen2", 53.1),
        ("Ovis-U1", 51.1, "O"),
        ("BLIP3-o", 50.6, "LU"),
        ("LLaDA2.0-Uni", 50.1, "S"),
        ("Show-o2", 48.9, "S"),
        ("Janus-Pro-7B", 41.0, "B"),
        ("MMaDA", 30.2, "LU"),
        ("UniDFlow", 74.3, "S"),
    ),
    *_rows(
        "mmvet",
        ("UniAlignment", 63.0, "P", "", "not reproduced: no code of its evaluation is released"),
        ("BAGEL", 67.2, "B"),
        ("UniWorld-V1", 67.1, "P"),
        ("Ovis-U1", 66.7, "O"),
        ("OmniGen2", 61.8, "P"),
        ("Janus-Pro-7B", 50.0, "B"),
        ("Show-o2", 47.1, "S"),
        ("UniDFlow", 82.7, "S"),
    ),
    *(
        Published("semgen", model, value, "P", note="the mean of the paper's four groups, computed here")
        for model, value in (("UniAlignment", 7.2175), ("OmniGen2", 6.965), ("UniWorld-V1", 5.6325))
    ),
    *(
        Published("semgen", model, value, "P", figure=f"{group}/{name}")
        for model, group, values in (
            ("UniAlignment", "t2i_long", (8.53, 7.80, 8.07)),
            ("UniAlignment", "t2i_complex", (8.48, 7.69, 7.97)),
            ("UniAlignment", "edit_multi", (6.94, 7.03, 6.85)),
            ("UniAlignment", "edit_complex", (6.23, 6.80, 5.98)),
            ("DualDiffusion", "t2i_long", (7.86, 7.65, 7.71)),
            ("DualDiffusion", "t2i_complex", (7.49, 7.54, 7.29)),
            ("Step1X-Edit", "edit_multi", (6.16, 6.65, 6.24)),
            ("Step1X-Edit", "edit_complex", (6.43, 6.84, 6.10)),
            ("UniWorld-V1", "t2i_long", (5.86, 7.82, 6.42)),
            ("UniWorld-V1", "t2i_complex", (5.13, 7.59, 5.58)),
            ("UniWorld-V1", "edit_multi", (4.22, 7.16, 4.76)),
            ("UniWorld-V1", "edit_complex", (5.98, 6.95, 5.77)),
            ("OmniGen2", "t2i_long", (8.29, 7.72, 7.95)),
            ("OmniGen2", "t2i_complex", (8.29, 7.77, 7.90)),
            ("OmniGen2", "edit_multi", (6.42, 6.72, 6.40)),
            ("OmniGen2", "edit_complex", (5.97, 6.70, 5.61)),
        )
        for name, value in zip(("SC", "PQ", "O"), values, strict=True)
    ),
)


def of_suite(suite: str) -> list[Published]:
    """The published values of a suite, in the order of the table."""
    return [value for value in PUBLISHED if value.suite == suite]
