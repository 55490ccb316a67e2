"""The paper's claims: their files at both sizes, the jobs that they need, the verdicts, and two from end to end."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from factories import TINY_KEYS

from segvol_pl.config import PaperConfig
from segvol_pl.errors import ConfigError, PointsError, RunError
from segvol_pl.experiments import launch, paper, study
from segvol_pl.experiments.claims import claim_paths
from segvol_pl.experiments.study import Study, plan

SIZE = """\
about: A test.
seeds: [0, 1, 2]
data_sets: {few: [volumes=3, seed=1, scale=0.4], held-out: [volumes=2, seed=2, scale=0.4]}
set: ["data.shards={shards}/few", data.val_split=train, run.val_batches=0, track.wandb=disabled, MODEL]
pack: {set: [test_fraction=0, workers=1, "overview_shape=[8, 16, 16]"]}
pretrain: {set: [optim.max_steps=4]}
train:
  set:
    - text.source=seeded
    - optim.max_steps=STEPS
    - "pretrained={out}/pretrain/seed-{seed}/checkpoints/last.ckpt"
evaluate: {set: ["data.shards={shards}/held-out", data.split=all, device=cpu, precision=fp32, pictures=0]}
runs: {base: []}
evaluations: {prompts: ["prompts=[text, box]"]}
""".replace(
    "MODEL",
    ", ".join(
        f'"{key}"'
        for key in (
            *TINY_KEYS,
            "model.hidden_size=16",
            "data.global_batch=2",
            "data.workers=0",
            "data.samples_per_volume=16",
            "optim.warmup_steps=1",
            "run.accelerator=cpu",
            "run.precision=fp32",
            "run.log_every=1",
            "run.cpu_threads=1",
            "run.checkpoint_every=5",
        )
    ),
)
CLAIM = """\
claim: A box is better than text.
source: Fig. 0
figures:
  text: {run: base, evaluation: prompts, prompt: text, paper: 0.25}
  box: {run: base, evaluation: prompts, prompt: box}
expect:
  - box > text
"""
TUNED = """\
claim: A tuned run resembles its own categories.
source: Fig. 00
tiny:
  runs:
    tuned: [pretrained=null, "weights={out}/train/run-base_seed-{seed}/checkpoints/last.ckpt", optim.max_steps=2]
  evaluations:
    own: ["prompts=[box]", "modes=[resize]", match_categories=true]
figures:
  own category: {run: tuned, evaluation: own, of: first}
  dice: {run: tuned, evaluation: own, prompt: box, mode: resize}
expect: [own category > 0.99]
"""


def written(folder: Path, steps: int = 4, **claims: str) -> list[str]:
    """Write a size and claims; return the arguments of `segvol-pl paper`."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "tiny.yaml").write_text(SIZE.replace("STEPS", str(steps)))
    for name, text in claims.items():
        (folder / f"{name}.yaml").write_text(text)
    named = [str(folder / f"{name}.yaml") for name in claims]
    return [*named, f"size={folder / 'tiny.yaml'}", f"out={folder / 'out'}"]


def planned(folder: Path, *given: str, **claims: str) -> Study:
    written(folder, **claims)
    named = [str(folder / f"{name}.yaml") for name in claims]
    return plan(PaperConfig(claims=named, size=str(folder / "tiny.yaml"), out=str(folder / "out")), given)


def fault(folder: Path, *given: str, **claims: str) -> str:
    with pytest.raises(ConfigError) as caught:
        planned(folder, *given, **claims)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder}/", "")


# ---- the claims of the repository ----


@pytest.fixture(scope="module", params=["tiny", "full"])
def every(request: pytest.FixtureRequest) -> Study:
    size = str(request.param)
    return plan(PaperConfig(size=size, shards=None if size == "tiny" else "/data"))


def test_every_claim_gives_jobs_whose_configurations_are_checked(every: Study) -> None:
    assert len(every.claims) == len(claim_paths([])) >= 8 and len(every.seeds) >= 3
    assert [job.number for job in every.jobs] == list(range(len(every.jobs)))
    assert len({job.run.out for job in every.jobs}) == len({job.name for job in every.jobs}) == len(every.jobs)
    for job in every.jobs:
        assert all(every.jobs[need].stage < job.stage for need in job.needs)


def test_claims_share_their_runs(every: Study) -> None:
    trained = [job.run.name for job in every.jobs if job.run.command == "train"]
    assert sum(name.startswith("run-base_") for name in trained) == len(every.seeds)
    base = next(job.number for job in every.jobs if job.name == "train run-base_seed-1")
    users = {job.run.places["evaluation"] for job in every.jobs if base in job.needs}
    assert {"modes", "prompts", "semantics-box", "rough-boxes"} <= users


def test_phantoms_stand_in_for_data_sets_only_where_none_are_given(every: Study) -> None:
    made = {job.run.command for job in every.jobs} & {"phantoms", "pack"}
    assert made == ({"phantoms", "pack"} if every.size.name == "tiny" else set())


def test_the_sources_of_the_scaling_claim_are_nested(every: Study) -> None:
    runs = {job.run.places["run"]: job.run.config.data for job in every.jobs if job.run.name.startswith("run-sources-")}
    folders = [{data.shards, *data.mix} for _, data in sorted(runs.items()) if hasattr(data, "mix")]
    assert all(smaller < larger for smaller, larger in itertools.pairwise(folders))


# ---- jobs ----


def test_only_what_a_claim_needs_is_run(tmp_path: Path) -> None:
    jobs = planned(tmp_path, one=CLAIM, two=TUNED).jobs
    names = {job.number: job.name for job in jobs}
    needs = {job.name: {names[need] for need in job.needs} for job in jobs}
    assert needs["train run-tuned_seed-1"] == {"train run-base_seed-1", "pack few"}
    assert needs["pack few"] == {"phantoms few"}
    assert needs["evaluate run-tuned_seed-0_own"] == {"train run-tuned_seed-0", "pack held-out"}
    alone = {job.name for job in planned(tmp_path, one=CLAIM).jobs}
    assert alone == set(names.values()) - {name for name in names.values() if "tuned" in name}


def test_a_key_of_the_command_line_is_for_every_training_run_that_has_it(tmp_path: Path) -> None:
    jobs = planned(tmp_path, "optim.lr=0.5", "pseudo_weight=0.7", one=CLAIM).jobs
    configs = {job.run.command: job.run.config for job in jobs}
    assert configs["pretrain"].optim.lr == configs["train"].optim.lr == 0.5 and configs["train"].pseudo_weight == 0.7


def test_a_job_waits_for_those_that_it_needs(tmp_path: Path) -> None:
    made = planned(tmp_path, one=CLAIM)
    number = next(job.number for job in made.jobs if job.name == "pack few")
    with pytest.raises(RunError, match=r"^job \d+ \(pack few\) needs jobs that are not finished: \d+ \(phantoms few\)"):
        study.start(made, number, {}, first=True)
    with pytest.raises(ConfigError, match=r"^run=99: expected 0 to "):
        study.start(made, 99, {}, first=True)


def test_a_finished_job_runs_again_only_in_another_folder(tmp_path: Path) -> None:
    calls: list[str] = []
    first = planned(tmp_path, one=CLAIM)
    make = {"phantoms": lambda config: calls.append(config.out)}
    for _ in range(2):
        study.start(first, 0, make, first=True)
    assert calls == [str(tmp_path / "out" / "phantoms" / "few")]
    (tmp_path / "tiny.yaml").write_text((tmp_path / "tiny.yaml").read_text().replace("volumes=3", "volumes=4"))
    config = PaperConfig(
        claims=[str(tmp_path / "one.yaml")], size=str(tmp_path / "tiny.yaml"), out=first.out.as_posix()
    )
    with pytest.raises(RunError, match="volumes 3 -> 4: give another out=DIR"):
        study.start(plan(config), 0, make, first=True)
    assert launch.state(first.jobs[0].run).name == launch.FINISHED


def test_a_failed_job_ends_only_those_that_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, started = planned(tmp_path, one=CLAIM, two=TUNED), []

    def run(command: list[str], **settings: Any) -> SimpleNamespace:
        job = made.jobs[int(command[-1].removeprefix("run="))]
        started.append(job.number)
        failed = job.name == "train run-tuned_seed-1"
        settings["stdout"].write("segvol-pl paper: error: no room\n" if failed else "done\n")
        return SimpleNamespace(returncode=int(failed))

    monkeypatch.setattr("segvol_pl.experiments.study.subprocess.run", run)
    with pytest.raises(
        RunError, match=r"^1 jobs failed: \d+ \(train run-tuned_seed-1\); 1 that need them were not run"
    ):
        study.start_all(made, 2, [])
    assert "failed after 0 s: segvol-pl paper: error: no room" in caplog.text
    left = {job.name for job in made.jobs if job.number not in started}
    assert left == {"evaluate run-tuned_seed-1_own"} and len(started) == len(made.jobs) - 1
    assert all(started.index(need) < started.index(number) for number in started for need in made.jobs[number].needs)


# ---- faults ----


def test_faults_name_file_and_line(tmp_path: Path) -> None:
    assert fault(tmp_path, one=CLAIM + "figure: {}\n") == "unknown key figure (one.yaml:8): did you mean figures?"
    assert fault(tmp_path, one=CLAIM.replace("- box > text", "- box > texts")) == (
        "expect (one.yaml:7): no figure 'texts': did you mean text?"
    )
    assert fault(tmp_path, one=CLAIM.replace("box > text", "box < text")) == "box < text (one.yaml:7): is not `A > B`"
    assert fault(tmp_path, one=CLAIM.replace("run: base", "run: bas", 1)) == (
        "figures.text (one.yaml:4): no run 'bas' at this size; there are base"
    )
    assert fault(tmp_path, one=CLAIM.replace("prompt: box", "prompt: bow")).startswith(
        "figures.box.prompt (one.yaml:5): 'bow' is none of points+text,"
    )
    assert fault(tmp_path, one=CLAIM.replace("paper: 0.25", "paper: much")) == "paper (one.yaml:4): must be a number"
    assert fault(tmp_path, one=CLAIM.replace("claim: A box is better than text.\n", "")) == "one.yaml: lacks claim"


def test_faults_in_settings_name_file_and_line(tmp_path: Path) -> None:
    assert fault(tmp_path, one=CLAIM, two=TUNED.replace("optim.max_steps=2", "optim.steps=2")).startswith(
        "unknown key optim.steps (two.yaml:5)"
    )
    assert fault(tmp_path, one=CLAIM, two=TUNED.replace("modes=[resize]", "modes=[shrink]")).startswith(
        "modes (two.yaml:7): '[shrink]' is none of"
    )
    assert fault(tmp_path, one=CLAIM, two=TUNED.replace('"modes=[resize]"', "out=here")).startswith(
        "out (two.yaml:7): `segvol-pl paper` sets it"
    )
    assert fault(tmp_path, two=TUNED.replace("run-base_", "run-best_")).startswith(
        "weights of train run-tuned_seed-0: no job writes"
    )


def test_one_name_has_one_meaning(tmp_path: Path) -> None:
    other = TUNED.replace("optim.max_steps=2", "optim.max_steps=3")
    assert fault(tmp_path, one=TUNED, two=other) == (
        "tuned: has one meaning at one.yaml:5 and another at two.yaml:5: rename one"
    )


def test_names_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^claims: no 'table3': did you mean table3_zoom\?"):
        plan(PaperConfig(claims=["table3"]))
    with pytest.raises(ConfigError, match=r"^size: no 'huge': there are full, tiny, or give a YAML file"):
        plan(PaperConfig(size="huge"))
    with pytest.raises(ConfigError, match=r"^shards: size full needs shards=DIR"):
        plan(PaperConfig(size="full"))
    with pytest.raises(ConfigError, match=r"^run: 'some' is none of"):
        PaperConfig(run="some")


# ---- verdicts ----


def evaluated(made: Study, run: str, evaluation: str, seed: int, **dice: float) -> None:
    """Write a summary with one category, and the Dice of each prompt."""
    cells = [
        {"category": "liver", "mode": "zoom", "prompt": prompt, "box": "exact" if prompt == "box" else "", "points": ""}
        | {"dice": {"mean": value}, "zoom_out": None, "seconds": 0.5}
        for prompt, value in dice.items()
    ]
    path = made.evaluation(run, seed, evaluation) / "summary.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"categories": cells, "matches": {}}))


@pytest.mark.parametrize(
    ("boxes", "verdict"),
    [
        ((0.70, 0.71, 0.72), paper.HOLDS),
        ((0.30, 0.31, 0.29), paper.FAILS),
        ((0.70, 0.30, 0.60), paper.OPEN),
        ((0.70,), paper.OPEN),
        ((), paper.OPEN),
    ],
)
def test_a_claim_holds_if_every_interval_lies_above_zero(
    boxes: tuple[float, ...], verdict: str, tmp_path: Path
) -> None:
    made = planned(tmp_path, one=CLAIM)
    for seed, box in enumerate(boxes):
        evaluated(made, "base", "prompts", seed, text=0.5 + 0.001 * seed, box=box)
    result = paper.judge(made, made.claims[0])
    assert result.verdict == verdict
    assert len(result.judged[0].differences) == len(boxes)
    lines = paper.write(made)
    assert lines[0] == f"{verdict}: one (Fig. 0)"
    content = json.loads((made.out / "paper.json").read_text())
    assert content["claims"][0]["verdict"] == verdict and content["claims"][0]["figures"][0]["paper"] == 0.25
    page = (made.out / "index.html").read_text()
    assert f"{verdict}: A box is better than text." in page and "0.2500" in page and "are not finished" in page


def test_one_expectation_that_fails_is_enough(tmp_path: Path) -> None:
    made = planned(tmp_path, one=CLAIM + "  - text > 0.9\n")
    for seed in made.seeds:
        evaluated(made, "base", "prompts", seed, text=0.5 + 0.001 * seed, box=0.7)
    result = paper.judge(made, made.claims[0])
    assert [each.verdict for each in result.judged] == [paper.HOLDS, paper.FAILS] and result.verdict == paper.FAILS


def test_a_figure_that_is_not_in_a_summary_is_an_error(tmp_path: Path) -> None:
    made = planned(tmp_path, one=CLAIM + "categories: [liver, spleen]\n")
    evaluated(made, "base", "prompts", 0, text=0.5, box=0.7)
    with pytest.raises(PointsError, match=r"summary.json: has no text \(dice\) for spleen$"):
        paper.judge(made, made.claims[0])


# ---- from end to end ----


def _paper(*arguments: str, stop_when: Path | None = None) -> tuple[int, str]:
    """Run the command; with `stop_when`, interrupt it as soon as that file exists."""
    command = [sys.executable, "-m", "segvol_pl", "paper", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    while stop_when is not None and not stop_when.exists():
        assert process.poll() is None
        time.sleep(0.05)
    if stop_when is not None:
        os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_claims_from_end_to_end_interrupted_and_resumed(tmp_path: Path) -> None:
    arguments = [*written(tmp_path, steps=60, one=CLAIM, two=TUNED), "seeds=[0]"]
    out = tmp_path / "out"
    checkpoint = out / "train" / "run-base_seed-0" / "checkpoints" / "last.ckpt"
    status, output = _paper(*arguments, "run=all", "processes=2", stop_when=checkpoint)
    assert status == 130, output
    finished = [path for path in out.glob("*/*/grid.json") if json.loads(path.read_text())["state"] == "finished"]
    before = {path: path.stat().st_mtime_ns for path in finished}
    assert len(before) >= 5  # phantoms, shards, and at least one pre-training
    status, output = _paper(*arguments, "run=all", "processes=2")
    assert status == 0, output
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    content = json.loads((out / "paper.json").read_text())
    assert content["unfinished"] == []
    figures = {each["name"]: each for claim in content["claims"] for each in claim["figures"]}
    counts = {name: len(each["values"]) for name, each in figures.items()}
    assert counts == {"text": 1, "box": 1, "own category": 1, "dice": 1}
    assert "resum" in (out / "logs" / "train-run-base_seed-0.log").read_text()
    status, output = _paper(*arguments)
    assert re.findall(r"missing|partial|failed", output) == [] and "stage 0: jobs 0-1 (phantoms)" in output
