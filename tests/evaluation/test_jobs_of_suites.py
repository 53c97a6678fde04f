"""The jobs that a suite's run hands to the job runner."""

import json

from unialign_jax.evaluation.running import write_jobs
from unialign_jax.evaluation.suite import Item, Request


def test_options_of_the_user_replace_the_suites_but_samples_stay_different(tmp_path):
    jobs = tuple({"id": f"a/{index}", "task": "text_to_image", "seed": 42 + index, "steps": 50} for index in range(3))
    write_jobs(Request(tmp_path, tmp_path, options={"seed": 7, "steps": 2}), [Item("a", "", jobs, "")])
    written = [json.loads(line) for line in (tmp_path / "jobs.jsonl").read_text().splitlines()]
    assert [(job["seed"], job["steps"]) for job in written] == [(7, 2), (8, 2), (9, 2)]
