"""Plans of many slices: how sweeps share and resume them, and the page made of them, cell by cell."""

import dataclasses
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from unialign_jax.parallel import hardware
from unialign_jax.planning import report, stage, sweep, topology
from unialign_jax.planning.roofline import Roofline
from unialign_jax.planning.search import Trial
from unialign_jax.planning.step import CompiledMemory, StepPlan
from unialign_jax.planning.topology import GIB
from unialign_jax.training.config import active_streams, read_config

ROOT = Path(__file__).resolve().parents[2]
STEP = StepPlan(
    stream="text_to_image",
    chips=256,
    mesh={"replica": 4, "data": 16, "state": 1, "encoder": 4, "fsdp": 1, "tensor": 1},
    mesh_reason="chosen",
    batch_size=256,
    accumulation=1,
    remat="dots",
    memory=CompiledMemory(1 * GIB, 2 * GIB, 3 * GIB, 0, temporaries=5 * GIB, code=GIB // 2, usable=16 * GIB),
    roofline=Roofline(20e12, 200e12, compute=0.10, hbm=0.05, ici_overlapped=0.08, ici_exposed=0.02, dcn=0.005),
    bytes_inside={"all-gather": 4e9, "reduce-scatter": 3e9, "all-reduce": 2e9, "all-to-all": 0.5e9},
    bytes_across={"all-reduce": 1.25e9},
)
FILES = [".plans.json.lock", "plans.json"]
MADE = {"date": "2026-11-21", "jax": "0.10.2", "libtpu": "0.0.42.1", "code": "0123abc"}


class Compiler:
    """Replaces `sweep.compile_slice`: nothing fits on 8 chips, and one slice cannot be planned."""

    def __init__(self):
        self.asked = []

    def __call__(self, config, name, slice_name):
        self.asked.append((name, slice_name))
        slices, one = topology.split_name(slice_name)
        chips = slices * hardware.chips_of(hardware.topology_name(one))
        if slice_name == "v6e-64":
            raise ValueError("the compiler fell over:\n  in many lines")
        compute = 0.1 if name == "text_to_image" else 0.3
        roofline = dataclasses.replace(STEP.roofline, compute=compute)
        step = dataclasses.replace(STEP, stream=name, chips=chips, batch_size=max(256, chips), roofline=roofline)
        return sweep.SlicePlan(
            shape=sweep.shape_of(config, config.streams[name]),
            topology=slice_name,
            chip=one.partition("-")[0],
            chips=chips,
            batch_size=max(256, chips),
            usable=16 * GIB,
            step=None if chips == 8 else step,
            out_of_memory="it needs 21G of 16G" if chips == 8 else None,
            tried=[Trial(32, "offload", 21 * GIB, fits=False)] if chips == 8 else [],
            made=MADE | {"sources": sweep.sources_digest()},
        )


def cells(page, heading, first):
    """{column: cell} of the row that begins with `first`, in the tables under a heading that have one."""
    found = {}
    part = page.partition(f"## {heading}")[2].partition("## ")[0]
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
    # Keys that are in the shape's name, or are searched, may differ between two stages.
    stage3.accumulation, stage3.model.remat, stage3.optimizer.learning_rate = 4, "offload", 1.0
    assert sweep.program_of(stage1) == sweep.program_of(stage3)
    stage3.ema_decay = 0.0
    assert sweep.program_of(stage1) != sweep.program_of(stage3)


def test_a_sweep_resumes(tmp_path, capsys):
    path = tmp_path / "plans.json"
    first, second = Compiler(), Compiler()
    stage1, stage2 = (read_config(f"configs/{name}.py", []) for name in ("stage1", "stage2"))
    assert sweep.sweep(stage1, "configs/stage1.py", ["v5e-8", "v5e-256"], path, plan_slice=first) == []
    assert first.asked == [("text_to_image", "v5e-8"), ("text_to_image", "v5e-256")]
    assert "DOES NOT FIT: it needs 21G of 16G" in capsys.readouterr().err
    # The plan of v5e-8 was not reached; stage 2 finds the other, which it shares with stage 1.
    content = json.loads(path.read_text())
    content["plans"] = [plan for plan in content["plans"] if plan["topology"] != "v5e-8"]
    path.write_text(json.dumps(content))
    errors = sweep.sweep(stage2, "configs/stage2.py", ["v5e-256", "v5e-8", "v6e-64"], path, plan_slice=second)
    assert second.asked == [
        ("edit", "v5e-256"),
        ("personalization", "v5e-256"),
        *((name, chips) for chips in ("v5e-8", "v6e-64") for name in ("edit", "personalization", "text_to_image")),
    ]
    assert errors[0] == "edit on v6e-64: the compiler fell over: in many lines" and len(errors) == 3
    plans = sweep.read_plans(path)
    assert list(plans.stages) == ["stage1", "stage2"]
    found = [(plan.shape, plan.topology) for plan in plans.plans]
    assert found == [(f"image{i}-text", chips) for i in (0, 1, 3) for chips in ("v5e-256", "v5e-8")]
    assert plans.find("image0-text", "v5e-256").step == STEP and plans.find("image0-text", "v5e-256").is_current
    assert sorted(file.name for file in tmp_path.iterdir()) == FILES
    # A plan of older code is replaced, the others are kept.
    content = json.loads(path.read_text())
    content["plans"][0]["made"]["sources"] = "0"
    path.write_text(json.dumps(content))
    third = Compiler()
    assert sweep.sweep(stage1, "configs/stage1.py", ["v5e-8", "v5e-256"], path, plan_slice=third) == []
    assert third.asked == [("text_to_image", content["plans"][0]["topology"])]
    assert len(sweep.read_plans(path).plans) == len(found)


def test_the_digest_of_the_sources_is_of_what_runs(tmp_path, monkeypatch):
    """Comments and docstrings do not change a plan; everything else may."""
    package = tmp_path / "package"
    (package / "planning").mkdir(parents=True)
    monkeypatch.setattr(sweep, "__file__", str(package / "planning" / "sweep.py"))
    (package / "models").mkdir()

    def digest(model, step="x = 1"):
        (package / "models" / "model.py").write_text(model)
        (package / "step.py").write_text(step)
        return sweep.sources_digest.__wrapped__(("models", "step.py"))

    first = digest('"""A."""\ndef f(x):\n    """B."""\n    return x + 1')
    assert digest('"""C."""\ndef f(x):\n    """D."""\n    return x + 1  # one more') == first
    assert digest("def f(x):\n    return x + 2") != first
    assert digest("def f(x):\n    return x + 1") == first != digest("def f(x):\n    return x + 1", "x = 2")


def test_a_stream_is_planned_alone(monkeypatch):
    """Its mesh and its batch do not depend on the other streams: at least a sample per chip."""
    asked = []

    def plan_stage(config, *place, searching):
        asked.append((list(active_streams(config)), config.batch_size, *place, searching))
        trials = [Trial(1, "offload", None, fits=False)]
        return stage.StagePlan(config, "TPU v5 lite", 1024, 16 * GIB, [], ["no room"], trials)

    monkeypatch.setattr(stage, "plan_stage", plan_stage)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.0.42.1")
    plan = sweep.compile_slice(read_config("configs/stage3.py", []), "edit", "4xv5e-256")
    assert asked == [(["edit"], 1024, "v5e-256", 4, True)]
    assert (plan.shape, plan.chip, plan.chips, plan.batch_size) == ("image1-text", "v5e", 1024, 1024)
    assert (plan.step, plan.out_of_memory) == (None, "no room")


def test_sweeps_share_a_file(tmp_path):
    """Processes that write at the same time: no plan of another is lost, and the file is always whole."""
    path, config = tmp_path / "plans.json", read_config("configs/stage1.py", [])
    names = [name for name in sweep.TOPOLOGIES if name != "v6e-64"]
    with ThreadPoolExecutor(4) as threads:
        share = lambda i: sweep.sweep(config, "", names[i::4], path, plan_slice=Compiler())  # noqa: E731
        assert list(threads.map(share, range(4))) == [[]] * 4
    assert {plan.topology for plan in sweep.read_plans(path).plans} == set(names)
    assert sorted(file.name for file in tmp_path.iterdir()) == FILES


def test_files_of_another_configuration_are_refused(tmp_path):
    path, config = tmp_path / "plans.json", read_config("configs/stage1.py", [])
    sweep.sweep(config, "configs/stage1.py", ["v5e-256"], path, plan_slice=Compiler())
    before = path.read_text()
    config.model.depth = 12
    with pytest.raises(ValueError, match=r"another configuration \(model.depth is 24 there, 12 here\)"):
        sweep.sweep(config, "configs/stage1.py", ["v5e-256"], path, plan_slice=Compiler())
    assert path.read_text() == before
    with pytest.raises(ValueError, match="^topology is 'v7-8'"):
        sweep.sweep(config, "configs/stage1.py", ["v4-8", "v7-8"], tmp_path / "new.json", plan_slice=Compiler())
    assert sorted(file.name for file in tmp_path.iterdir()) == FILES
    with pytest.raises(ValueError, match="nothing.json has no plans: python launch/plan.py"):
        report.read_sweep(tmp_path / "nothing.json")


# (place in the file; its new content, where `...` removes it; words of the error)
DAMAGED = [
    ((), b"{", "is not JSON"),
    ((), b"[]", "holds a JSON list, expected an object"),
    ((), b"[" * 99999, "nested too deeply"),
    ((), b'{"step": "\xe9"}', "not UTF-8"),
    ((), b"null", "holds a JSON NoneType"),
    (("program",), ..., "is of other code (program)"),
    (("plans",), {}, "plans is not of a sweep: it is a dict, expected a list"),
    (("plans",), [], "has no plans"),
    (("plans", 0, "step"), ..., "plans 0 is of other code (step)"),
    (("plans", 0, "step"), "none", "step is not of a sweep: it is a str"),
    (("plans", 0, "step", "roofline", "dcn"), ..., "is of other code (dcn): name another"),
    (("plans", 0, "made"), {"date": 2026}, "date is not of a sweep: it is a int"),
    (("plans", 0, "chip"), "v9", "a plan of the chip 'v9', expected one of v4, v5e"),
    (("plans", 0, "chips"), "16", "chips is not of a sweep"),
    (("plans", 0, "tried"), None, "tried is not of a sweep"),
    (("plans", 0, "tried"), [{"bytes": 1}], "tried 0 is of other code (accumulation)"),
    (("stages", "stage1", "streams"), ..., "stage1 is of other code (streams)"),
    (("stages", "stage1", "streams"), {"edit": 1}, "streams edit is not of a sweep"),
    (("stages", "stage1", "num_steps"), "many", "num_steps is not of a sweep"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(("place", "content", "words"), DAMAGED, ids=lambda value: str(value)[:30])
def test_damaged_files_are_refused(tmp_path, refuses, place, content, words):
    path = tmp_path / "plans.json"
    path.write_bytes((ROOT / "docs/plans.json").read_bytes())
    report.read_sweep(path)
    whole = outer = json.loads(path.read_text())
    for key in place[:-1]:
        outer = outer[key]
    if content is ...:
        del outer[place[-1]]
    elif place:
        outer[place[-1]] = content
    path.write_bytes(json.dumps(whole).encode() if place else content)
    refuses(lambda: report.read_sweep(path), path.name, words)


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
        slices, one = topology.split_name(name)
        assert slices * hardware.chips_of(hardware.topology_name(one)) <= 4096
    assert topology.split_name("4xv5e-256") == (4, "v5e-256") and topology.split_name("v4:4x4x4") == (1, "v4:4x4x4")


@pytest.fixture
def folder(tmp_path):
    for name, topologies in (("stage1", ["v5e-8", "v5e-256", "v5p-1024", "4xv5e-256"]), ("stage2", ["v5e-256"])):
        config = read_config(f"configs/{name}.py", [])
        assert not sweep.sweep(config, f"configs/{name}.py", topologies, tmp_path / "plans.json", plan_slice=Compiler())
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "tpu.md").write_text(f"before\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    return tmp_path


def test_the_tables_by_hand(folder):
    page = report.markdown(report.read_sweep(folder / "plans.json"))
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
        "compiled": "2026-11-21 0123abc",
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
    row = cells(page, "stage1", ["v5e-8"])
    assert (row["mesh"], row["peak of usable, GiB"]) == ("does not fit", "**21.00 of 16.00**")
    assert (row["accumulation"], row["remat"]) == ("32", "offload")
    assert "step ms" not in row
    # Stage 2: half of the steps 125 ms, half 325 ms.
    assert cells(page, "stage2", ["v5e-256", "256", "edit, perception"])["step ms"] == "325"
    total = cells(page, "stage2", ["v5e-256", "256"])
    assert (total["images/s"], total["hours"], total["chip-hours"]) == ("1,138", "2.50", "640")
    stage2 = page.partition("## stage2")[2].partition("## Scaling")[0]
    assert "v5p-1024" not in stage2 and "not all streams of this stage are compiled" in stage2
    assert "not all streams" not in page.partition("## stage2")[0]
    assert "Compiled 2026-11-21 (jax 0.10.2, libtpu 0.0.42.1)" in page
    (missing,) = re.findall(r"Not compiled yet: ([^.]*)\.", page)
    missing = missing.replace("\n", " ").split(", ")
    assert len(missing) == 33 - 4 and "v5e-8" not in missing and missing[0] == "v4-8"


def test_the_assumptions_are_those_that_planning_reads(folder):
    page = report.markdown(report.read_sweep(folder / "plans.json"))
    assert cells(page, "Assumed figures", ["v5p"]) == {
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
    part, _, sources = page.partition("## Assumed figures")[2].partition("Sources: ")
    assert hardware.SOURCES in " ".join(sources.split()) and "H100" not in part


def test_plans_of_older_code_are_marked(folder):
    content = json.loads((folder / "plans.json").read_text())
    for plan in content["plans"]:
        if plan["topology"] == "v5e-256" and plan["shape"] == "image1-text":
            del plan["made"]["sources"]
    (folder / "plans.json").write_text(json.dumps(content))
    page = report.markdown(report.read_sweep(folder / "plans.json"))
    assert "1 of 6 plans are of older code than this page and marked †" in " ".join(page.split())
    assert cells(page, "stage1", ["v5e-256"])["step ms"] == "125"
    assert cells(page, "stage2", ["v5e-256 †", "256", "edit, perception"])["step ms"] == "325"
    assert cells(page, "stage2", ["v5e-256 †", "256"])["images/s"] == "1,138"  # the stage has that stream


def test_the_guide_shows_the_reference_slices(folder):
    """The step is 125 ms: 20 TFLOP at 200 a second are 100, at 85% 117.6, of which compute says 100."""
    part = report.reference(report.read_sweep(folder / "plans.json"))
    (row,) = [line for line in part.splitlines() if line.startswith("| v5e-256 | 256 | replica=4")]
    assert [cell.strip() for cell in row.split("|")][-4:] == ["125", "80", "1.39", ""]
    (names,) = [line for line in part.splitlines() if line.startswith("| part |")]
    assert names == "| part | v5e-256 |"
    parts = re.findall(r"^\| ([^|]*?) \| (-?[\d.]+) \|$", part, re.MULTILINE)
    assert dict(parts)["exposed ICI"] == "20.0" and dict(parts)["the model's FLOPs at the peak"] == "100"
    assert sum(float(value) for _, value in parts) == pytest.approx(125, abs=0.5)


def test_the_pages_are_those_of_the_file():
    """docs/tpu_tables.md and docs/tpu.md were written from docs/plans.json. The marks of older plans may be missing."""
    plans = report.read_sweep(ROOT / "docs/plans.json")
    plain = lambda text: "".join(re.sub(r"[^.]* of older code [^.]*\.", "", text).replace("†", "").split())  # noqa: E731
    assert plain(report.markdown(plans)) == plain((ROOT / "docs/tpu_tables.md").read_text())
    assert plain(report.reference(plans)) in plain((ROOT / "docs/tpu.md").read_text())


@pytest.mark.slow
def test_the_page_is_written_between_its_marks_and_the_same_again(folder):
    pytest.importorskip("matplotlib")
    docs = folder / "docs"
    report.write_report(folder / "plans.json", docs)
    page, picture = (docs / "tpu.md").read_text(), (docs / "scaling.png").read_bytes()
    assert page.startswith("before\n\n<!-- plans") and page.endswith("<!-- end of plans -->\n\nafter\n")
    assert "\nold\n" not in page and "| v5e-256 |" in page
    tables = (docs / "tpu_tables.md").read_text()
    assert tables.startswith("# Plans") and "](scaling.png)" in tables
    assert len(picture) < 150_000
    with Image.open(docs / "scaling.png") as image:
        assert image.size == (900, 380)
        assert len(image.convert("RGB").getcolors(2**20)) > 50
    report.write_report(folder / "plans.json", docs)
    assert ((docs / "tpu.md").read_text(), (docs / "scaling.png").read_bytes()) == (page, picture)
    (docs / "tpu.md").write_text("no marks")
    with pytest.raises(ValueError, match="^the page needs the lines"):
        report.write_report(folder / "plans.json", docs)
