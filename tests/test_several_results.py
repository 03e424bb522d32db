"""The best few series of a study: each has a run and a result of its own, and only its own takes its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pydicom
import pytest
from typer.testing import CliRunner

from salsa_node import assembly, overview, phantom
from salsa_node.candidate import Candidate
from salsa_node.cli import app
from salsa_node.config import Config, load
from salsa_node.dicom_result import Identity, described
from salsa_node.errors import SeriesRejected
from salsa_node.pipelines import Provenance
from salsa_node.selection import choose, choose_volume
from salsa_node.selection_rules import SelectionRules
from salsa_node.settings import PipelineChoice
from salsa_node.store import Delivery, DeliveryState, NewInstance, NewObject, Run, RunState, Store, StoreSettings
from salsa_node.worker import Worker

T0 = datetime(2026, 3, 4, 12, tzinfo=UTC)
DEMO = PipelineChoice("demo")
TWO = assembly.Rules(SelectionRules(best=2))
PHASES = {4: "Abdomen portal venous", 7: "Abdomen arterial", 9: "Abdomen native"}


def after(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> phantom.Study:
    recipe = phantom.Recipe(5, shape=(14, 32, 32), spacing_mm=(12.0, 9.0, 9.0))
    return phantom.write_study(phantom.make(recipe), tmp_path_factory.mktemp("phantom"))


@pytest.fixture
def site(tmp_path: Path) -> Config:
    """The settings of a node that analyses the best two, and sends to one archive."""
    (tmp_path / "site.toml").write_text(
        f'[node]\ndata_dir = "{tmp_path / "data"}"\n[pipeline]\nname = "demo"\ndevice = "cpu"\n[selection]\nbest = 2\n'
        '[delivery]\nto = ["pacs"]\n[[destination]]\nname = "pacs"\nae_title = "PACS"\nhost = "127.0.0.1"\nport = 9\n'
    )
    (tmp_path / "data").mkdir()
    return load(tmp_path / "site.toml")


@pytest.fixture
def store(site: Config) -> Iterator[Store]:
    with Store.open(StoreSettings(site.store_url), create=True) as opened:
        yield opened


def arrive(store: Store, site: Config, files: tuple[Path, ...], number: int, now: datetime) -> str:
    """The files as a series of that number; its UID."""
    uid = f"2.25.5.{number}"
    for source in files:
        ds = pydicom.dcmread(source)
        ds.SeriesInstanceUID, ds.SeriesNumber, ds.SeriesDescription = uid, number, PHASES[number]
        ds.AcquisitionNumber, ds.AcquisitionTime = number, f"10{number:02}00"
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{ds.SOPInstanceUID[:60]}.{number}"
        place = site.node.data_dir / f"{number}-{source.name}"
        ds.save_as(place)
        new = NewInstance(
            ds.SOPInstanceUID, uid, ds.StudyInstanceUID, ds.SOPClassUID, ds.file_meta.TransferSyntaxUID, place.name,
            "0" * 64, place.stat().st_size, "CT1", ds.Modality, number,
        )  # fmt: skip
        store.add_instance(new, now)
    return uid


def look(store: Store, site: Config, now: datetime, rules: assembly.Rules = TWO) -> None:
    while assembly.step(store, site.node.data_dir, DEMO, now, rules) is not None:
        pass


def carried(store: Store, now: datetime) -> list[Run]:
    """Every waiting run PRODUCED, with one object that goes to one archive."""
    done = []
    while (run := store.claim_run("w", 60, now)) is not None:
        made = [NewObject("SR", f"1.2.{run.id}", "1.2.3", f"results/{run.id}", "sha")]
        done.append(store.produce(run.id, "w", made, ["pacs"], "lesions", {}, f"digest{run.id}", now))
    return done


def states(store: Store, study: phantom.Study) -> list[tuple[str, str]]:
    return [(str(run.series_uid)[-1], run.state.value) for run in store.runs_of(study.study_uid)]


@pytest.fixture
def both(store: Store, site: Config, study: phantom.Study) -> Store:
    """A store that holds the results of series 4 and 7; series 9 was passed over."""
    for number in PHASES:
        arrive(store, site, study.axial, number, T0)
    look(store, site, after(60))
    assert states(store, study) == [("4", "QUEUED"), ("7", "QUEUED")]
    assert len(carried(store, after(70))) == 2
    return store


def test_each_of_the_best_two_has_a_result_and_neither_takes_the_others_place(
    both: Store, study: phantom.Study
) -> None:
    assert states(both, study) == [("4", "PRODUCED"), ("7", "PRODUCED")]
    first, second = both.current_runs(study.study_uid)
    assert (first.beside, second.beside) == (["2.25.5.7"], ["2.25.5.4"])
    waiting: list[Delivery] = []
    while items := both.claim_deliveries("d", 60, after(80)):
        waiting += items
    assert [item.run_id for item in waiting] == [first.id, second.id]
    seen = overview.glance(both, both.study(study.study_uid))
    assert [run.id for run in seen.current] == [first.id, second.id]
    assert len(seen.deliveries) == 2


def test_a_late_image_renews_the_result_of_its_own_series_alone(
    store: Store, site: Config, study: phantom.Study
) -> None:
    arrive(store, site, study.axial, 4, T0)
    arrive(store, site, study.axial[:-1], 7, T0)
    look(store, site, after(60))
    carried(store, after(70))
    arrive(store, site, study.axial[-1:], 7, after(100))
    look(store, site, after(200))
    assert states(store, study) == [("4", "PRODUCED"), ("7", "PRODUCED"), ("7", "QUEUED")]
    assert store.runs_of(study.study_uid)[2].supersedes_id == 2
    carried(store, after(210))
    assert states(store, study) == [("4", "PRODUCED"), ("7", "SUPERSEDED"), ("7", "PRODUCED")]


def test_a_better_series_takes_the_place_of_the_one_that_is_chosen_no_more(
    store: Store, site: Config, study: phantom.Study
) -> None:
    for number in (7, 9):
        arrive(store, site, study.axial, number, T0)
    look(store, site, after(60))
    carried(store, after(70))
    assert states(store, study) == [("7", "PRODUCED"), ("9", "PRODUCED")]
    arrive(store, site, study.axial, 4, after(100))
    look(store, site, after(200))
    carried(store, after(210))
    current = [str(run.series_uid)[-1] for run in store.current_runs(study.study_uid)]
    assert sorted(current) == ["4", "7"]
    [withdrawn] = [run for run in store.runs_of(study.study_uid) if run.series_uid == "2.25.5.9"]
    assert withdrawn.state is RunState.SUPERSEDED
    assert [item.state for item in store.deliveries_of(withdrawn.id)] == [DeliveryState.WITHDRAWN]


def test_where_the_site_wants_one_again_only_one_result_stays(both: Store, site: Config, study: phantom.Study) -> None:
    found, runs = assembly.select(
        both, site.node.data_dir, both.study(study.study_uid), DEMO, after(90), assembly.Rules()
    )
    assert [subject.series_uid for subject in found.subjects] == ["2.25.5.4"]
    assert [run.beside for run in runs] == [[]]
    carried(both, after(100))
    assert [run.series_uid for run in both.current_runs(study.study_uid)] == ["2.25.5.4"]


def test_a_look_that_finds_the_same_queues_nothing(both: Store, site: Config, study: phantom.Study) -> None:
    again = assembly.select(both, site.node.data_dir, both.study(study.study_uid), DEMO, after(90), TWO)[1]
    assert [run.id for run in again] == [1, 2]
    assert len(both.runs_of(study.study_uid)) == 2


def test_a_person_reruns_one_of_them_or_both_and_gives_masks_to_one(
    both: Store, site: Config, study: phantom.Study
) -> None:
    of_study, folder = both.study(study.study_uid), site.node.data_dir
    [one] = assembly.queue_again(both, folder, of_study, "demo", {}, after(90), rules=TWO, only="2.25.5.7")
    assert (one.series_uid, one.supersedes_id) == ("2.25.5.7", 2)
    two = assembly.queue_again(both, folder, of_study, "demo", {}, after(91), rules=TWO)
    assert [run.series_uid for run in two] == ["2.25.5.4", "2.25.5.7"]
    assert both.run(one.id).state is RunState.CANCELLED
    with pytest.raises(
        SeriesRejected, match=r"masks are of one series, 2 are analysed; say which with --series: 2\.25"
    ):
        assembly.queue_again(both, folder, of_study, "given_masks", {}, after(92), ("masks/m.nii", "sha"), TWO)
    with pytest.raises(
        SeriesRejected, match=r"series 2\.25\.5\.9 is not analysed; of this study the rules choose 2\.25"
    ):
        assembly.queue_again(both, folder, of_study, "demo", {}, after(93), rules=TWO, only="2.25.5.9")
    assembly.queue_again(both, folder, of_study, "given_masks", {}, after(94), ("m.nii", "s"), TWO, "2.25.5.4")
    carried(both, after(100))
    arrive(both, site, study.localizer[:1], 9, after(110))
    look(both, site, after(200))
    current = {run.series_uid: run.masks_path for run in both.current_runs(study.study_uid)}
    assert current == {"2.25.5.4": "m.nii", "2.25.5.7": None}


def test_resend_sends_the_results_of_both_and_stops_where_one_is_kept_here(both: Store, study: phantom.Study) -> None:
    assert [item.run_id for item in both.resend(study.study_uid, None, after(90))] == [1, 2]


def test_a_person_releases_both_and_a_later_one_of_either_is_held_anew(
    both: Store, site: Config, study: phantom.Study
) -> None:
    both.hold_study(study.study_uid, after(80))
    assert all(both.is_held(run, by_default=True) for run in both.current_runs(study.study_uid))
    assert {item.run_id for item in both.release_study(study.study_uid, after(81))} == {1, 2}
    assert not any(both.is_held(run, by_default=True) for run in both.current_runs(study.study_uid))
    of_study = both.study(study.study_uid)
    assembly.queue_again(both, site.node.data_dir, of_study, "demo", {}, after(90), rules=TWO, only="2.25.5.4")
    [later] = carried(both, after(91))
    assert [both.is_held(run, by_default=True) for run in both.current_runs(study.study_uid)] == [False, True]
    assert both.current_runs(study.study_uid)[1] == later


def test_failures_of_one_are_told_before_the_success_of_the_other(
    both: Store, site: Config, study: phantom.Study
) -> None:
    of_study = both.study(study.study_uid)
    assembly.queue_again(both, site.node.data_dir, of_study, "demo", {}, after(90), rules=TWO, only="2.25.5.4")
    run = both.claim_run("w", 60, after(91))
    assert run is not None
    both.fail_run(run.id, "w", "no memory", after(92))
    row = overview.row(overview.glance(both, both.study(study.study_uid)))
    assert (row["standing"], row["error"], row["outcome"]) == ("failed", "no memory", "lesions")


def test_the_objects_name_their_series_and_count_their_own_revisions(
    store: Store, site: Config, study: phantom.Study
) -> None:
    for number in (4, 7):
        arrive(store, site, study.axial, number, T0)
    look(store, site, after(60))
    worker = Worker(store, site, "w", clock=lambda: after(70))
    of_study, masks = store.study(study.study_uid), (str(study.truth_labels), "sha")

    def asked_for(number: int, now: datetime, **options: object) -> None:
        assembly.queue_again(
            store, site.node.data_dir, of_study, "given_masks", options, now, masks, TWO, f"2.25.5.{number}"
        )

    asked_for(4, after(80))
    asked_for(7, after(81))
    done = [worker.step(after(90)), worker.step(after(91))]
    asked_for(7, after(92), lesion_labels=[2, 3])
    done.append(worker.step(after(93)))
    assert [run and run.state for run in done] == [RunState.PRODUCED] * 3, [run and run.error for run in done]
    told = []
    for run in store.runs_of(study.study_uid)[2:]:
        for item in store.objects_of(run.id):
            if item.kind == "SR":
                ds = pydicom.dcmread(site.node.data_dir / item.path)
                told.append(str(ds.SeriesDescription))
                words = "".join(str(e.value) for e in ds.iterall() if e.keyword == "TextValue")
                assert f"Images read: series {str(run.series_uid)[-1]}" in words
    title = "Liver lesions report by a person, "
    assert told == [f"{title}s4", f"{title}s7", f"{title}s7, rev 2"]


def test_a_series_of_one_result_alone_is_called_as_ever() -> None:
    mine = Provenance("x", "1")
    assert described("SEG", mine, Identity()) == "AI liver lesions SEG"
    assert described("SEG", mine, Identity(of_series="7", revision=3)) == "AI liver lesions SEG, s7, rev 3"
    longest = Provenance("x", "1", notice="DEMO MODEL - NOT FOR CLINICAL USE")
    called = described("SEG, single", longest, Identity(of_series="12", revision=22))
    assert called.endswith(" - DEMO MODEL - NOT FOR CLINICAL USE")
    assert ", s12, rev 22" in called


def fit(uid: str, acquisition: tuple[str, ...], slices: int) -> Candidate:
    paths = tuple(Path(f"{uid}-{n}") for n in range(slices))
    return Candidate("1", uid, int(uid), paths, frozenset(), (0.0, 0.0, 1.0), 1.0, (), acquisition=acquisition)


def test_of_one_acquisition_never_two_are_chosen() -> None:
    thin, thick, other = fit("4", ("f", "1"), 60), fit("5", ("f", "1"), 50), fit("6", ("f", "2"), 40)
    choice = choose([thick, other, thin], SelectionRules(best=2))
    assert choice.picked == (thin, other)
    assert [verdict.chosen for verdict in choice.verdicts] == [False, True, True]
    assert choice.verdicts[0].reason.startswith("passed over for series 4: the same acquisition; ")
    assert choice.verdicts[1].reason.startswith("chosen too: ")


def test_a_refused_one_makes_room_for_its_twin_and_for_the_next() -> None:
    thin, thick, other = fit("4", ("f", "1"), 60), fit("5", ("f", "1"), 50), fit("6", ("f", "2"), 40)
    made = object()

    def inspected(paths: tuple[Path, ...]) -> object:
        if paths == thin.paths:
            raise SeriesRejected("sheared")
        return made

    choice = choose_volume([thin, thick, other], inspected, SelectionRules(best=3))  # type: ignore[arg-type]
    assert [volume.candidate for volume in choice.volumes] == [thick, other]
    assert choice.best_refused is thin


def test_the_commands_tell_runs_of_different_series_apart(both: Store, site: Config, study: phantom.Study) -> None:
    file = site.node.data_dir.parent / "site.toml"
    told = CliRunner().invoke(app, ["select", study.study_uid, "--config", str(file), "--dry-run", "--json"])
    chosen = {line["series_number"]: line["chosen"] for line in json.loads(told.output)["scores"]}
    assert chosen == {4: True, 7: True, 9: False}
    shown = CliRunner().invoke(app, ["show", study.study_uid, "--config", str(file)]).output
    assert "series 7: chosen too: " in shown
    assert "Run 2, series 7: " in shown
    rerun = CliRunner().invoke(app, ["rerun", study.study_uid, "--config", str(file), "--series", "7", "--json"])
    assert len(json.loads(rerun.output)["runs"]) == 1
    assert both.runs_of(study.study_uid)[-1].series_uid == "2.25.5.7"
