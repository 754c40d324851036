"""Prepare the datasets of results/study/study.toml: python results/sources.py [sources]

--archive FSDD.zip     the Free Spoken Digit Dataset
--mvsa DIR             MVSA-Single: data/ID.jpg, data/ID.txt, labelResultAll.txt and the
                       published split {train,dev,test}.jsonl
--emodb DIR            EMO-DB: wav/*.wav and table.csv (id, label, group, audio, text)
--stamps DIR           table.csv (id, label, audio, image, text) and its files
--image, --text SPEC   encoders of frozen features, such as timm:DIR and hf:DIR
--data DIR             where the prepared datasets go (default: data)

What is prepared already is left as it is.
"""

import argparse
import csv
from pathlib import Path

from mla_nb.core import InputError, discover
from mla_nb.data.digits import parse_names, prepare_digits, read_archive
from mla_nb.data.mvsa import prepare_mvsa
from mla_nb.data.own import prepare_own
from mla_nb.features import extract
from mla_nb.study import Study

HERE = Path(__file__).parent


def digits(a, study):
    "One dataset per speaker who is left out"
    recordings = read_archive(a.archive)
    speakers = sorted({r[2] for r in parse_names(recordings)})
    if speakers != study.folds("digits"):
        raise InputError(f"speakers {speakers}: the plan has {study.folds('digits')}.")
    for who in speakers:
        options = study.fields("digits", "concat", 0, 0.1, who)["dataset_args"]
        prepare_digits(recordings, a.data, **options)


def mvsa(a, study):
    "The published split, whole, with small pictures and with frozen ones; a seeded one"
    root, spec = Path(a.mvsa), f"image={a.image},text={a.text}"
    lists = [str(root / f"{k}.jsonl") for k in ("train", "dev", "test")]
    agree = prepare_mvsa(root, data=a.data, variant="agree", split=lists)
    extract(agree, spec)
    pictures = Path(a.data) / "mvsa-agree-pictures"
    extract(agree, f"image={a.image}", modalities="image", out=pictures)
    prepare_mvsa(root, data=a.data, variant="agree-small", size=64, split=lists)
    extract(prepare_mvsa(root, data=a.data, variant="resolve", labels="resolve"), spec)


def emodb(a, study):
    "Five datasets, each of which tests two speakers and validates on two others"
    root, kept = Path(a.emodb), Path(a.data) / "tables"
    kept.mkdir(parents=True, exist_ok=True)
    with (root / "table.csv").open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    speakers = sorted({r["group"] for r in rows})
    for fold in study.folds("emodb"):
        k = 2 * int(fold)
        roles = dict.fromkeys(speakers[k : k + 2], "test")
        after = [speakers[(k + i) % len(speakers)] for i in (2, 3)]
        roles |= dict.fromkeys(after, "valid")
        table = kept / f"emodb-{fold}.csv"
        with table.open("w", newline="", encoding="utf-8") as f:
            out = csv.DictWriter(f, [*rows[0], "split"])
            out.writeheader()
            out.writerows(
                {
                    **r,
                    "audio": (root / r["audio"]).resolve(),
                    "split": roles.get(r["group"], "train"),
                }
                for r in rows
            )
        prepare_own(table, data=a.data, audio="log_mel")


def stamps(a, study):
    "Pictures and captions as features, spoken descriptions as they are"
    table = Path(a.stamps) / "table.csv"
    folder = prepare_own(table, "stamps", data=a.data, audio="log_mel")
    extract(folder, f"image={a.image},text={a.text}")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, help_ in (
        ("archive", "FSDD.zip"),
        ("mvsa", "folder of MVSA-Single"),
        ("emodb", "folder of EMO-DB"),
        ("stamps", "folder of the stamps' table"),
        ("image", "encoder of pictures"),
        ("text", "encoder of texts"),
    ):
        p.add_argument(f"--{name}", default="", help=help_)
    p.add_argument("--data", default="data", help="where prepared datasets go")
    p.add_argument("--plan", default=str(HERE / "study"), help="folder of study.toml")
    a = p.parse_args()
    discover()
    study = Study(a.plan)
    if (a.mvsa or a.stamps) and not (a.image and a.text):
        raise InputError(
            "MVSA and stamps need features of frozen encoders: give --image and "
            "--text, for instance --image timm:DIR --text hf:DIR."
        )
    given = {digits: a.archive, emodb: a.emodb, mvsa: a.mvsa, stamps: a.stamps}
    if not any(given.values()):
        raise InputError("no source given; see the top of results/sources.py.")
    for prepare, source in given.items():
        if source:
            prepare(a, study)


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        raise SystemExit(f"sources: {e}") from None
