"""Stages: their streams' steps added up, and their plans as tables."""

import dataclasses

import pytest

from unialign_jax.planning import report
from unialign_jax.planning.roofline import Roofline
from unialign_jax.planning.stage import StagePlan
from unialign_jax.planning.step import CompiledMemory, StepPlan
from unialign_jax.planning.topology import GIB
from unialign_jax.training.config import read_config

STEP = StepPlan(
    stream="text_to_image",
    chips=256,
    mesh={"replica": 4, "data": 16, "state": 1, "encoder": 4, "fsdp": 1, "tensor": 1},
    mesh_reason="as given",
    batch_size=256,
    accumulation=1,
    remat="block",
    memory=CompiledMemory(GIB, 2 * GIB, 3 * GIB, batch=0, temporaries=4 * GIB, code=0, usable=16 * GIB),
    roofline=Roofline(20e12, 200e12, compute=0.10, hbm=0.05, ici_overlapped=0.08, ici_exposed=0.02, dcn=0.01),
    bytes_inside={"all-gather": 4e9},
    bytes_across={"all-gather": 0.0},
)


def test_memory_and_speed_of_a_step():
    assert STEP.memory.peak == 10 * GIB and STEP.memory.fits
    assert not dataclasses.replace(STEP.memory, usable=9 * GIB).fits
    assert STEP.images_per_second == pytest.approx(256 / 0.13)


def test_the_stage_is_the_streams_by_their_shares():
    config = read_config("configs/stage2.py", ["streams.perception.weight=0", "streams.personalization.weight=0"])
    slow = dataclasses.replace(STEP, stream="edit", roofline=dataclasses.replace(STEP.roofline, compute=0.20))
    plan = StagePlan(config, "TPU v5 lite", 256, 16 * GIB, [STEP, slow], [], [])
    figures = report.stage_figures(plan)
    (stage,) = figures["tables"]["the stage"]
    seconds = 0.75 * 0.13 + 0.25 * 0.23
    assert stage["hours"] == pytest.approx(40_000 * seconds / 3600)
    assert stage["chip-hours"] == pytest.approx(256 * stage["hours"])
    assert stage["MFU %"] == pytest.approx(100 * 20e12 / seconds / 200e12)
    assert [row["peak"] for row in figures["tables"]["memory"]] == [10.0, 10.0]
    assert figures["tables"]["interconnect"][0]["all-gather"] == 4.0
    parts = dataclasses.asdict(slow)
    flat = parts.pop("memory") | parts.pop("roofline")
    assert figures["steps"][1] == parts | flat | {"peak": 10 * GIB}
    text = report.stage_text(plan)
    assert "edit: fits: 10.00 of 16.00 GiB" in text and "mesh replica=4, data=16, encoder=4: as given" in text
