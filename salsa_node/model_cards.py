"""What is known of a model before its files are here: its task, licence, citation and source.

A model goes by one name everywhere: "salsa", or "totalsegmentator-591" for TotalSegmentator's task 591.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from salsa_node.errors import ConfigError
from salsa_node.models import PIPELINE_TASKS, SALSA, TOTALSEGMENTATOR, task_name

RELEASES: Final = "https://github.com/wasserth/TotalSegmentator/releases/download"

#: What `fetch` calls a group of tasks, beside the pipelines that run them; the one that finds the liver first.
TASK_WORDS: Final[Mapping[str, tuple[int, ...]]] = {
    "liver": (298, 291),
    "liver_fast": (297,),
    "liver_lesions": (297, 591),
    "liver_segments": (298, 570),
}

_TASKS: Final[Mapping[int, str]] = {
    291: "organs on CT at 1.5 mm, the liver among them",
    297: "organs on CT at 3 mm: the quick liver, and where to look for lesions",
    298: "organs on CT at 6 mm: where the liver is",
    570: "the liver's Couinaud segments on CT",
    591: "liver lesions on CT",
}


@dataclass(frozen=True, slots=True)
class Card:
    """A model in words.

    commercial_use: whether the licence allows it. note: what a user must know beside that; may be empty.
    """

    name: str
    title: str
    task: str
    licence: str
    licence_url: str
    commercial_use: bool
    citation: str
    source: str
    note: str = ""

    @property
    def terms(self) -> str:
        """The licence and what it forbids, in one line."""
        allowed = "commercial use allowed" if self.commercial_use else "COMMERCIAL USE FORBIDDEN"
        return f"{self.licence} ({self.licence_url}): {allowed}"


_SALSA: Final = Card(
    name=SALSA,
    title="SALSA (VHIO Radiomics Group)",
    task="liver lesions on contrast-enhanced CT: nnU-Net cascade, 3d_lowres and 3d_cascade_fullres",
    licence="CC BY-NC-SA 4.0, research purposes only",
    licence_url="https://creativecommons.org/licenses/by-nc-sa/4.0/",
    commercial_use=False,
    citation="Balaguer-Montero M. et al., Cell Reports Medicine 2025; 6(4): 102032, doi:10.1016/j.xcrm.2025.102032",
    source="https://github.com/radiomicsgroup/liver-SALSA (weights on request from VHIO)",
)
_DEMO: Final = Card(
    name="demo",
    title="Demo models",
    task="liver and lesions of synthetic phantoms",
    licence="Apache-2.0",
    licence_url="https://www.apache.org/licenses/LICENSE-2.0",
    commercial_use=True,
    citation="none: trained on phantoms alone",
    source="packaged with salsa_node",
    note="NOT FOR CLINICAL USE",
)


def card(name: str) -> Card:
    """What is known of the model of that name. Raises ConfigError for a name that nobody knows."""
    if name in (SALSA, "demo"):
        return _SALSA if name == SALSA else _DEMO
    return _task_card(task_of(name), name)


def task_of(name: str) -> int:
    """591 for "totalsegmentator-591". Raises ConfigError for anything else."""
    prefix, _, number = name.partition("-")
    if prefix != TOTALSEGMENTATOR or not number.isdecimal() or name != name_of_task(int(number)):
        raise ConfigError(f"no model is called {name!r}; there are salsa and {TOTALSEGMENTATOR}-NUMBER, such as -591")
    return int(number)


def name_of_task(task_id: int) -> str:
    """ "totalsegmentator-591" for 591."""
    return f"{TOTALSEGMENTATOR}-{task_id}"


def tasks_meant(word: str) -> tuple[int, ...]:
    """The tasks that a number, a model's name, one of TASK_WORDS or a pipeline's name stands for.

    Raises ConfigError with what can be fetched.
    """
    if word.isdecimal():
        return (int(word),)
    if word.startswith(f"{TOTALSEGMENTATOR}-") and word not in PIPELINE_TASKS:
        return (task_of(word),)
    known = {**TASK_WORDS, **PIPELINE_TASKS}
    if word not in known:
        raise ConfigError(f"{word!r} cannot be fetched; there are {', '.join(known)}, or a task by its number")
    return known[word]


def download_url(task_id: int) -> str:
    """Where TotalSegmentator keeps an open task; "" for one that it gives out by licence number only.

    Raises WeightsMissing for a number that the installed TotalSegmentator does not know.
    """
    from totalsegmentator.map_tasks_config import TASK_ID_WEIGHTS_CONFIGS  # plain data; imports no network

    name = task_name(task_id)
    version = TASK_ID_WEIGHTS_CONFIGS[task_id].get("version")
    return f"{RELEASES}/{version}/{name}.zip" if version not in (None, "TODO") else ""


def _task_card(task_id: int, name: str) -> Card:
    folder = task_name(task_id)
    task = _TASKS.get(task_id, folder.partition("_")[2].replace("_", " "))
    url = download_url(task_id)
    if not url:
        return Card(
            name=name,
            title=f"TotalSegmentator {folder}",
            task=task,
            licence="TotalSegmentator's own, by licence number",
            licence_url="https://backend.totalsegmentator.com/license-academic/",
            commercial_use=False,
            citation=_CITATION,
            source="https://github.com/wasserth/TotalSegmentator",
        )
    small = " Trained on a small data set: expect it to be less robust." if task_id in (570, 591) else ""
    return Card(
        name=name,
        title=f"TotalSegmentator {folder}",
        task=task,
        licence="Apache-2.0",
        licence_url="https://www.apache.org/licenses/LICENSE-2.0",
        commercial_use=True,
        citation=_CITATION + ("; doi:10.1007/s10278-025-01716-y" if task_id == 591 else ""),
        source=url,
        note=small.strip(),
    )


_CITATION: Final = (
    "Wasserthal J. et al., TotalSegmentator, Radiology: Artificial Intelligence 2023; 5(5): e230024, "
    "doi:10.1148/ryai.230024"
)
