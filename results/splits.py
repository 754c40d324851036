"""What the published split lists share: python results/splits.py DIR

Reads the lists in DIR (cremad_ogm_train.csv, cremad_ogm_test.csv, and so on), nothing
else, and writes results/splits.csv: one row per pair of lists and trait. `first` and
`second` name the lists; `n_train` and `n_test` are their lengths; `train`, `test` and
`both` count different values of the trait; `seen` counts the samples of the second list
whose value is in the first. `ids` is the checksum by which a split is recognized.
"""

import csv
import re
import sys
from pathlib import Path

from mla_nb.data.cremad import audit, clip_traits
from mla_nb.data.media import ids_sha, read_split

HERE = Path(__file__).parent
SPLITS = {  # dataset -> split -> its lists
    "cremad": {
        "ogm": ("cremad_ogm_train.csv", "cremad_ogm_test.csv"),
        "mla": ("cremad_mla_train.txt", "cremad_mla_test.txt"),
    },
    "food101": {"mla": ("food101_mla_train.txt", "food101_mla_test.txt")},
    "iemocap": {"mla": ("iemocap_mla_train.txt", "iemocap_mla_test.txt")},
}
ACROSS = [  # lists of CREMA-D whose splits differ
    ("ogm test", "mla test"),
    ("ogm train", "mla test"),
    ("mla train", "ogm test"),
]


def picture_traits(r):
    "A picture of Food-101; ids that differ in a second number only are one result"
    several = re.fullmatch(r"(.+_\d+)-\d+", r["id"])
    return {
        "picture": r["id"],
        "dish": r["label"],
        "search result": several[1] if several else r["id"],
    }


def utterance_traits(r):
    "An utterance of IEMOCAP; a scripted turn is one place of a script, of any actors"
    m = re.fullmatch(r"Ses(\d\d)[FM]_(\w+)_(([FM])\w+)", r["id"])
    session, scene, turn, speaker = m.groups()
    return {
        "utterance": r["id"],
        "emotion": r["label"],
        "actor": session + speaker,
        "dialogue": r["id"].rsplit("_", 1)[0],
        "scripted turn": (scene, turn) if scene.startswith("script") else None,
    }


TRAITS = {
    "cremad": clip_traits,
    "food101": picture_traits,
    "iemocap": utterance_traits,
}


def rows_of(dataset, first, second, lists, ids=""):
    "The audit of two lists, as rows of the table"
    a, b = lists[first], lists[second]
    about = {"dataset": dataset, "first": first, "second": second, "ids": ids}
    sizes = {"n_train": len(a), "n_test": len(b)}
    return [about | sizes | r for r in audit(a, b, TRAITS[dataset])]


def audited(folder):
    "All rows of the table"
    out = []
    for dataset, splits in SPLITS.items():
        lists = {
            f"{name} {part}": read_split(Path(folder) / file)
            for name, files in splits.items()
            for part, file in zip(("train", "test"), files)
        }
        for name in splits:
            pair = f"{name} train", f"{name} test"
            ids = ids_sha(lists[p] for p in pair)
            out += rows_of(dataset, *pair, lists, ids)
        if dataset == "cremad":
            for pair in ACROSS:
                out += rows_of(dataset, *pair, lists)
    return out


def write(rows):
    with (HERE / "splits.csv").open("w", newline="", encoding="utf-8") as f:
        w = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        w.writeheader()
        w.writerows(rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("which folder holds the lists? python results/splits.py DIR")
    write(audited(sys.argv[1]))
