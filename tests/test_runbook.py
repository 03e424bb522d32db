"""The runbook: every command in it runs, every state of a study stands in it, every command has an example."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pydicom
import pytest
import typer
import xxhash
from pynetdicom import AE

from salsa_node import assembly, cli, loopback, phantom
from salsa_node.overview import Standing
from salsa_node.settings import PipelineChoice
from salsa_node.store import NewInstance, NewObject, Store, StoreSettings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
NOW = datetime.now(UTC)


def parts() -> dict[str, list[str]]:
    """Heading of the runbook -> the shell lines below it."""
    found: dict[str, list[str]] = {}
    heading, inside = "", False
    for line in (DEPLOY / "runbook.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not inside:
            heading = line.lstrip("# ")
        elif line.startswith("```"):
            inside = line == "```sh"
        elif inside and line.strip() and not line.startswith("#"):
            found.setdefault(heading, []).append(line)
    return found


def keep(store: Store, data_dir: Path, source: phantom.Study, name: str, then: datetime) -> str:
    """Store the phantom's axial series as the study of that accession number; its UID."""
    uid = ""
    for number, path in enumerate(source.axial):
        ds = pydicom.dcmread(path)
        uid = ds.StudyInstanceUID = f"{ds.StudyInstanceUID[:50]}.{name[-1]}"
        ds.SeriesInstanceUID = f"{uid}.1"
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{uid}.1.{number}"
        path = data_dir / "studies" / uid / f"{number}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        ds.save_as(path)
        content = path.read_bytes()
        digest = xxhash.xxh3_128(content[144 + int.from_bytes(content[140:144], "little") :]).hexdigest()
        new = NewInstance(
            ds.SOPInstanceUID, ds.SeriesInstanceUID, uid, ds.SOPClassUID, str(ds.file_meta.TransferSyntaxUID),
            path.relative_to(data_dir).as_posix(), digest, len(content), "CT1", "CT", 1, name,
        )  # fmt: skip
        store.add_instance(new, then)
    for step in range(10):
        assembly.step(store, data_dir, PipelineChoice("demo"), then + timedelta(hours=2, seconds=step))
    return uid


@pytest.fixture
def site(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A stopped node's folder with four studies; a PACS that answers; the environment for its commands."""
    data = tmp_path / "data"
    data.mkdir()
    recipe = phantom.Recipe(3, shape=(14, 32, 32), spacing_mm=(15.0, 10.0, 10.0))
    source = phantom.write_study(phantom.make(recipe), tmp_path / "study")
    with Store.open(StoreSettings(f"sqlite:///{data / 'salsa_node.sqlite'}"), create=True) as store:
        for name, days in (("OLD1", 60), ("DONE2", 0), ("FAILED3", 0), ("DOWN4", 0)):
            then = NOW - timedelta(days=days, hours=3)
            uid = keep(store, data, source, name, then)
            run = store.claim_run("w", 60, then + timedelta(hours=3))
            assert run is not None
            if name == "FAILED3":
                store.fail_run(run.id, "w", "no memory", then)
                continue
            item = NewObject("SR", f"{uid}.9", "1.9", f"results/{name}/sr.dcm", "0" * 64)
            (data / item.path).parent.mkdir(parents=True)
            (data / item.path).write_bytes(b"sr")
            store.produce(run.id, "w", [item], ["pacs"], "no_candidate", None, "d", then)
            (delivery,) = store.claim_deliveries("s", 60, then + timedelta(hours=3))
            if name == "DOWN4":
                store.give_up(delivery.id, "s", None, "nobody listens", then)
            else:
                store.delivered(delivery.id, "s", 0, None, then)
    ae = AE("PACS")
    ae.add_supported_context("1.2.840.10008.1.1")
    server = ae.start_server(("127.0.0.1", 0), block=False)
    assert server is not None
    file = tmp_path / "site.toml"
    file.write_text(
        f'[node]\ndata_dir = "{data}"\n[listener]\nport = {loopback.free_port()}\n[pipeline]\nname = "demo"\n'
        f'[delivery]\nto = ["pacs"]\n[[destination]]\nname = "pacs"\nae_title = "PACS"\nhost = "127.0.0.1"\n'
        f"port = {server.socket.getsockname()[1]}\n"
    )
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (
        ("salsa-node", f'exec {sys.executable} -m salsa_node "$@"'),
        ("systemctl", f'echo "$@" >> {tmp_path / "systemctl.txt"}'),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    try:
        yield {
            **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "SALSA_NODE_CONFIG": str(file),
            "BACKUP": str(tmp_path / "backup"), "TOLD": str(tmp_path / "systemctl.txt"), "OUT": str(tmp_path),
        }  # fmt: skip
    finally:
        server.shutdown()


#: which study a part of the runbook is about
ABOUT = {"A study is stuck": "FAILED3", "Work on the machine, results that wait": "DONE2", "The PACS was down": "DONE2"}
#: commands whose answer may be no: exit code 1
MAY_SAY_NO = ("salsa-node doctor", "salsa-node release", "salsa-node verify")


def test_every_command_of_the_runbook_runs(site):
    done = []
    for heading, lines in parts().items():
        environment = {**site, "STUDY": ABOUT.get(heading, "DONE2")}
        for line in lines:
            told = subprocess.run(
                ["bash", "-o", "pipefail", "-c", line], env=environment, capture_output=True, text=True, check=False
            )
            fine = (0, 1) if line.startswith(MAY_SAY_NO) else (0,)
            assert told.returncode in fine, f"{heading}: {line}\n{told.stdout}{told.stderr}"
            assert "Traceback" not in told.stderr, line
            done.append(line)
    assert len(done) >= 30
    assert Path(site["TOLD"]).read_text().splitlines() == ["stop salsa-node", "start salsa-node"] * 2


def test_the_runbook_knows_every_state_of_a_study():
    text = (DEPLOY / "runbook.md").read_text(encoding="utf-8")
    stated = re.findall(r"^\| ([a-z ]+) \|", text, re.MULTILINE)
    needless = {Standing.SENDING.value, Standing.DONE.value, Standing.CANCELLED.value}
    assert {one.value for one in Standing} - needless <= set(stated)


#: commands whose example in the README another test runs, as a process: it needs a peer, weights or a scan
RUN_BY = {
    "batch": "test_cli_batch::test_a_table_of_scans_in_salsas_way",
    "demo": "test_demo::test_the_demonstration_finds_what_it_must_and_says_where_everything_lies",
    "fetch": "test_fetch::test_rerun_of_a_purged_study_fetches_its_images",
    "models fetch": "test_cli_models::test_what_is_refused_is_told_with_the_reason",
    "models import": "test_cli_models::test_a_second_import_says_that_nothing_was_done",
    "models remove": "test_cli_models::test_a_task_is_removed",
    "run": "test_cli::test_run_on_a_dicom_folder_and_a_nifti_gives_the_same_findings",
    "serve": "test_cli::test_serve_with_a_port_in_use_says_which_key_to_change",
}


def commands(app: typer.Typer) -> list[str]:
    """Every command that --help lists, with those it lies below."""

    def below(one: Any, words: tuple[str, ...]) -> Iterator[str]:
        if one.hidden:
            return
        if not hasattr(one, "commands"):
            yield " ".join(words)
            return
        for name, command in one.commands.items():
            yield from below(command, (*words, name))

    return sorted(below(typer.main.get_command(app), ()))


def test_every_command_has_an_example_that_a_test_runs():
    lines = [line for some in parts().values() for line in some]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in commands(cli.app):
        runs = any(re.search(rf"\bsalsa-node {command}\b", line) for line in lines)
        assert runs or command in RUN_BY, f"no example of {command} is run: put one into the runbook"
        assert runs or f"salsa-node {command}" in readme, command


def test_the_tests_that_run_the_other_examples_are_there():
    assert set(RUN_BY) < set(commands(cli.app))
    for command, test in RUN_BY.items():
        module, _, name = test.partition("::")
        source = (ROOT / "tests" / f"{module}.py").read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), test
        assert command.split()[-1] in source
