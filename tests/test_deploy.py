"""What lies in deploy/: the units are hardened, the parts of the compose file fit together."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import orthanc
import pytest
import yaml

from salsa_node import config, loopback, overview, phantom
from salsa_node.overview import Standing
from salsa_node.store import Store, StoreSettings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
NOW = datetime.now(UTC)


# ---- systemd ----------------------------------------------------------------------------------------

UNITS = sorted(DEPLOY.glob("*.service"))


@pytest.fixture
def analyze() -> Callable[..., subprocess.CompletedProcess[str]]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (apt-get install systemd)")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, check=False, timeout=60)

    return run


@pytest.mark.parametrize("unit", [*UNITS, DEPLOY / "salsa-node-selftest.timer"], ids=lambda path: path.name)
def test_the_units_are_understood(analyze, tmp_path, unit):
    for file in (*UNITS, unit):
        text = re.sub(r"/opt/salsa_node/\S+/salsa-node", "/bin/true", file.read_text())
        (tmp_path / file.name).write_text(text)
    told = analyze("verify", "--man=no", str(tmp_path / unit.name))
    assert (told.returncode, told.stderr) == (0, "")


@pytest.mark.parametrize(("name", "most"), [("salsa-node.service", 20), ("salsa-node-selftest.service", 60)])
def test_the_units_are_hardened(analyze, name, most):
    told = analyze("security", "--offline=yes", f"--threshold={most}", "--no-pager", str(DEPLOY / name))
    assert told.returncode == 0, told.stdout[-200:]


#: what keeps the node from the rest of its machine: systemd's own score passes over some of it
PROTECTION = {
    "User": "salsa-node",
    "UMask": "0077",
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectKernelModules": "yes",
    "ProtectControlGroups": "yes",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "LockPersonality": "yes",
}
#: and what the long-running unit has beside that
MORE_PROTECTION = {
    "StateDirectoryMode": "0700",
    "AmbientCapabilities": "",
    "PrivateMounts": "yes",
    "ProtectProc": "invisible",
    "ProtectClock": "yes",
    "ProtectHostname": "yes",
    "ProtectKernelLogs": "yes",
    "RestrictRealtime": "yes",
    "RemoveIPC": "yes",
    "KeyringMode": "private",
    "SystemCallArchitectures": "native",
    "SystemCallFilter": "@system-service\n~@privileged @obsolete",
    "DevicePolicy": "closed",
    "Restart": "always",  # it comes back by itself,
    "RestartPreventExitStatus": "3",  # save where a person must mend the config
}


@pytest.mark.parametrize(
    ("name", "protection"),
    [("salsa-node.service", PROTECTION | MORE_PROTECTION), ("salsa-node-selftest.service", PROTECTION)],
)
def test_no_line_that_protects_is_lost(name, protection):
    lines: dict[str, str] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", (DEPLOY / name).read_text(), re.MULTILINE):
        lines[key] = f"{lines[key]}\n{value}" if key in lines else value
    assert {key: lines.get(key) for key in protection} == protection


def test_the_unit_s_commands_exist():
    for unit in UNITS:
        for words in re.findall(r"^Exec\w+=\S+/salsa-node (.*)$", unit.read_text(), re.MULTILINE):
            command = [sys.executable, "-m", "salsa_node", *words.split(), "--help"]
            assert subprocess.run(command, capture_output=True, check=False).returncode == 0, words


def test_a_worker_that_the_kernel_kills_does_not_take_the_node_with_it():
    unit = (DEPLOY / "salsa-node.service").read_text()
    assert "\nOOMPolicy=continue\n" in unit  # systemd's default stops the whole service (systemd.service(5))


# ---- containers: no docker here, so as far as files go; then the same wiring with Debian's Orthanc ------


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))


def test_what_the_compose_file_mounts_and_builds_is_there(compose):
    for name, service in compose["services"].items():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).is_file(), f"{name}: {source}"
            else:
                assert source in compose["volumes"], f"{name}: {source}"
        assert set(service["networks"]) <= set(compose["networks"])
    assert (DEPLOY / compose["services"]["node"]["build"]["context"] / "deploy" / "Dockerfile").is_file()
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)  # Orthanc's has no password here


def test_the_node_of_the_compose_file_and_its_neighbours_know_each_other(compose):
    settings = config.load(DEPLOY / "compose" / "salsa_node.toml")
    pacs = json.loads((DEPLOY / "compose" / "orthanc.json").read_text())
    (destination,) = settings.destination
    assert (destination.ae_title, destination.host, destination.port) == (
        pacs["DicomAet"],
        "orthanc",
        pacs["DicomPort"],
    )
    assert (settings.query.ae_title, settings.query.port) == (pacs["DicomAet"], pacs["DicomPort"])
    modality = pacs["DicomModalities"]["node"]
    assert (modality["AET"], modality["Port"]) == (settings.listener.ae_title, settings.listener.port)
    assert modality["Host"] in compose["services"]["node"]["networks"]["dicom"]["aliases"]
    assert {destination.host, "ohif"} <= set(compose["services"])
    assert settings.listener.allowed[0].address == compose["networks"]["dicom"]["ipam"]["config"][0]["subnet"]
    assert f"'{pacs['DicomWeb']['Root'].rstrip('/')}'" in (DEPLOY / "compose" / "ohif.js").read_text()
    nginx = (DEPLOY / "compose" / "nginx.conf").read_text()
    assert f"proxy_pass http://orthanc:{pacs['HttpPort']}{pacs['DicomWeb']['Root']};" in nginx


def test_the_dockerfile_copies_what_is_there_and_starts_what_exists():
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    taken = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for copied in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        for source in copied.split():
            assert (ROOT / source).exists(), source
            assert any(source.startswith(one) for one in taken), f"{source} is kept out by .dockerignore"
    settings = config.load(DEPLOY / "compose" / "salsa_node.toml")
    assert f"EXPOSE {settings.listener.port}" in text
    assert f"127.0.0.1:{settings.web.port}/health" in text
    assert f"VOLUME {settings.node.data_dir}" in text
    assert 'ENTRYPOINT ["salsa-node"]\nCMD ["serve"]' in text
    for number, line in enumerate(text.splitlines()):  # a comment inside a continued line would end it
        assert not (line.endswith("\\") and text.splitlines()[number + 1].lstrip().startswith("#"))


def test_the_paths_within_the_containers_fit(compose):
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    settings = config.load(DEPLOY / "compose" / "salsa_node.toml")
    pacs = json.loads((DEPLOY / "compose" / "orthanc.json").read_text())
    (named,) = re.findall(r"SALSA_NODE_CONFIG=(\S+)", text)
    (environment,) = re.findall(r"^COPY --from=build (\S+) \1$", text, re.MULTILINE)
    assert f"COPY deploy/compose/salsa_node.toml {named}\n" in text
    assert f"python -m venv {environment}\n" in text
    assert text.count(f"PATH={environment}/bin:$PATH") == 2
    for name in ("node", "node-gpu"):
        service = compose["services"][name]
        assert {volume.split(":")[1] for volume in service["volumes"]} == {named, str(settings.node.data_dir)}
        built = DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]
        assert built.samefile(DEPLOY / "Dockerfile")
        assert all(f"ARG {argument}=" in text for argument in service["build"]["args"])
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
        assert service["security_opt"] == ["no-new-privileges:true"]
    of_pacs = {volume.split(":")[1] for volume in compose["services"]["orthanc"]["volumes"]}
    assert {*pacs["LuaScripts"], "/etc/orthanc/orthanc.json"} < of_pacs


def test_the_same_wiring_brings_results_back_into_orthanc(tool, tmp_path):
    port = loopback.free_port()
    pacs = json.loads((DEPLOY / "compose" / "orthanc.json").read_text())
    pacs["DicomModalities"]["node"] |= {"Host": "127.0.0.1", "Port": port}
    kept = {
        key: pacs[key] for key in ("DicomAet", "DicomModalities", "DicomAlwaysAllowStore", "UnknownSopClassAccepted")
    }
    lua = str(DEPLOY / "compose" / "to_node.lua")
    with orthanc.running(tool("Orthanc", "orthanc"), tmp_path / "pacs", {**kept, "StableAge": 2, "LuaScripts": [lua]}) as archive:  # fmt: skip # noqa: E501
        text = (DEPLOY / "compose" / "salsa_node.toml").read_text()
        for old, new in (
            ('data_dir = "/data"', f'data_dir = "{tmp_path / "data"}"'),
            ('host = "0.0.0.0"\nport = 11112', f'host = "127.0.0.1"\nport = {port}'),
            ('{ ae_title = "ORTHANC", address = "172.31.112.0/24" },', '{ ae_title = "*", address = "127.0.0.1" },'),
            ('host = "orthanc"\nport = 4242', f'host = "127.0.0.1"\nport = {archive.dicom_port}'),
            ("port = 9112", f"port = {loopback.free_port()}"),
            ("[query]", '[assembly]\nquiet_s = 1.0\n\n[pipeline]\nname = "demo"\n\n[query]'),
        ):
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "node.toml").write_text(text)
        recipe = phantom.Recipe(5, shape=(48, 96, 96), spacing_mm=(5.0, 3.2, 3.2))
        study = phantom.write_study(phantom.make(recipe), tmp_path / "study")
        with loopback.node(tmp_path / "node.toml", tmp_path / "node.log", port):
            for path in study.axial:
                archive.upload(path)
            deadline = time.monotonic() + 240
            while not (archive.instances("SR", study.study_uid) and archive.instances("DOC", study.study_uid)):
                assert time.monotonic() < deadline, (tmp_path / "node.log").read_text()[-2000:]
                time.sleep(0.5)
            with Store.open(StoreSettings(f"sqlite:///{tmp_path / 'data' / 'salsa_node.sqlite'}")) as store:
                while overview.glance(store, store.study(study.study_uid)).standing is not Standing.DONE:
                    assert time.monotonic() < deadline
                    time.sleep(0.2)
                assert len(store.runs_of(study.study_uid)) == 1  # and what came back was not sent to the node again
