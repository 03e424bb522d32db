"""What is saved comes back byte for byte; what is damaged is refused; a running node is not in the way, nor overrun."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from test_retention import T0, arrive, finish

from salsa_node import audit, backup, integrity, migrations
from salsa_node.errors import ConfigError, StoreError
from salsa_node.store import Store, StoreSettings, hold
from salsa_node.store_connection import connect, writer
from salsa_node.store_transaction import transaction

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with a study that is done and one that failed."""
    folder = tmp_path / "data"
    folder.mkdir()
    with Store.open(StoreSettings(url_of(folder)), create=True) as store:
        arrive(store, folder, "1.2")
        finish(store, folder, "1.2", "done")
        arrive(store, folder, "1.3")
        finish(store, folder, "1.3", "failed")
    return folder


def url_of(folder: Path) -> str:
    return f"sqlite:///{folder / 'salsa_node.sqlite'}"


def saved(data: Path, folder: Path, **more: bool) -> backup.Backup:
    return backup.make(url_of(data), data, folder, T0, **more)


def test_what_is_saved_comes_back(data, tmp_path):
    with Store.open(StoreSettings(url_of(data)), create=True) as store:  # others read and write meanwhile
        made = saved(data, tmp_path / "saved")
        store.add_event("node", "here", "node.tested", "after the backup", T0)
    assert sorted(made.digests) == [
        "files/results/1.2/seg.dcm", "files/studies/1.2/1.2.1/1.dcm", "files/studies/1.3/1.3.1/1.dcm", "record.sqlite",
    ]  # fmt: skip
    (data / "studies" / "1.2" / "1.2.1" / "1.dcm").write_bytes(b"lost")
    (data / "models").mkdir()
    (data / "models" / "weights").write_bytes(b"large")
    _, aside = backup.restore(tmp_path / "saved", url_of(data), data, datetime(2026, 11, 2, 3, 4, 5, tzinfo=UTC))
    assert aside == tmp_path / "data.before-20261102T030405Z"
    assert (aside / "studies" / "1.2" / "1.2.1" / "1.dcm").read_bytes() == b"lost"
    assert (data / "models" / "weights").exists()
    with Store.open(StoreSettings(url_of(data))) as store:
        assert integrity.verify(store, data).faults == ()
        assert [study.study_uid for study in store.studies()] == ["1.2", "1.3"]
        assert [event.name for event in store.find_events(subject="node")] == ["node.restored"]


def test_what_lies_in_the_log_of_a_running_node_alone_is_saved_too(data, tmp_path):
    with Store.open(StoreSettings(url_of(data))) as store:
        store.add_event("node", "here", "node.tested", "in the log alone", T0)
        assert b"in the log alone" not in (data / "salsa_node.sqlite").read_bytes()
        saved(data, tmp_path / "saved")
    with Store.open(StoreSettings(f"sqlite:///{tmp_path / 'saved' / 'record.sqlite'}")) as store:
        assert [event.detail for event in store.find_events(name="node.tested")] == ["in the log alone"]


def test_the_audit_trail_comes_back_and_goes_on(data, tmp_path):
    with Store.open(StoreSettings(url_of(data))) as store:
        audit.Trail(data).take(store, T0)
        audit.Trail(data).accessed("show", "1.2", T0)
        (data / audit.SENT).write_text("3")
        lines = audit.Trail(data).entries()
        saved(data, tmp_path / "saved")
        store.add_event("node", "here", "node.started", "after the backup", T0)
        audit.Trail(data).take(store, T0)
    backup.restore(tmp_path / "saved", url_of(data), data, T0)
    assert audit.Trail(data).entries() == lines
    assert (data / audit.SENT).read_text() == "3"
    with Store.open(StoreSettings(url_of(data))) as store:
        assert audit.Trail(data).take(store, T0) == 1
        assert audit.Trail(data).verify(store, T0 + timedelta(hours=1)).untold == 0
    assert [entry.action for entry in audit.Trail(data).entries()][len(lines) :] == ["node.restored"]


def test_a_record_that_a_node_holds_by_another_folder_stays(data, tmp_path):
    saved(data, tmp_path / "saved")
    url = f"sqlite:///{tmp_path / 'elsewhere.sqlite'}"
    with hold(StoreSettings(url)), Store.open(StoreSettings(url), create=True) as store:
        store.add_event("node", "here", "node.started", "port 1", T0)
        with pytest.raises(ConfigError, match="in use by another node"):
            backup.restore(tmp_path / "saved", url, tmp_path / "new", T0)
        assert [event.name for event in store.find_events()] == ["node.started"]
    assert not (tmp_path / "new").exists()


def test_what_a_crash_left_in_the_log_of_a_record_kept_elsewhere_is_moved_with_it(data, tmp_path):
    saved(data, tmp_path / "saved")
    record = tmp_path / "elsewhere.sqlite"
    with Store.open(StoreSettings(f"sqlite:///{record}"), create=True) as store:
        store.add_event("node", "here", "node.tested", "only in the log", T0)
        crashed = {path.name: path.read_bytes() for path in tmp_path.glob("elsewhere.sqlite*")}
    for name, content in crashed.items():
        (tmp_path / name).write_bytes(content)
    assert (tmp_path / "elsewhere.sqlite-wal").stat().st_size > 0
    backup.restore(tmp_path / "saved", f"sqlite:///{record}", tmp_path / "new", T0)
    kept = record.with_name(f"{record.name}.before-{T0:%Y%m%dT%H%M%SZ}")
    with Store.open(StoreSettings(f"sqlite:///{kept}")) as store:
        assert [event.detail for event in store.find_events(name="node.tested")] == ["only in the log"]


def test_a_record_kept_elsewhere_comes_back_to_its_place(data, tmp_path):
    saved(data, tmp_path / "saved")
    url = f"sqlite:///{tmp_path / 'elsewhere.sqlite'}"
    Store.open(StoreSettings(url), create=True).close()
    backup.restore(tmp_path / "saved", url, tmp_path / "new", T0)
    with Store.open(StoreSettings(url)) as store:
        assert len(store.studies()) == 2
        assert integrity.verify(store, tmp_path / "new").faults == ()
    assert list(tmp_path.glob("elsewhere.sqlite.before-*"))


def test_without_images_results_are_saved(data, tmp_path):
    made = saved(data, tmp_path / "saved", images=False)
    assert sorted(made.digests) == ["files/results/1.2/seg.dcm", "record.sqlite"]


def test_a_file_that_is_gone_is_told_and_no_fault(data, tmp_path):
    (data / "studies" / "1.3" / "1.3.1" / "1.dcm").unlink()
    made = saved(data, tmp_path / "saved")
    assert made.gone == ("studies/1.3/1.3.1/1.dcm",)
    assert backup.check(tmp_path / "saved").gone == made.gone


@pytest.mark.parametrize(
    ("path", "content", "told"),
    [
        ("files/results/1.2/seg.dcm", b"changed", "seg.dcm has changed"),
        ("files/results/1.2/seg.dcm", None, "cannot be read"),
        ("record.sqlite", b"", "record.sqlite has changed"),
        ("manifest.json", b"{}", "is no backup"),
        ("manifest.json", None, "is no backup"),
        (
            "manifest.json",
            b'{"form": 1, "program": "0", "made_at": "", "images": true, "size_bytes": 0, "gone": [],'
            b' "sha256": {"../../etc/passwd": "0"}}',
            "beyond its own folder",
        ),
        (
            "manifest.json",
            b'{"form": 9, "program": "9", "made_at": "", "images": true, "size_bytes": 0, "gone": [], "sha256": {}}',
            "newer program",
        ),
    ],
)
def test_a_backup_that_is_not_whole_changes_nothing(data, tmp_path, path, content, told):
    saved(data, tmp_path / "saved")
    file = tmp_path / "saved" / path
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    before = sorted(data.rglob("*"))
    with pytest.raises(ConfigError, match=told):
        backup.restore(tmp_path / "saved", url_of(data), data, T0)
    assert sorted(data.rglob("*")) == before


def test_nothing_is_put_under_a_running_node(data, tmp_path):
    saved(data, tmp_path / "saved")
    with (data / "node.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="stop it first"):
            backup.restore(tmp_path / "saved", url_of(data), data, T0)


def test_a_folder_that_is_there_is_never_overwritten(data, tmp_path):
    with pytest.raises(ConfigError, match="is there already"):
        saved(data, data)
    with pytest.raises(StoreError, match="there is no store"):
        backup.make(url_of(tmp_path / "absent"), data, tmp_path / "saved", T0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]  # and no half of a backup


def test_an_upgrade_keeps_the_record_as_it_was(tmp_path):
    engine = connect(StoreSettings(url_of(tmp_path)), create=True)
    with transaction(writer(engine)) as t:
        migrations.upgrade(t.connection, "0001")
    engine.dispose()
    before, kept = backup.upgrade(url_of(tmp_path), T0)
    assert before == "0001"
    assert kept is not None
    Store.open(StoreSettings(url_of(tmp_path))).close()
    with pytest.raises(StoreError, match="has version 0001"):
        Store.open(StoreSettings(f"sqlite:///{kept}"))
    assert backup.upgrade(url_of(tmp_path), T0) == (migrations.HEAD, None)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    config = tmp_path / "site.toml"
    config.write_text(f'[node]\ndata_dir = "{tmp_path / "data"}"\n')

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "salsa_node", *map(str, words), "--config", str(config)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


def test_the_commands(data, cli, tmp_path):
    folder = tmp_path / "saved"
    told = cli("backup", folder, "--json")
    assert (told.returncode, json.loads(told.stdout)["files"]) == (0, 5)
    assert (folder / "config.toml").read_text() == (tmp_path / "site.toml").read_text()
    assert cli("backup", folder).returncode == 3
    assert [(entry.action, entry.detail) for entry in audit.Trail(data).entries()] == [("access.backup", "5 files")]
    assert "is whole: 5 files" in cli("restore", folder, "--check").stdout
    assert cli("restore", folder).returncode == 1  # nobody said yes
    told = cli("restore", folder, "--yes")
    assert told.returncode == 0, told.stderr
    assert "what stood there lies in" in told.stdout
    told = cli("db", "upgrade", "--json")
    assert json.loads(told.stdout) == {"from": migrations.HEAD, "to": migrations.HEAD, "kept": None}
