"""A worker carries runs; what stands in the way is written against the run, and nothing is made twice."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pydicom
import pytest

from salsa_node import phantom
from salsa_node.config import Config, parse
from salsa_node.errors import LeaseLost
from salsa_node.series import inspect
from salsa_node.settings import NodeSettings
from salsa_node.store import DeliveryState, NewInstance, Run, RunState, Store, StoreSettings
from salsa_node.worker import Worker

T0 = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> phantom.Study:
    recipe = phantom.Recipe(11, shape=(24, 64, 64), spacing_mm=(8.0, 4.5, 4.5))
    return phantom.write_study(phantom.make(recipe), tmp_path_factory.mktemp("study"))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    text = """
        [worker]
        max_attempts = 2
        retry_s = 10.0
        [delivery]
        to = ["pacs"]
        [[destination]]
        name = "pacs"
        ae_title = "PACS"
        host = "127.0.0.1"
        port = 104
    """
    return replace(parse(text), node=NodeSettings(data_dir=tmp_path))


@pytest.fixture
def store(config: Config) -> Iterator[Store]:
    with Store.open(StoreSettings(config.store_url), create=True) as opened:
        yield opened


@pytest.fixture
def worker(store: Store, config: Config) -> Worker:
    return Worker(store, config, "worker", clock=lambda: T0)


def arrive(store: Store, data_dir: Path, paths: tuple[Path, ...]) -> None:
    """Put the files where the listener would, with their rows."""
    for path in paths:
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        place = f"studies/{ds.StudyInstanceUID}/{ds.SeriesInstanceUID}/{ds.SOPInstanceUID}.dcm"
        (data_dir / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, data_dir / place)
        new = NewInstance(
            sop_instance_uid=ds.SOPInstanceUID,
            series_uid=ds.SeriesInstanceUID,
            study_uid=ds.StudyInstanceUID,
            sop_class_uid=ds.SOPClassUID,
            transfer_syntax_uid=ds.file_meta.TransferSyntaxUID,
            path=place,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            size_bytes=path.stat().st_size,
            calling_ae="CT",
            modality="CT",
        )
        store.add_instance(new, T0)


def queue(store: Store, study: phantom.Study, masks: Path | None = None, **more: object) -> Run:
    arrive(store, Path(store_folder(store)), study.axial)
    return store.queue_run(
        study.study_uid,
        "given_masks",
        "digest",
        T0,
        series_uid=study.series_uid,
        masks_path=None if masks is None else str(masks),
        masks_sha256=None if masks is None else "sha",
        **more,
    )


def store_folder(store: Store) -> str:
    return str(Path(str(store._engine.url.database)).parent)


def test_a_run_becomes_objects_with_rows_files_and_deliveries(store, worker, config, study):
    run = queue(store, study, study.truth_labels)
    done = worker.step(T0)
    assert done is not None
    assert (done.state, done.outcome) == (RunState.PRODUCED, "lesions"), done.error
    objects = store.objects_of(run.id)
    assert [item.kind for item in objects] == ["SEG", "SR"]
    for item in objects:
        content = (config.node.data_dir / item.path).read_bytes()
        assert hashlib.sha256(content).hexdigest() == item.sha256
        ds = pydicom.dcmread(config.node.data_dir / item.path)
        assert ds.StudyInstanceUID == study.study_uid
        assert ds.SOPInstanceUID == item.sop_instance_uid
    assert [(d.destination, d.state) for d in store.deliveries_of(run.id)] == [("pacs", DeliveryState.PENDING)] * 2
    assert done.findings is not None
    assert len(done.findings["lesions"]) >= 1
    assert worker.step(T0) is None


def test_the_same_result_again_is_the_same_objects(store, worker, study):
    queue(store, study, study.truth_labels)
    first = worker.step(T0)
    later = T0 + timedelta(days=1)
    again = store.queue_run(
        study.study_uid, "given_masks", "digest", later, series_uid=study.series_uid,
        masks_path=str(study.truth_labels), masks_sha256="sha", force=True,
    )  # fmt: skip
    worker.step(later)
    before, after = store.objects_of(first.id), store.objects_of(again.id)
    assert [(o.sop_instance_uid, o.sha256, o.path) for o in before] == [
        (o.sop_instance_uid, o.sha256, o.path) for o in after
    ]
    assert store.run(first.id).state is RunState.SUPERSEDED


def test_other_settings_make_other_objects(store, worker, config, study):
    first = queue(store, study, study.truth_labels)
    worker.step(T0)
    with_liver = replace(config, results=replace(config.results, include_liver=True))
    again = store.queue_run(
        study.study_uid, "given_masks", "digest", T0, series_uid=study.series_uid,
        masks_path=str(study.truth_labels), masks_sha256="sha", force=True,
    )  # fmt: skip
    Worker(store, with_liver, "worker", clock=lambda: T0).step(T0)
    before = {item.sop_instance_uid for item in store.objects_of(first.id)}
    after = {item.sop_instance_uid for item in store.objects_of(again.id)}
    assert len(before) == len(after) == 2
    assert not before & after


def test_a_refusal_becomes_a_report_that_says_why(store, worker, config, study):
    run = queue(store, study, refusal="gap of 10.0 mm after slice 4, spacing is 5.0 mm")
    done = worker.step(T0)
    assert (done.state, done.outcome) == (RunState.PRODUCED, "not_analysed"), done.error
    (report,) = store.objects_of(run.id)
    assert report.kind == "SR"
    assert b"gap of 10.0 mm after slice 4" in (config.node.data_dir / report.path).read_bytes()


def test_a_series_that_is_no_volume_becomes_a_report_too(store, worker, config, study, tmp_path):
    holed = tuple(path for n, path in enumerate(study.axial) if n != 9)
    arrive(store, config.node.data_dir, holed)
    store.queue_run(
        study.study_uid, "given_masks", "digest", T0, series_uid=study.series_uid,
        masks_path=str(study.truth_labels), masks_sha256="sha",
    )  # fmt: skip
    done = worker.step(T0)
    assert (done.state, done.outcome) == (RunState.PRODUCED, "not_analysed"), done.error
    assert "gap of 16.0 mm" in done.findings["reason"]


def test_a_pipeline_error_fails_the_run_and_says_so(store, worker, study, tmp_path):
    queue(store, study, tmp_path / "absent.nii.gz")
    done = worker.step(T0)
    assert done.state is RunState.FAILED
    assert "absent.nii.gz" in done.error


def test_an_unforeseen_error_fails_the_run_without_repeating_foreign_words(store, worker, study, monkeypatch):
    queue(store, study, study.truth_labels)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("Doe^Jane was here")

    monkeypatch.setattr("salsa_node.worker.analyse", broken)
    done = worker.step(T0)
    assert done.state is RunState.FAILED
    assert "RuntimeError" in done.error
    assert "Doe" not in done.error


def test_a_retryable_error_waits_and_is_given_up_in_the_end(store, worker, study, monkeypatch):
    from salsa_node.errors import DeviceExhausted

    queue(store, study, study.truth_labels)

    def full(*_: object, **__: object) -> None:
        raise DeviceExhausted("the GPU has no memory left")

    monkeypatch.setattr("salsa_node.worker.analyse", full)
    done = worker.step(T0)
    assert (done.state, done.not_before) == (RunState.QUEUED, T0 + timedelta(seconds=10))
    assert worker.step(T0) is None
    done = worker.step(T0 + timedelta(seconds=11))
    assert done.state is RunState.FAILED
    assert "no memory left" in done.error


def test_a_run_that_kills_its_worker_is_given_up(store, worker, study):
    run = queue(store, study, study.truth_labels)
    for n in range(2):
        assert store.claim_run(f"dead {n}", 1.0, T0 + timedelta(seconds=10 * n)) is not None
    done = worker.step(T0 + timedelta(seconds=100))
    assert (done.id, done.state) == (run.id, RunState.FAILED)
    assert "2 attempts" in done.error


def test_a_worker_that_is_stopped_gives_its_run_back(store, worker, study, monkeypatch):
    run = queue(store, study, study.truth_labels)

    def stopped(*_: object, **__: object) -> None:
        raise SystemExit(143)

    monkeypatch.setattr("salsa_node.worker.analyse", stopped)
    with pytest.raises(SystemExit):
        worker.step(T0)
    assert (store.run(run.id).state, store.run(run.id).attempt) == (RunState.QUEUED, 0)


def test_a_worker_that_lost_its_lease_puts_nothing_down(store, worker, study, monkeypatch):
    run = queue(store, study, study.truth_labels)
    produce = store.produce

    def too_late(*arguments: object, **more: object) -> Run:
        store.claim_run("other", 60.0, T0 + timedelta(days=1))
        return produce(*arguments, **more)

    monkeypatch.setattr(store, "produce", too_late)
    done = worker.step(T0)
    assert (done.state, done.lease_owner) == (RunState.RUNNING, "other")
    assert store.objects_of(run.id) == ()
    with pytest.raises(LeaseLost):
        store.fail_run(run.id, "worker", "late", T0)


def test_the_axial_series_of_the_study_is_one_volume(study):
    assert inspect(study.axial).grid.shape == (24, 64, 64)
