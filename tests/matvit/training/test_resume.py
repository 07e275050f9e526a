"""A run that is interrupted anywhere ends as if it had not been, or says in one sentence why it cannot go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file

from matvit.errors import RecipeError
from matvit.training import loop, record, state, steps
from matvit.training.loop import train

AUGMENTED_TWICE = [
    {"name": "one", "steps": 5, "learning_rate": 1e-3, "full": {"classification": 1}},
    {
        "name": "two",
        "steps": 5,
        "learning_rate": 1e-3,
        "full": {"cosine": 1},
        "submodels": {"similarity": 1},
        "augmentation": {"mixup_alpha": 0.5},
    },
]

THEN_OWNING = [
    AUGMENTED_TWICE[0] | {"average": 0.5, "ema": 0.9},
    AUGMENTED_TWICE[1] | {"full": {}, "private": 2, "freeze": True, "ema": 0.7},
]


@pytest.fixture(autouse=True)
def _log_and_save_every_step(monkeypatch):
    monkeypatch.setattr(steps, "_LOG_STEPS", 1)
    monkeypatch.setattr(steps, "_SAVE_SECONDS", 0.0)


def log_of(folder: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("stage", "step", "loss", "learning_rate")} for row in rows]


def same_result(one: Path, other: Path) -> None:
    assert log_of(one) == log_of(other)
    assert len(log_of(one)) > 1
    weights = [(folder / "encoder" / "model.safetensors").read_bytes() for folder in (one, other)]
    assert weights[0] == weights[1]


class Interrupted(Exception):
    """Raised by a progress callback."""


def interrupt_at(stage: str, step: int):
    def progress(event):
        if (event.stage, event.done) == (f"train {stage}", step):
            raise Interrupted

    return progress


@pytest.mark.parametrize(("stage", "step"), [("one", 1), ("one", 3), ("one", 5), ("two", 1), ("two", 4)])
def test_an_interrupted_run_continues_to_the_same_log_and_weights(data, make_recipe, tmp_path, stage, step):
    recipe = make_recipe(stages=AUGMENTED_TWICE)
    train(recipe, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(recipe, out=tmp_path / "parts", progress=interrupt_at(stage, step))
    train(recipe, out=tmp_path / "parts")
    same_result(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(("stage", "step"), [("one", 3), ("one", 5), ("two", 1), ("two", 4)])
def test_averages_and_private_parameters_are_resumed(data, make_recipe, tmp_path, stage, step):
    recipe = make_recipe(stages=THEN_OWNING)
    train(recipe, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(recipe, out=tmp_path / "parts", progress=interrupt_at(stage, step))
    train(recipe, out=tmp_path / "parts")
    same_result(tmp_path / "whole", tmp_path / "parts")


def test_tensorboard_shows_the_log_without_what_was_done_twice(data, make_recipe, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe, folder = make_recipe(stages=AUGMENTED_TWICE), tmp_path / "run" / "tensorboard"

    def shown() -> list[tuple[int, float]]:
        events = reader.EventAccumulator(str(folder)).Reload()
        return [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")]

    with pytest.raises(Interrupted):
        train(recipe, out=tmp_path / "run", tensorboard=True, progress=interrupt_at("two", 3))
    assert [step for step, _ in shown()] == [1, 2, 3, 4, 5, 6, 7, 8]  # of which the last was not saved
    train(recipe, out=tmp_path / "run", tensorboard=True)
    assert shown() == list(enumerate((row["loss"] for row in log_of(tmp_path / "run")), start=1))
    train(recipe, out=tmp_path / "run", tensorboard=True, resume=False)
    assert len(shown()) == 10
    assert len(list(folder.iterdir())) == 1


def test_a_run_that_is_killed_in_mid_stage_continues_to_the_same_log_and_weights(data, make_recipe, tmp_path):
    stage = {"name": "one", "steps": 120, "learning_rate": 1e-3, "full": {"classification": 1}}
    recipe = make_recipe(stages=[stage])
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    script = f"""
from pathlib import Path
from matvit.training import loop, steps
from matvit.training.recipe import Recipe
steps._LOG_STEPS, steps._SAVE_SECONDS = 1, 0.0
recipe = Recipe.model_validate_json(Path({str(tmp_path / "recipe.json")!r}).read_text())
loop.train(recipe, out=Path({str(tmp_path / "parts")!r}))
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment)
    log = tmp_path / "parts" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > 3):
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(log_of(tmp_path / "parts")) < 120

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the killed process: sums in the same order
    try:
        train(recipe, out=tmp_path / "parts")
        train(recipe, out=tmp_path / "whole")
    finally:
        torch.set_num_threads(threads)
    same_result(tmp_path / "whole", tmp_path / "parts")


@contextmanager
def small_disk(monkeypatch):
    """From a run's second save on, the system refuses files above 1 kB.

    No fixture: it must end with the test's body, before pytest itself writes to a file again.
    """
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = loop.save

    def save_then_limit(*arguments):
        save(*arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))

    for module in (loop, steps):
        monkeypatch.setattr(module, "save", save_then_limit)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_sentence_and_leaves_the_save_before(data, make_recipe, tmp_path, monkeypatch):
    refused = pytest.raises(RecipeError, match=r"state\.pt: cannot be written \(File too large\); mend that")
    with small_disk(monkeypatch), refused:
        train(make_recipe(), out=tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["lock", "log.jsonl", "state.pt"]
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_log_is_one_sentence(data, make_recipe, tmp_path):
    log = tmp_path / "run" / "log.jsonl"

    def fill_the_disk(event):
        if event.stage == "train full" and event.done == 1:
            log.unlink()
            log.symlink_to("/dev/full")

    with pytest.raises(RecipeError, match=r"log\.jsonl: cannot be written \(No space left on device\)"):
        train(make_recipe(), out=tmp_path / "run", progress=fill_the_disk)


def test_what_a_kill_during_a_save_left_is_removed(data, make_recipe, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".tmp-1-state.pt").write_bytes(b"half")
    train(make_recipe(), out=folder)
    assert sorted(path.name for path in folder.iterdir()) == ["encoder", "lock", "log.jsonl", "state.pt"]


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["state.pt", "log.jsonl"])
def test_a_pipe_or_folder_in_the_place_of_a_runs_file_is_told_at_once(
    interrupted, make_recipe, monkeypatch, name, make, resume
):
    monkeypatch.setattr(loop, "prepare", None)
    (interrupted / name).unlink()
    make(interrupted / name)
    with pytest.raises(RecipeError, match=rf"holds '{name}', which is no part of a run"):
        train(make_recipe(), out=interrupted, resume=resume)


@pytest.mark.parametrize("name", ["lock", "log.jsonl", "thesis.tex"])
@pytest.mark.parametrize("resume", [True, False])
def test_files_of_the_users_own_are_not_overwritten_by_a_runs_or_mixed_with_them(
    data, make_recipe, tmp_path, name, resume
):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text("precious")
    with pytest.raises(RecipeError, match=rf"holds '{name}', which is no part of a run; choose a new or empty --out"):
        train(make_recipe(), out=folder, resume=resume)
    assert [path.name for path in folder.iterdir()] == [name]
    assert (folder / name).read_text() == "precious"


@pytest.mark.parametrize("lock", ["none", "", "\0\0\0", "4711\n"])
@pytest.mark.parametrize("resume", [True, False])
def test_another_programs_state_is_never_taken_for_a_runs(data, make_recipe, tmp_path, lock, resume):
    folder = tmp_path / "mine"
    folder.mkdir()
    torch.save({"my": "work"}, folder / "state.pt")
    (folder / "log.jsonl").write_text("precious")
    if lock != "none":
        (folder / "lock").write_text(lock)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RecipeError, match=r"mine: holds 'state\.pt', which is no part of a run; choose"):
        train(make_recipe(), out=folder, resume=resume)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("resume", [True, False])
def test_an_empty_lock_makes_no_folder_a_runs(data, make_recipe, tmp_path, resume):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "lock").touch()
    (folder / "log.jsonl").write_text("precious")
    with pytest.raises(RecipeError, match=r"holds 'log\.jsonl', which is no part of a run"):
        train(make_recipe(), out=folder, resume=resume)
    assert (folder / "log.jsonl").read_text() == "precious"


def test_a_run_that_cannot_start_leaves_no_lock(data, make_recipe, make_fields, tmp_path):
    fields = make_fields()
    fields["encoder"]["timm_model"] = "vit_misspelt"
    with pytest.raises(RecipeError, match="vit_misspelt"):
        train(make_recipe(**fields), out=tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_a_lock_is_not_written_through_a_link(data, make_recipe, tmp_path):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.touch()
    (folder / "lock").symlink_to(elsewhere)
    with pytest.raises(RecipeError, match=r"lock: cannot be written \(a link\)"):
        train(make_recipe(), out=folder)
    assert elsewhere.read_bytes() == b""


@pytest.mark.parametrize("part", ["spec", "encoder", "teacher"])
def test_a_fresh_run_that_cannot_start_leaves_the_earlier_one(interrupted, make_recipe, make_fields, part):
    fields = make_fields()
    if part == "spec":
        fields["stages"][1]["ladder"] = ["S-d9"]
    elif part == "encoder":
        fields["encoder"]["timm_model"] = "vit_misspelt"
    else:
        fields["teacher"] = {"timm_model": "misspelt", "image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
        fields["stages"][0]["full"] = {"teacher_features": 1}
    before = [(interrupted / name).read_bytes() for name in ("state.pt", "log.jsonl")]
    with pytest.raises(RecipeError):
        train(make_recipe(**fields), out=interrupted, resume=False)
    assert [(interrupted / name).read_bytes() for name in ("state.pt", "log.jsonl")] == before


def test_a_fresh_run_forgets_the_unfinished_one(data, make_recipe, tmp_path):
    recipe = make_recipe(stages=AUGMENTED_TWICE)
    with pytest.raises(Interrupted):
        train(recipe, out=tmp_path / "run", progress=interrupt_at("two", 2))
    with pytest.raises(Interrupted):
        train(recipe, out=tmp_path / "run", resume=False, progress=interrupt_at("one", 1))
    assert [(row["stage"], row["step"]) for row in log_of(tmp_path / "run")] == [("one", 1)]
    assert not (tmp_path / "run" / "state.pt").exists()


def test_a_fresh_run_leaves_the_encoder_until_it_has_its_own(data, make_recipe, tmp_path):
    recipe = make_recipe(stages=AUGMENTED_TWICE)
    train(recipe, out=tmp_path / "run")
    whole = (tmp_path / "run" / "encoder" / "model.safetensors").read_bytes()
    with pytest.raises(Interrupted):
        train(recipe, out=tmp_path / "run", resume=False, progress=interrupt_at("one", 1))
    assert (tmp_path / "run" / "encoder" / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    ['{"stage": "tw', "", "{}", "[1]", '{"stage": "three", "step": 1}', '{"stage": "two", "step": null}', "\udcff"],
)
def test_a_log_line_that_is_no_row_is_dropped(data, make_recipe, tmp_path, line):
    recipe = make_recipe(stages=AUGMENTED_TWICE)
    train(recipe, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(recipe, out=tmp_path / "parts", progress=interrupt_at("two", 3))
    log = tmp_path / "parts" / "log.jsonl"
    first, *others = log.read_bytes().splitlines(keepends=True)
    damaged = line.encode(errors="surrogateescape")
    log.write_bytes(first + damaged + b"\n" + b"".join(others) + damaged)
    train(recipe, out=tmp_path / "parts")
    same_result(tmp_path / "whole", tmp_path / "parts")


@pytest.fixture
def interrupted(data, make_recipe, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(make_recipe(), out=folder, progress=interrupt_at("full", 3))
    return folder


def test_the_state_of_another_recipe_is_refused(interrupted, make_recipe):
    with pytest.raises(RecipeError, match=r"state\.pt: belongs to another recipe; choose another --out"):
        train(make_recipe(seed=4), out=interrupted)


def test_what_is_said_and_measured_of_the_result_may_be_corrected_on_the_way(interrupted, make_recipe):
    said = {"license": "mit", "credits": ["start"], "notes": ["mine"], "validation": {"queries": "shapes"}}
    record = train(make_recipe(**said), out=interrupted).record
    assert (record["license"], record["credits"], record["notes"]) == ("mit", ["start"], ["mine"])
    assert record["metrics"]["validation"]


def test_a_note_that_is_no_valid_text_is_kept(data, make_recipe, tmp_path):
    recipe = make_recipe(notes=["\ud800"])
    with pytest.raises(Interrupted):
        train(recipe, out=tmp_path / "run", progress=interrupt_at("full", 3))
    assert train(recipe, out=tmp_path / "run").record["notes"] == ["\ud800"]


def test_a_state_that_cannot_be_read_is_not_called_damaged(interrupted, make_recipe, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(state, "_check_sums", refuse)
    with pytest.raises(RecipeError, match=r"state\.pt: cannot be read \(Permission denied\); mend that, or start"):
        train(make_recipe(), out=interrupted)


def test_a_device_without_memory_for_the_state_is_not_damage(interrupted, make_recipe, monkeypatch):
    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(RecipeError, match=r"state\.pt: does not fit into the memory of cpu; free some"):
        train(make_recipe(), out=interrupted)


def test_a_second_process_in_the_same_folder_is_refused(interrupted, make_recipe):
    before = (interrupted / "state.pt").read_bytes()
    with (
        state.only_run(interrupted),
        pytest.raises(RecipeError, match=rf"process {os.getpid()} is training in this folder; wait"),
    ):
        train(make_recipe(), out=interrupted, resume=False)
    assert (interrupted / "state.pt").read_bytes() == before
    train(make_recipe(), out=interrupted)


def test_a_state_of_other_pictures_is_refused(interrupted, make_recipe, data):
    (data / "shapes" / "dark" / "0.png").unlink()
    with pytest.raises(RecipeError, match=r"state\.pt: belongs to other pictures"):
        train(make_recipe(), out=interrupted)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def flip_one_bit_of_the_weights(path: Path) -> None:
    weights = torch.load(path, weights_only=True)["model"]
    content = bytearray(path.read_bytes())
    content[content.index(weights["pos_embed"].numpy().tobytes())] ^= 1
    path.write_bytes(content)


def mark_a_tensor_as_a_folder(path: Path) -> None:
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))
    content[entry + 38] ^= 0x10
    path.write_bytes(content)


def save_a_pickled_object(path: Path) -> None:
    torch.save({"recipe": Path("x")}, path)


@pytest.mark.parametrize(
    "damage",
    [cut_short, flip_one_bit_of_the_weights, mark_a_tensor_as_a_folder, save_a_pickled_object],
)
def test_a_damaged_state_is_refused_and_never_unpickled(interrupted, make_recipe, damage):
    damage(interrupted / "state.pt")
    with pytest.raises(RecipeError, match=r"state\.pt: is damaged; start again with --fresh"):
        train(make_recipe(), out=interrupted)


@pytest.mark.parametrize("change", [{"version": 1}, {"recipe": "{}"}])
def test_a_state_of_another_version_is_told_as_such(interrupted, make_recipe, change):
    """Of an older program, or with a recipe that this one refuses."""
    saved = torch.load(interrupted / "state.pt", weights_only=True)
    torch.save(saved | change, interrupted / "state.pt")
    with pytest.raises(RecipeError, match=r"state\.pt: was written by another version; choose another --out"):
        train(make_recipe(), out=interrupted)


@pytest.mark.parametrize(
    "change",
    [
        {"stage": 7},
        {"stage": 2, "step": 3},
        {"step": -1},
        {"recipe": 5},
        {"recipe": "{"},
        {"made_by": None},
        {"model": {}},
        {"heads": {}},
        {"model": {"pos_embed": torch.tensor(float("nan"))}},
        {"data": ...},
    ],
)
def test_a_state_of_this_version_with_other_content_is_damaged(interrupted, make_recipe, change):
    saved = torch.load(interrupted / "state.pt", weights_only=True) | change
    torch.save({name: value for name, value in saved.items() if value is not ...}, interrupted / "state.pt")
    with pytest.raises(RecipeError, match=r"state\.pt: is damaged; start again with --fresh"):
        train(make_recipe(), out=interrupted)


def test_an_error_of_our_own_while_a_state_is_taken_is_not_called_damage(interrupted, make_recipe, monkeypatch):
    def fail(*_):
        raise KeyError("ours")

    monkeypatch.setattr(state, "_take", fail)
    with pytest.raises(KeyError, match="ours"):
        train(make_recipe(), out=interrupted)


def test_a_record_names_the_processes_that_took_steps_and_no_later_one(data, make_recipe, tmp_path, monkeypatch):
    def run_as(commit: str, **how) -> dict[str, object]:
        monkeypatch.setattr(record, "_commit", lambda: commit)
        return train(make_recipe(), out=tmp_path / "run", **how).record

    with pytest.raises(Interrupted):
        run_as("first", progress=interrupt_at("full", 3))
    found = run_as("second")
    assert (found["commit"], [one["commit"] for one in found["earlier"]]) == ("second", ["first"])
    monkeypatch.setattr(record, "_version", lambda _: "0")
    assert run_as("third") == found


def test_a_complete_run_needs_its_teacher_no_more_and_is_told_as_such(data, make_recipe, tmp_path, monkeypatch):
    teacher = {"timm_model": "test_resnet", "image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "views": 1}
    torch.manual_seed(5)
    weights = tmp_path / "teacher.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), weights)
    stage = {"name": "one", "steps": 1, "learning_rate": 1e-3, "full": {"teacher_features": 1}}
    recipe = make_recipe(teacher=teacher | {"weights": str(weights)}, stages=[stage])
    first = loop.carry_out(recipe, out=tmp_path / "run")
    monkeypatch.setattr(loop, "load_teacher", None)
    again = loop.carry_out(recipe, out=tmp_path / "run")
    assert (first.already_complete, again.already_complete) == (False, True)
    assert again.encoder.weights_sha256 == first.encoder.weights_sha256


def test_a_complete_run_leaves_its_encoder_as_it_was_changed_since_and_mends_a_damaged_one(data, make_recipe, tmp_path):
    folder = tmp_path / "run" / "encoder"

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    adapted = train(make_recipe(), out=tmp_path / "run")
    whole = files()
    adapted.record["adapted"], adapted.pareto = {"pictures": 12}, adapted.pareto[:1]
    adapted.save_pretrained(folder)
    changed = files()
    assert len(train(make_recipe(), out=tmp_path / "run").pareto) == 1
    assert files() == changed
    (folder / "model.safetensors").write_bytes(b"cut")
    train(make_recipe(), out=tmp_path / "run")
    assert files() == whole
    assert train(make_recipe(notes=["corrected"]), out=tmp_path / "run").record["notes"] == ["corrected"]


def test_the_time_that_saves_take_is_not_counted_as_optimisation(data, make_recipe, tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    save, step = loop.save, steps._step

    def save_slowly(*given):
        save(*given)
        clock.now += 1000

    def step_in_a_second(*given):
        clock.now += 1
        return step(*given)

    monkeypatch.setattr(steps, "time", SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now))
    for module in (loop, steps):
        monkeypatch.setattr(module, "save", save_slowly)
    monkeypatch.setattr(steps, "_step", step_in_a_second)
    assert train(make_recipe(), out=tmp_path / "run").record["seconds"] == 8


def test_a_state_that_names_no_pictures_is_refused(interrupted, make_recipe):
    saved = torch.load(interrupted / "state.pt", weights_only=True)
    torch.save(saved | {"data": None}, interrupted / "state.pt")
    with pytest.raises(RecipeError, match=r"state\.pt: belongs to other pictures"):
        train(make_recipe(), out=interrupted)
