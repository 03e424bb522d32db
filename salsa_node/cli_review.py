"""`salsa-node hold` and `release`: a person looks at a result before it leaves."""

from __future__ import annotations

from datetime import UTC, datetime

from salsa_node import config, console
from salsa_node.options import EXIT_NO, AsJson, ConfigFile, StudyName


def hold(study: StudyName, config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """Let nothing of a study leave until `release`, results to come included; what has arrived is not called back."""
    settings = config.load(config_file)
    from salsa_node import store
    from salsa_node.audit import Trail

    with store.Store.open(store.StoreSettings(settings.store_url)) as record:
        wanted = record.study(study).study_uid
        Trail(settings.node.data_dir).ordered("hold", [wanted], datetime.now(UTC))
        held = record.hold_study(wanted, datetime.now(UTC))
    if as_json:
        console.put_json({"study_uid": wanted, "held": [item.id for item in held]})
    else:
        console.put(
            f"{len(held)} deliveries are held, and so is what is yet to come; then: salsa-node release {wanted}"
        )


def release(study: StudyName, config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """Let the current result of a study leave; a running node sends it."""
    settings = config.load(config_file)
    from salsa_node import store
    from salsa_node.audit import Trail

    with store.Store.open(store.StoreSettings(settings.store_url)) as record:
        wanted = record.study(study).study_uid
        Trail(settings.node.data_dir).ordered("release", [wanted], datetime.now(UTC))
        was_held = record.is_held_by_a_person(wanted)
        due = record.release_study(wanted, datetime.now(UTC))
    if as_json:
        console.put_json({"study_uid": wanted, "released": [item.id for item in due]})
    elif due:
        console.put(f"{len(due)} deliveries are due; a running node sends them")
    elif was_held:
        console.put("it is held no longer; nothing of it waited")
    else:
        console.put("nothing of it was held; what is sent of its current result from now on leaves")
    if not (due or was_held):
        raise SystemExit(EXIT_NO)
