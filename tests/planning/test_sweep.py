"""Plans of many slices: what is shared and gone on with, and the page that is made of them, cell by cell."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from unialign_jax.parallel import hardware
from unialign_jax.planning import plan_report, step_plan, sweep
from unialign_jax.planning.sampling_plan import GIB
from unialign_jax.training.stages import read_config

ROOT = Path(__file__).resolve().parents[2]
STEP = step_plan.StepPlan(
    stream="text_to_image",
    chips=256,
    mesh={"replica": 4, "data": 16, "encoder": 4, "fsdp": 1, "tensor": 1},
    mesh_reason="chosen",
    batch_size=256,
    accumulation=1,
    remat="dots",
    parameters=1 * GIB,
    optimizer=2 * GIB,
    frozen=3 * GIB,
    batch=0,
    temporaries=5 * GIB,
    code=GIB // 2,
    usable=16 * GIB,
    flops=20e12,
    compute=0.10,
    hbm=0.05,
    ici_overlapped=0.08,
    ici_exposed=0.02,
    dcn=0.005,
    peak_flops=200e12,
    bytes_inside={"all-gather": 4e9, "reduce-scatter": 3e9, "all-reduce": 2e9, "all-to-all": 0.5e9},
    bytes_across={"all-reduce": 1.25e9},
)
MADE = {"date": "2026-11-21", "jax": "0.10.2", "libtpu": "0.0.42.1"}


class Compiler:
    """Stands in for `sweep.compile_row`: 8 chips are too few, and one slice cannot be planned."""

    def __init__(self):
        self.asked = []

    def __call__(self, config, name, topology):
        self.asked.append((name, topology))
        slices, one = sweep.split_name(topology)
        chips = slices * hardware.chips_of(hardware.topology_name(one))
        chip = one.partition("-")[0]
        if topology == "v6e-64":
            raise ValueError("the compiler fell over:\n  in many lines")
        row = {"chip": chip, "chips": chips, "slices": slices, "batch_size": max(256, chips), "usable": 16 * GIB}
        row |= {"made": MADE}
        if chips == 8:
            tried = [{"accumulation": 32, "remat": "offload", "bytes": 21 * GIB, "fits": False}]
            return row | {"step": None, "misfit": "it needs 21G of 16G", "tried": tried}
        seconds = 0.1 if name == "text_to_image" else 0.3
        step = dataclasses.replace(STEP, stream=name, chips=chips, batch_size=max(256, chips), compute=seconds)
        return row | {"step": dataclasses.asdict(step), "misfit": None, "tried": []}


def cells(page, heading, first):
    """{column: cell} of the row that begins with `first`, in the tables under a heading that have one."""
    found = {}
    part = page.partition(f"### {heading}")[2].partition("###")[0]
    for block in part.split("\n\n"):
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        for line in lines[2:]:
            if block.startswith("|") and line[: len(first)] == list(first):
                found |= dict(zip(lines[0], line, strict=True))
    return found


def test_streams_share_the_shapes_of_their_steps():
    stage1, stage3 = (read_config(f"configs/{name}.py", []) for name in ("stage1", "stage3"))
    shapes = {name: sweep.shape_of(stage3, stream) for name, stream in stage3.streams.items()}
    assert shapes == {
        "text_to_image": "image0-text",
        "edit": "image1-text",
        "perception": "image1-text",
        "personalization": "image3-text",
        "vqa": "text",
    }
    assert sweep.shape_of(stage1, stage1.streams.text_to_image) == "image0-text"
    stage3.loss_weights.update({"intrinsic_modal": 0.0, "cross_modal": 0.0})
    assert sweep.shape_of(stage3, stage3.streams.edit) == "image1-text-no-cross_modal-no-intrinsic_modal"
    assert sweep.shape_of(stage3, stage3.streams.vqa) == "text-no-intrinsic_modal"
    # What is in the shape's name, or is the plan's to choose, does not keep two stages apart.
    stage3.accumulation, stage3.model.remat, stage3.optimizer.learning_rate = 4, "offload", 1.0
    assert sweep.program_of(stage1) == sweep.program_of(stage3)
    stage3.ema_decay = 0.0
    assert sweep.program_of(stage1) != sweep.program_of(stage3)


def test_a_sweep_goes_on_where_it_stopped(tmp_path, capsys):
    first, second = Compiler(), Compiler()
    stage1, stage2 = (read_config(f"configs/{name}.py", []) for name in ("stage1", "stage2"))
    assert sweep.sweep(stage1, "configs/stage1.py", ["v5e-8", "v5e-256"], tmp_path, plan_row=first) == []
    assert first.asked == [("text_to_image", "v5e-8"), ("text_to_image", "v5e-256")]
    assert "DOES NOT FIT: it needs 21G of 16G" in capsys.readouterr().err
    (tmp_path / "plan-image0-text-v5e-8.json").unlink()
    # Stage 2 finds the plan that it shares with stage 1.
    errors = sweep.sweep(stage2, "configs/stage2.py", ["v5e-256", "v5e-8", "v6e-64"], tmp_path, plan_row=second)
    assert second.asked == [
        ("edit", "v5e-256"),
        ("personalization", "v5e-256"),
        *(
            (name, topology)
            for topology in ("v5e-8", "v6e-64")
            for name in ("edit", "personalization", "text_to_image")
        ),
    ]
    assert errors[0] == "edit on v6e-64: the compiler fell over: in many lines" and len(errors) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"plan-image{i}-text-v5e-{chips}.json" for i in (0, 1, 3) for chips in (256, 8)),
        "stage-stage1.json",
        "stage-stage2.json",
    ]


def test_folders_of_something_else_are_refused(tmp_path):
    config = read_config("configs/stage1.py", [])
    sweep.sweep(config, "configs/stage1.py", ["v5e-256"], tmp_path, plan_row=Compiler())
    config.model.depth = 12
    with pytest.raises(ValueError, match=r"another configuration \(model.depth is 24 there, 12 here\)"):
        sweep.sweep(config, "configs/stage1.py", ["v5e-256"], tmp_path, plan_row=Compiler())
    with pytest.raises(ValueError, match="^topology is 'v7-8'"):
        sweep.sweep(config, "configs/stage1.py", ["v4-8", "v7-8"], tmp_path / "new", plan_row=Compiler())
    assert not (tmp_path / "new").exists()
    path = tmp_path / "plan-image0-text-v5e-256.json"
    row = json.loads(path.read_text())
    del row["step"]["dcn"]
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"plan-image0-text-v5e-256.json is of other code \(dcn\): name another"):
        plan_report.read_folder(tmp_path)
    with pytest.raises(ValueError, match="has no plans: python launch/plan.py"):
        plan_report.read_folder(tmp_path / "nothing")


DAMAGED = [
    ("plan", "{", "is not JSON"),
    ("plan", "[]", "holds a JSON list, expected an object"),
    ("plan", "[" * 99999, "nested too deeply"),
    ("plan", b'{"step": "\xe9"}', "not UTF-8"),
    ("plan", {"step": ...}, "is not of a sweep (its step)"),
    ("plan", {"step": "none"}, "is not of a sweep (its step)"),
    ("plan", {"made": {"date": 2026}}, "is not of a sweep (its date)"),
    ("plan", {"chip": "v9"}, "is of the chip 'v9', expected one of v4, v5e"),
    ("plan", {"chips": "16"}, "is not of a sweep (its chips)"),
    ("plan", {"tried": None}, "is not of a sweep (its tried)"),
    ("stage", "null", "holds a JSON NoneType"),
    ("stage", {"streams": ...}, "is not of a sweep (its streams)"),
    ("stage", {"streams": {"edit": 1}}, "is not of a sweep (its shape)"),
    ("stage", {"num_steps": "many"}, "is not of a sweep (its num_steps)"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(("kind", "content", "words"), DAMAGED, ids=lambda value: str(value)[:30])
def test_damaged_files_of_a_sweep_are_named(tmp_path, refuses, kind, content, words):
    for name in ("plan-image0-text-v5e-16.json", "stage-stage1.json"):
        shutil.copy(ROOT / "docs/plans" / name, tmp_path)
    plan_report.read_folder(tmp_path)
    (path,) = tmp_path.glob(f"{kind}-*.json")
    if isinstance(content, dict):
        changed = json.loads(path.read_text()) | content
        content = json.dumps({key: value for key, value in changed.items() if value is not ...})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuses(lambda: plan_report.read_folder(tmp_path), path.name, words)


def test_the_slices_of_the_sweep():
    assert len(sweep.TOPOLOGIES) == len(set(sweep.TOPOLOGIES)) == 7 + 8 + 1 + 11 + 6
    assert {"v4-8", "v4-512", "v5e-1", "v5e-4", "v5e-256", "4xv5e-256", "v5p-8", "v5p-8192", "v6e-8", "v6e-256"} <= set(
        sweep.TOPOLOGIES
    )
    assert "v5e-2" not in sweep.TOPOLOGIES
    names = ["v5litepod-256", "v5e:16x16", "4xv5e:16x16", "1xv4-8", "2xv4-8", "v4:2x2x12"]
    usual = ["v5e-256", "v5e-256", "4xv5e-256", "v4-8", "2xv4-8", "v4:2x2x12"]
    assert list(map(sweep.usual_name, names)) == usual
    for name in sweep.TOPOLOGIES:
        slices, one = sweep.split_name(name)
        assert slices * hardware.chips_of(hardware.topology_name(one)) <= 4096
    assert sweep.split_name("4xv5e-256") == (4, "v5e-256") and sweep.split_name("v4:4x4x4") == (1, "v4:4x4x4")


@pytest.fixture
def folder(tmp_path):
    for name, topologies in (("stage1", ["v5e-8", "v5e-256", "v5p-1024", "4xv5e-256"]), ("stage2", ["v5e-256"])):
        config = read_config(f"configs/{name}.py", [])
        assert not sweep.sweep(config, f"configs/{name}.py", topologies, tmp_path / "plans", plan_row=Compiler())
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "tpu.md").write_text(f"before\n\n{plan_report.BEGIN}\nold\n{plan_report.END}\n\nafter\n")
    return tmp_path


def test_the_tables_by_hand(folder):
    page = plan_report.markdown(*plan_report.read_folder(folder / "plans"))
    # The step is max(100, 50, 80) + 20 + 5 = 125 ms: 20 TFLOP of 200 a second in it are 80%, in 100 ms 100%.
    row = cells(page, "stage1", ["v5e-256"])
    assert row == {
        "slice": "v5e-256",
        "chips": "256",
        "mesh": "replica=4, data=16, encoder=4",
        "batch": "256",
        "accumulation": "1",
        "remat": "dots",
        "peak of usable, GiB": "11.50 of 16.00",
        "all-gather GB": "4.00",
        "reduce-scatter GB": "3.00",
        "all-reduce GB": "2.00",
        "other GB": "0.50",
        "DCN GB": "1.25",
        "compute ms": "100",
        "HBM ms": "50.0",
        "ICI overlapped ms": "80.0",
        "ICI exposed ms": "20.0",
        "DCN ms": "5.00",
        "step ms": "125",
        "MFU %": "80",
        "all overlapped %": "100",
        "images/s": "2,048",
        "hours": "1.39",  # 40,000 steps of 125 ms
        "chip-hours": "356",
    }
    # 512 chips read 512 samples a step, and so need half of the steps.
    row = cells(page, "stage1", ["v5p-1024"])
    assert (row["chips"], row["batch"], row["hours"], row["chip-hours"]) == ("512", "512", "0.69", "356")
    row = cells(page, "stage1", ["4xv5e-256"])
    assert (row["chips"], row["batch"], row["hours"], row["chip-hours"]) == ("1,024", "1,024", "0.35", "356")
    misfit = cells(page, "stage1", ["v5e-8"])
    assert (misfit["mesh"], misfit["peak of usable, GiB"]) == ("does not fit", "**21.00 of 16.00**")
    assert (misfit["accumulation"], misfit["remat"]) == ("32", "offload")
    assert "step ms" not in misfit
    # Stage 2: half of the steps 125 ms, half 325 ms.
    assert cells(page, "stage2", ["v5e-256", "256", "edit, perception"])["step ms"] == "325"
    total = cells(page, "stage2", ["v5e-256", "256"])
    assert (total["images/s"], total["hours"], total["chip-hours"]) == ("1,138", "2.50", "640")
    stage2 = page.partition("### stage2")[2].partition("### Scaling")[0]
    assert "v5p-1024" not in stage2 and "not all streams of this stage are compiled" in stage2
    assert "not all streams" not in page.partition("### stage2")[0]
    assert "Compiled 2026-11-21 (jax 0.10.2, libtpu 0.0.42.1)" in page
    (missing,) = re.findall(r"Not compiled yet: ([^.]*)\.", page)
    missing = missing.replace("\n", " ").split(", ")
    assert len(missing) == 33 - 4 and "v5e-8" not in missing and missing[0] == "v4-8"


def test_the_assumptions_are_those_that_planning_reads(folder):
    page = plan_report.markdown(*plan_report.read_folder(folder / "plans"))
    assert cells(page, "What the chips", ["v5p"]) == {
        "chip": "v5p",
        "bf16 peak, TFLOP/s": "459",
        "HBM, GB": "95",
        "HBM, GB/s": "2,765",
        "ICI link, one way, GB/s": "90",
        "axes of the torus": "3",
        "an axis is a ring at multiples of": "4",
        "DCN a chip, one way, GB/s": "6.25",
        "rows of the matrix unit": "128",
    }
    part, _, sources = page.partition("### What the chips")[2].partition("Sources: ")
    assert hardware.SOURCES in " ".join(sources.split()) and "H100" not in part


@pytest.mark.slow
def test_the_page_is_written_between_its_marks_and_the_same_again(folder):
    pytest.importorskip("matplotlib")
    docs = folder / "docs"
    plan_report.write_report(folder / "plans", docs)
    page, picture = (docs / "tpu.md").read_text(), (docs / "scaling.png").read_bytes()
    assert page.startswith("before\n\n<!-- plans") and page.endswith("<!-- end of plans -->\n\nafter\n")
    assert "old" not in page and "](scaling.png)" in page
    assert len(picture) < 150_000
    with Image.open(docs / "scaling.png") as image:
        assert image.size == (900, 380)
        assert len(image.convert("RGB").getcolors(2**20)) > 50
    plan_report.write_report(folder / "plans", docs)
    assert ((docs / "tpu.md").read_text(), (docs / "scaling.png").read_bytes()) == (page, picture)
    (docs / "tpu.md").write_text("no marks")
    with pytest.raises(ValueError, match="^the page needs the lines"):
        plan_report.write_report(folder / "plans", docs)


def test_rows_are_whole_files(folder):
    row = json.loads((folder / "plans" / "plan-image0-text-v5e-256.json").read_text())
    assert step_plan.StepPlan(**row["step"]) == STEP
    assert row["shape"] == "image0-text" and row["topology"] == "v5e-256" and row["made"] == MADE
    assert not [path for path in (folder / "plans").iterdir() if path.suffix != ".json"]
