"""What pixels say of a contrast phase: kept with the series, scored, and the better series goes next, once."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pydicom
import pytest
from test_worker import arrive
from told import events
from typer.testing import CliRunner

from salsa_node import assembly, cli, dicom_ct, overview, pipelines
from salsa_node.config import Config, parse
from salsa_node.contrast_phase import Phase, PixelPhase
from salsa_node.pipelines import Masks, Observer, PipelineSettings, Provenance, options, unobserved
from salsa_node.selection_rules import SelectionRules
from salsa_node.settings import AssemblySettings, NodeSettings, PipelineChoice
from salsa_node.store import DeliveryState, Run, RunState, Store, StoreSettings
from salsa_node.volume import CtVolume, Grid, LabelVolume
from salsa_node.worker import Worker

T0 = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
LATER = T0 + timedelta(hours=1)
STUDY = "1.2.3"
RULES = assembly.Rules(whole=AssemblySettings(quiet_s=30.0))
LIVER_HU = {Phase.NATIVE: 50, Phase.ARTERIAL: 70, Phase.PORTAL_VENOUS: 110, Phase.DELAYED: 90}
TAGS = {Phase.NATIVE: "native", Phase.ARTERIAL: "arterial", Phase.PORTAL_VENOUS: "portal venous",
        Phase.DELAYED: "delayed", Phase.UNKNOWN: "abdomen"}  # fmt: skip
LIVER = (slice(2, 10), slice(6, 20), slice(6, 20))
PROBE = PipelineChoice("probe", options={"contrast_phase": True})


class ProbePipeline:
    """Marks a liver of known place, and reads the phase from its attenuation, where it is asked to."""

    def __init__(self, settings: PipelineSettings) -> None:
        self._looks = settings.options.get("contrast_phase") is True

    @property
    def provenance(self) -> Provenance:
        return Provenance("probe", "1")

    def segment(self, ct: CtVolume, observer: Observer = unobserved) -> Masks:
        organ = np.zeros(ct.grid.shape, np.uint8)
        organ[LIVER] = 1
        hu = int(np.median(ct.voxels_hu[LIVER]))
        phase = next(phase for phase, liver_hu in LIVER_HU.items() if liver_hu == hu)
        none = LabelVolume(np.zeros_like(organ), ct.grid)
        seen = PixelPhase(phase, 1.0) if self._looks else None
        return Masks(LabelVolume(organ, ct.grid), none, self.provenance, pixel_phase=seen)

    def unload(self) -> None:
        """Nothing is held."""


@pytest.fixture(autouse=True)
def probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pipelines._TABLE, "probe", f"{__name__}:ProbePipeline")
    monkeypatch.setitem(options.OPTIONS, "probe", {"contrast_phase": options._SWITCH})


@pytest.fixture
def config(tmp_path: Path) -> Config:
    text = """
        [delivery]
        to = ["pacs"]
        [[destination]]
        name = "pacs"
        ae_title = "PACS"
        host = "127.0.0.1"
        port = 104
        [results]
        summary_page = false
        summary_pdf = false
        key_images = 0
    """
    return replace(parse(text), node=NodeSettings(data_dir=tmp_path / "data"))


@pytest.fixture
def store(config: Config) -> Iterator[Store]:
    config.node.data_dir.mkdir()
    with Store.open(StoreSettings(config.store_url), create=True) as opened:
        yield opened


Comes = Callable[..., None]


@pytest.fixture
def comes(store: Store, config: Config, tmp_path: Path) -> Comes:
    """A study: of each series, by its number, what its headers name and in which phase it was taken."""

    def receive(*series: tuple[Phase, Phase], study: str = STUDY) -> None:
        for number, (named, taken) in enumerate(series, start=2):
            voxels = np.full((12, 28, 28), -1000, np.int16)
            voxels[:, 3:25, 3:25] = 40
            voxels[LIVER] = LIVER_HU[taken]
            affine = np.array([[0, 0, 10, -140], [0, 10, 0, -140], [15, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
            header = dicom_ct.CtHeader(study, f"{study}.{number}", "Doe^Jane", "ID", T0 + timedelta(minutes=number),
                                       series_number=number, series_description=TAGS[named])  # fmt: skip
            folder = tmp_path / "made" / study / str(number)
            ct = CtVolume(voxels, Grid(voxels.shape, affine, f"{study}.99"))
            arrive(store, config.node.data_dir, dicom_ct.write(ct, folder, header))

    return receive


@pytest.fixture
def settle(store: Store, config: Config) -> Callable[..., tuple[Run, ...]]:
    """Let assembly and worker take turns until neither finds anything to do; the runs."""
    worker = Worker(store, config, "worker", clock=lambda: LATER)

    def go(rules: assembly.Rules = RULES, choice: PipelineChoice = PROBE) -> tuple[Run, ...]:
        for _ in range(40):
            looked = assembly.step(store, config.node.data_dir, choice, LATER, rules)
            if looked is None and worker.step(LATER) is None:
                return store.runs_of(STUDY)
        raise AssertionError("it never comes to rest")

    return go


def queue_first(store: Store, config: Config, rules: assembly.Rules = RULES, choice: PipelineChoice = PROBE) -> None:
    """What a look at the study queues (`arrive` has told the store that it has been looked at)."""
    assembly.select(store, config.node.data_dir, store.study(STUDY), choice, LATER, rules)


def told(runs: tuple[Run, ...]) -> list[tuple[str, RunState]]:
    return [(str(run.series_uid).rpartition(".")[2], run.state) for run in runs]


NATIVE, ARTERIAL, PORTAL, UNKNOWN = Phase.NATIVE, Phase.ARTERIAL, Phase.PORTAL_VENOUS, Phase.UNKNOWN


def test_where_the_pixels_contradict_the_tags_the_series_that_is_best_then_goes_next(store, config, comes, settle):
    comes((PORTAL, NATIVE), (ARTERIAL, PORTAL))
    queue_first(store, config)
    runs = settle()
    assert told(runs) == [("2", RunState.SUPERSEDED), ("3", RunState.PRODUCED)]
    assert runs[1].supersedes_id == runs[0].id
    assert {item.state for item in store.deliveries_of(runs[0].id)} == {DeliveryState.WITHDRAWN}
    assert {item.state for item in store.deliveries_of(runs[1].id)} == {DeliveryState.PENDING}
    first, second = (
        next(
            pydicom.dcmread(config.node.data_dir / item.path) for item in store.objects_of(run.id) if item.kind == "SR"
        )
        for run in runs
    )
    [before] = second.PredecessorDocumentsSequence
    [of_series] = before.ReferencedSeriesSequence
    assert of_series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == first.SOPInstanceUID
    assert [run.findings["contrast_phase_in_pixels"] for run in runs] == ["non-contrast", "portal venous"]
    scores = store.looks_of(STUDY)[-1].scores
    assert [(line["series_number"], line["chosen"]) for line in scores] == [(3, True), (2, False)]
    assert scores[1]["reasons"][0] == {
        "criterion": "phase", "found": "pixels: non-contrast, tags: portal venous", "points": 0.0,
    }  # fmt: skip
    found = assembly.examine(store, config.node.data_dir, store.study(STUDY), RULES)
    assert found is not None
    assert "pixels: portal venous, tags: arterial +40" in found.accepted[f"{STUDY}.3"]
    names = [event.name for event in events(store)]
    assert (names.count("series.phase"), names.count("study.reconsidered")) == (2, 2)
    assert settle() == runs, "and nothing goes on"
    page = overview.detail(store, overview.glance(store, store.study(STUDY)))
    assert "pixels: non-contrast, tags: portal venous" in json.dumps(page)


def test_what_proves_worse_than_the_result_in_force_yields_to_it(store, config, comes, settle):
    comes((PORTAL, ARTERIAL), (UNKNOWN, NATIVE))
    queue_first(store, config)
    runs = settle()
    assert told(runs) == [("2", RunState.PRODUCED), ("3", RunState.CANCELLED)]
    assert runs[1].has_yielded
    assert "its pixels said which phase it is: run 1" in str(runs[1].error)
    assert store.objects_of(runs[1].id) == ()
    seen = overview.glance(store, store.study(STUDY))
    assert (seen.current, seen.latest) == ((runs[0],), (runs[0],))
    assert seen.standing is overview.Standing.SENDING, "not cancelled"
    queue_first(store, config)
    assert settle() == runs, "whoever looks again finds the same"


def test_a_person_s_run_yields_to_none(store, config, comes, settle):
    comes((PORTAL, ARTERIAL), (UNKNOWN, NATIVE))
    queue_first(store, config)
    settle()
    images = [image.sop_instance_uid for image in store.instances_of(STUDY, f"{STUDY}.3")]
    store.queue_run(STUDY, "probe", "asked for", LATER, series_uid=f"{STUDY}.3", images=images, force=True,
                    options=PROBE.options)  # fmt: skip
    assert told(settle())[-1] == ("3", RunState.PRODUCED)


def test_what_a_person_asks_for_while_a_study_is_reconsidered_is_not_cancelled(
    store, config, comes, settle, monkeypatch
):
    comes((PORTAL, NATIVE), (ARTERIAL, PORTAL))
    queue_first(store, config)
    assert Worker(store, config, "worker", clock=lambda: LATER).step(LATER) is not None
    data_dir, examine = config.node.data_dir, assembly.examine

    def slowly(*of: object) -> assembly.Input | None:
        found = examine(*of)
        monkeypatch.setattr(assembly, "examine", examine)
        assembly.queue_again(store, data_dir, store.study(STUDY), "probe", PROBE.options, LATER, rules=RULES)
        return found

    first = store.runs_of(STUDY)[0]
    monkeypatch.setattr(assembly, "examine", slowly)
    assert assembly.step(store, data_dir, PROBE, LATER, RULES) is not None
    [_, asked] = store.runs_of(STUDY)
    assert (asked.forced, asked.state) == (True, RunState.QUEUED)
    assert store.study_to_reconsider() is None, "until that has run"
    assert told(settle())[1] == ("3", RunState.PRODUCED)
    assert store.run(first.id).state is RunState.SUPERSEDED


def test_where_the_better_series_was_analysed_before_a_person_is_told_what_to_do(store, config, comes, settle):
    comes((PORTAL, NATIVE), (ARTERIAL, PORTAL))
    queue_first(store, config)
    settle()
    late = store.queue_run(STUDY, "probe", "late images", LATER, series_uid=f"{STUDY}.3")
    store.claim_run("worker", 60.0, LATER)
    store.note_phase(late, NATIVE.value, 1.0, None, LATER)
    store.produce(late.id, "worker", (), (), "no_candidate", {}, "digest", LATER)
    data_dir = config.node.data_dir
    assert assembly.step(store, data_dir, PROBE, LATER, RULES) is not None
    [*_, event] = [event for event in events(store) if event.name == "study.reconsidered"]
    assert f"series {STUDY}.2 scores more: salsa-node rerun" in event.detail
    assembly.queue_again(store, data_dir, store.study(STUDY), "probe", PROBE.options, LATER, rules=RULES)
    settle()
    assert [run.place for run in store.current_runs(STUDY)] == [f"{STUDY}.2"]


def test_without_the_option_the_tags_alone_decide(store, config, comes, settle):
    comes((PORTAL, NATIVE), (ARTERIAL, PORTAL))
    choice = PipelineChoice("probe")
    queue_first(store, config, choice=choice)
    assert told(settle(choice=choice)) == [("2", RunState.PRODUCED)]
    assert store.phases_of(STUDY) == ()


def test_pixels_that_are_less_certain_than_the_rules_ask_for_leave_it_to_the_tags(store, config, comes, settle):
    comes((PORTAL, NATIVE), (ARTERIAL, PORTAL))
    queue_first(store, config)
    run = store.claim_run("worker", 60.0, LATER)
    assert run is not None
    for certainty, best, words in ((0.6, "2", "the pixels are not certain"), (0.7, "3", "+0")):
        store.note_phase(run, NATIVE.value, certainty, 3.0, LATER)
        found = assembly.examine(store, config.node.data_dir, store.study(STUDY), RULES)
        assert found is not None
        assert found.subjects[0].series_uid == f"{STUDY}.{best}"
        assert words in found.accepted[f"{STUDY}.2"]
    strict = replace(RULES, selection=SelectionRules(pixel_certainty=0.8))
    found = assembly.examine(store, config.node.data_dir, store.study(STUDY), strict)
    assert found is not None
    assert found.subjects[0].series_uid == f"{STUDY}.2"


def test_of_two_results_side_by_side_the_one_of_the_wrong_phase_makes_room(store, config, comes, settle):
    comes((PORTAL, NATIVE), (PORTAL, PORTAL), (ARTERIAL, ARTERIAL))
    rules = replace(RULES, selection=SelectionRules(best=2))
    wanted = replace(config, selection=rules.selection)
    worker = Worker(store, wanted, "worker", clock=lambda: LATER)
    queue_first(store, wanted, rules)
    while assembly.step(store, config.node.data_dir, PROBE, LATER, rules) or worker.step(LATER):
        assert len(store.runs_of(STUDY)) < 5
    assert told(store.runs_of(STUDY)) == [
        ("2", RunState.SUPERSEDED), ("3", RunState.PRODUCED), ("4", RunState.PRODUCED),
    ]  # fmt: skip


def test_results_that_were_to_make_room_for_one_that_yields_stand_side_by_side_again(store, config, comes):
    comes((PORTAL, PORTAL), (PORTAL, ARTERIAL), (UNKNOWN, NATIVE))
    places = [f"{STUDY}.{number}" for number in (2, 3, 4)]

    def queue(place: str, beside: str) -> Run:
        return store.queue_run(STUDY, "probe", f"digest {place}", LATER, series_uid=place, beside=[beside])

    queued = [queue(places[0], places[1]), queue(places[1], places[0])]
    for run in queued:
        store.claim_run("worker", 60.0, LATER)
        store.produce(run.id, "worker", (), (), "no_candidate", {}, f"digest {run.id}", LATER)
    third = queue(places[2], places[1])
    assert queue(places[1], places[2]).id == queued[1].id, "which stays, the first makes room"
    store.claim_run("worker", 60.0, LATER)
    store.yield_run(third.id, "worker", "no_candidate", "digest", "scores less", LATER)
    assert [run.id for run in store.current_runs(STUDY)] == [run.id for run in queued]
    assert overview.glance(store, store.study(STUDY)).latest == store.current_runs(STUDY)


def carry(store: Store, data_dir: Path, truth: dict[str, Phase]) -> bool:
    """What the worker does with the next run as far as phases go, without voxels; whether there was one."""
    run = store.claim_run("worker", 60.0, LATER)
    if run is None:
        return False
    store.note_phase(run, truth[str(run.series_uid)].value, 1.0, None, LATER)
    better = assembly.outranked(store, data_dir, run, RULES)
    if better:
        store.yield_run(run.id, "worker", "no_candidate", "digest", better, LATER)
    else:
        store.produce(run.id, "worker", (), (), "no_candidate", {}, f"digest {run.id}", LATER)
    return True


@pytest.mark.parametrize("seed", range(8))
def test_whatever_lies_each_series_goes_once_at_most_and_the_best_one_s_result_is_in_force(store, config, comes, seed):
    chance = random.Random(seed)
    named, taken = list(TAGS), list(LIVER_HU)
    series = [(chance.choice(named), chance.choice(taken)) for _ in range(4)]
    comes(*series)
    truth = {f"{STUDY}.{number}": phase for number, (_, phase) in enumerate(series, start=2)}
    data_dir = config.node.data_dir
    queue_first(store, config)
    steps = 0
    while carry(store, data_dir, truth) or assembly.step(store, data_dir, PROBE, LATER, RULES):
        steps += 1
        assert steps <= 2 * len(series)
    runs = store.runs_of(STUDY)
    assert len({run.series_uid for run in runs}) == len(runs), "none twice"
    [current] = store.current_runs(STUDY)
    found = assembly.examine(store, data_dir, store.study(STUDY), RULES)
    assert found is not None
    assert found.subjects[0].place == current.place, series


def test_select_and_show_tell_a_person_why(store, config, comes, settle, tmp_path):
    comes((PORTAL, NATIVE), (ARTERIAL, PORTAL))
    queue_first(store, config)
    settle()
    file = tmp_path / "salsa_node.toml"
    file.write_text(f'[node]\ndata_dir = "{config.node.data_dir}"\n')
    for command in (["select", STUDY, "--dry-run"], ["show", STUDY]):
        result = CliRunner().invoke(cli.app, [*command, "--config", str(file)])
        assert result.exit_code == 0, result.output
        words = " ".join(result.output.split())
        assert "pixels: non-contrast, tags: portal venous" in words
